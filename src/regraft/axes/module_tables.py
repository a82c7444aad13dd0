"""The tables of modules, one per family: what the parts of a loaded model are. A new family is a new table.

Names are those that modules have in memory in transformers 5, without what a model with a head puts before its base
model; "*" stands for one number. They differ from names on disk (`regraft.axes.families`) where loading renames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModuleTable:
    """One family.

    Attributes:
        blocks: stack -> path of its blocks.
        inside: path within a block -> role.
        outside: path outside the blocks -> (role, stack).
        prefixes: what may stand before the base model's names.
        causal: stacks whose positions attend only to those before them.
        head_dim: attribute of attention modules with the width of one head.
        ffn_size: key of the configuration with the width of feed-forward parts.
        first_token: whether images begin with a token that stands for the whole. (Texts do if the tokenizer puts one.)
    """

    blocks: Mapping[str, str]
    inside: Mapping[str, str]
    outside: Mapping[str, tuple[str, str]]
    prefixes: tuple[str, ...] = ()
    causal: tuple[str, ...] = ()
    head_dim: str = "head_dim"
    ffn_size: str = "intermediate_size"
    first_token: bool = False


def _projections(path: str, query: str, key: str, value: str, output: str, kind: str = "attention") -> dict[str, str]:
    return {
        f"{path}.{query}": f"{kind}.query",
        f"{path}.{key}": f"{kind}.key",
        f"{path}.{value}": f"{kind}.value",
        f"{path}.{output}": f"{kind}.output",
    }


_HEADS = dict.fromkeys(("lm_head", "score", "classifier", "qa_outputs"), ("head", ""))

# What the classifiers of transformers call the module that gives their logits, whatever the family.
CLASSIFIERS = ("classifier", "cls_classifier", "score", "head")

LLAMA = ModuleTable(
    blocks={"": "layers.*"},
    inside={
        "self_attn": "attention",
        **_projections("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        "self_attn.q_norm": "norm",
        "self_attn.k_norm": "norm",
        "mlp": "ffn",
        "mlp.gate_proj": "ffn.gate",
        "mlp.up_proj": "ffn.up",
        "mlp.down_proj": "ffn.down",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
    },
    outside={"embed_tokens": ("embedding", ""), "norm": ("norm", ""), **_HEADS},
    prefixes=("model.", "transformer."),
    causal=("",),
)

GPT2 = ModuleTable(
    blocks={"": "h.*"},
    inside={
        "attn": "attention",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.output",
        "crossattention": "cross",
        "crossattention.q_attn": "cross.query",
        "crossattention.c_attn": "cross.kv",
        "crossattention.c_proj": "cross.output",
        "mlp": "ffn",
        "mlp.c_fc": "ffn.up",
        "mlp.c_proj": "ffn.down",
        "ln_1": "norm",
        "ln_2": "norm",
        "ln_cross_attn": "norm",
    },
    outside={"wte": ("embedding", ""), "wpe": ("embedding", ""), "ln_f": ("norm", ""), **_HEADS},
    prefixes=("transformer.",),
    causal=("",),
    ffn_size="n_inner",
)

BERT = ModuleTable(
    blocks={"": "encoder.layer.*"},
    inside={
        "attention.self": "attention",
        **_projections("attention", "self.query", "self.key", "self.value", "output.dense"),
        "attention.output.LayerNorm": "norm",
        "crossattention.self": "cross",
        **_projections("crossattention", "self.query", "self.key", "self.value", "output.dense", "cross"),
        "crossattention.output.LayerNorm": "norm",
        "intermediate.dense": "ffn.up",
        "output.dense": "ffn.down",
        "output.LayerNorm": "norm",
    },
    outside={
        "embeddings": ("embedding", ""),
        "pooler": ("pooler", ""),
        "pooler.dense": ("pooler", ""),
        "cls": ("head", ""),
        "cls.predictions.transform.dense": ("head", ""),
        "cls.predictions.decoder": ("head", ""),
        "cls.seq_relationship": ("head", ""),
        **_HEADS,
    },
    prefixes=("bert.",),
    head_dim="attention_head_size",
)
ROBERTA = replace(
    BERT,
    outside={
        **BERT.outside,
        **dict.fromkeys(("lm_head.dense", "lm_head.decoder", "classifier.dense", "classifier.out_proj"), ("head", "")),
    },
    prefixes=("roberta.",),
)
# The first matrix of a feed-forward part gives the values and their gate at once.
MODERNBERT = ModuleTable(
    blocks={"": "layers.*"},
    inside={
        "attn": "attention",
        "attn.Wqkv": "attention.qkv",
        "attn.Wo": "attention.output",
        "mlp": "ffn",
        "mlp.Wi": "ffn.up",
        "mlp.Wo": "ffn.down",
        "attn_norm": "norm",
        "mlp_norm": "norm",
    },
    outside={
        "embeddings": ("embedding", ""),
        "final_norm": ("norm", ""),
        "head": ("head", ""),
        "head.dense": ("head", ""),
        "decoder": ("head", ""),
        **_HEADS,
    },
    prefixes=("model.",),
)

_T5_FFN = {
    "DenseReluDense": "ffn",
    "DenseReluDense.wi": "ffn.up",
    "DenseReluDense.wi_0": "ffn.gate",
    "DenseReluDense.wi_1": "ffn.up",
    "DenseReluDense.wo": "ffn.down",
}
T5 = ModuleTable(
    blocks={"encoder": "encoder.block.*", "decoder": "decoder.block.*"},
    inside={
        "layer.*.SelfAttention": "attention",
        **_projections("layer.*.SelfAttention", "q", "k", "v", "o"),
        "layer.*.EncDecAttention": "cross",
        **_projections("layer.*.EncDecAttention", "q", "k", "v", "o", "cross"),
        **{f"layer.*.{path}": role for path, role in _T5_FFN.items()},
        "layer.*.layer_norm": "norm",
    },
    outside={
        "shared": ("embedding", ""),
        "encoder.embed_tokens": ("embedding", "encoder"),
        "decoder.embed_tokens": ("embedding", "decoder"),
        "encoder.final_layer_norm": ("norm", "encoder"),
        "decoder.final_layer_norm": ("norm", "decoder"),
        "classification_head": ("head", ""),
        **_HEADS,
    },
    prefixes=("transformer.",),
    causal=("decoder",),
    head_dim="key_value_proj_dim",
    ffn_size="d_ff",
)

_VISION_LAYER = {
    "attention": "attention",
    **_projections("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": "ffn",
    "mlp.fc1": "ffn.up",
    "mlp.fc2": "ffn.down",
    "layernorm_before": "norm",
    "layernorm_after": "norm",
}
VIT = ModuleTable(
    blocks={"": "layers.*"},
    inside=_VISION_LAYER,
    outside={
        "embeddings": ("embedding", ""),
        "layernorm": ("norm", ""),
        "pooler": ("pooler", ""),
        "pooler.dense": ("pooler", ""),
        "cls_classifier": ("head", ""),
        "distillation_classifier": ("head", ""),
        "decoder": ("head", ""),
        **_HEADS,
    },
    prefixes=("vit.", "deit."),
    first_token=True,
)
# The decoder of a masked auto-encoder is thrown away after pre-training: all of it is head.
VIT_MAE = replace(
    VIT,
    outside={
        **VIT.outside,
        **dict.fromkeys(("decoder.decoder_embed", "decoder.decoder_pred", "decoder.decoder_norm"), ("head", "")),
        **{f"decoder.decoder_layers.*.{path}": ("head", "") for path in _VISION_LAYER},
    },
)
SWIN = ModuleTable(
    blocks={"": "encoder.layers.*.blocks.*"},
    inside=_VISION_LAYER,
    outside={
        "embeddings": ("embedding", ""),
        "layernorm": ("norm", ""),
        "decoder": ("head", ""),
        "encoder.layers.*.downsample": ("downsample", ""),
        "encoder.layers.*.downsample.reduction": ("downsample", ""),
        **_HEADS,
    },
    prefixes=("swin.",),
)

_CLIP_LAYER = {
    "self_attn": "attention",
    **_projections("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    "mlp": "ffn",
    "mlp.fc1": "ffn.up",
    "mlp.fc2": "ffn.down",
    "layer_norm1": "norm",
    "layer_norm2": "norm",
}
_CLIP_TEXT = {"embeddings": "embedding", "final_layer_norm": "norm"}
_CLIP_VISION = {"embeddings": "embedding", "pre_layrnorm": "norm", "post_layernorm": "norm"}
CLIP = ModuleTable(
    blocks={"text": "text_model.encoder.layers.*", "vision": "vision_model.encoder.layers.*"},
    inside=_CLIP_LAYER,
    outside={
        **{f"text_model.{path}": (role, "text") for path, role in _CLIP_TEXT.items()},
        **{f"vision_model.{path}": (role, "vision") for path, role in _CLIP_VISION.items()},
        "text_projection": ("projection", "text"),
        "visual_projection": ("projection", "vision"),
        **_HEADS,
    },
    causal=("text",),
)
CLIP_TEXT = ModuleTable(
    blocks={"": "encoder.layers.*"},
    inside=_CLIP_LAYER,
    outside={**{path: (role, "") for path, role in _CLIP_TEXT.items()}, "text_projection": ("projection", "")},
    prefixes=("text_model.",),
    causal=("",),
)
CLIP_VISION = ModuleTable(
    blocks={"": "encoder.layers.*"},
    inside=_CLIP_LAYER,
    outside={
        **{path: (role, "") for path, role in _CLIP_VISION.items()},
        "visual_projection": ("projection", ""),
        **_HEADS,
    },
    prefixes=("vision_model.",),
)

# `model_type` of config.json -> table. Each of them is checked against a real model in tests/axes.
MODULES: dict[str, ModuleTable] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mistral": LLAMA,
    "gpt2": GPT2,
    "bert": BERT,
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
    "modernbert": MODERNBERT,
    "t5": T5,
    "vit": VIT,
    "deit": VIT,
    "vit_mae": VIT_MAE,
    "swin": SWIN,
    "clip": CLIP,
    "clip_text_model": CLIP_TEXT,
    "clip_vision_model": CLIP_VISION,
}
