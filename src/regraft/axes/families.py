"""The tables: where the tensors of each family of models belong. A new family is a new table; no code changes.

Names are those of checkpoints on disk, written without the prefix that a model with a head puts before its base
model ("model.", "bert.", ...). A table's name stands for all tensors below it ("attn" for "attn.c_proj.weight"), "*"
stands for one component, and the longest match counts. This is the only place of regraft that knows parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Stack:
    """A pile of equal layers: `<path>.<number>.<rest>`.

    Attributes:
        paths: where the layers are; more than one if versions of transformers write different ones.
        count: the key of config.json with the number of layers, dotted for nested configurations.
    """

    paths: tuple[str, ...]
    count: str


@dataclass(frozen=True)
class Outside:
    """A tensor outside the layers: its role ("embedding", "head", "norm" or ""), its side of the stack, its stack."""

    role: str
    position: str  # "before" | "after" | "inside" (neither)
    stack: str = ""


@dataclass(frozen=True)
class Family:
    """One table.

    Attributes:
        stacks: name of each stack ("" for the only one) -> where it is.
        outside: names outside the layers.
        inside: names inside a layer -> "attention", "ffn" or "norm".
        prefixes: what may stand before the base model's names.
        buffers: exact names of stored constants, outside or inside a layer.
        transposed: exact names, inside a layer, of matrices that are stored (inputs, outputs).
        tied: (alias, canonical) pairs of full names; they share one tensor where the configuration ties embeddings.
        always_tied: pairs that share one tensor whatever the configuration says.
        ties_by_default: what a missing `tie_word_embeddings` means.
        tokens: the embedding of tokens, one row each.
        vocabulary: tensors with an entry per token -> the dimension along which these are counted.
        vocabulary_size: the key of config.json with the number of these entries, dotted for nested configurations.
        positions: how the model knows positions: "rotary", "learned", "relative".
        padded_positions: the table of learned positions has rows before the first one, up to the padding token's id.
        of_the_stack: names inside the first layer that all layers of the stack use, and no other layer has.
    """

    stacks: Mapping[str, Stack]
    outside: Mapping[str, Outside]
    inside: Mapping[str, str]
    prefixes: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    always_tied: tuple[tuple[str, str], ...] = ()
    ties_by_default: bool = False
    tokens: str = ""
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    vocabulary_size: str = "vocab_size"
    positions: str = ""
    padded_positions: bool = False
    of_the_stack: Mapping[str, bool] = field(default_factory=dict)


_EMBEDDING = Outside("embedding", "before")
_BEFORE = Outside("", "before")
_AFTER = Outside("", "after")
_NORM = Outside("norm", "after")
_HEAD = Outside("head", "after")


def _by_row(*names: str) -> dict[str, int]:
    """Tensors whose first dimension counts tokens."""
    return dict.fromkeys(names, 0)


# Heads that transformers puts on any base model.
_HEADS = dict.fromkeys(("lm_head", "score", "classifier", "qa_outputs"), _HEAD)

LLAMA = Family(
    stacks={"": Stack(("layers",), "num_hidden_layers")},
    outside={"embed_tokens": _EMBEDDING, "norm": _NORM, **_HEADS},
    inside={
        "self_attn": "attention",
        "self_attn.q_norm": "norm",
        "self_attn.k_norm": "norm",
        "mlp": "ffn",
        "block_sparse_moe": "ffn",
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
        "pre_feedforward_layernorm": "norm",
        "post_feedforward_layernorm": "norm",
    },
    prefixes=("model.", "transformer."),
    buffers=("rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq"),
    tied=(("lm_head.weight", "embed_tokens.weight"),),
    tokens="embed_tokens.weight",
    vocabulary=_by_row("embed_tokens.weight", "lm_head.weight", "lm_head.bias"),
    positions="rotary",
)
_LLAMA_TIED = replace(LLAMA, ties_by_default=True)

GPT2 = Family(
    stacks={"": Stack(("h",), "n_layer")},
    outside={"wte": _EMBEDDING, "wpe": _EMBEDDING, "ln_f": _NORM, "multiple_choice_head": _HEAD, **_HEADS},
    inside={
        "attn": "attention",
        "crossattention": "attention",
        "mlp": "ffn",
        "ln_1": "norm",
        "ln_2": "norm",
        "ln_cross_attn": "norm",
    },
    prefixes=("transformer.",),
    buffers=("attn.bias", "attn.masked_bias", "crossattention.bias", "crossattention.masked_bias"),
    transposed=(
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "crossattention.c_attn.weight",
        "crossattention.q_attn.weight",
        "crossattention.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ),
    tied=(("lm_head.weight", "wte.weight"),),
    ties_by_default=True,
    tokens="wte.weight",
    vocabulary=_by_row("wte.weight", "lm_head.weight"),
    positions="learned",
)

_BERT_LAYER = {
    "attention.self": "attention",
    "attention.output.dense": "attention",
    "attention.output.LayerNorm": "norm",
    "crossattention.self": "attention",
    "crossattention.output.dense": "attention",
    "crossattention.output.LayerNorm": "norm",
    "intermediate": "ffn",
    "output.dense": "ffn",
    "output.LayerNorm": "norm",
}
_BERT_HEADS = {"pooler": _AFTER, "cls": _HEAD, **_HEADS}
_WORDS = "embeddings.word_embeddings.weight"

BERT = Family(
    stacks={"": Stack(("encoder.layer",), "num_hidden_layers")},
    outside={"embeddings": _EMBEDDING, "embeddings.LayerNorm": Outside("norm", "before"), **_BERT_HEADS},
    inside=_BERT_LAYER,
    prefixes=("bert.",),
    buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    tied=(("cls.predictions.decoder.weight", _WORDS), ("cls.predictions.decoder.bias", "cls.predictions.bias")),
    ties_by_default=True,
    tokens=_WORDS,
    vocabulary=_by_row(
        _WORDS, "cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias"
    ),
    positions="learned",
)
ROBERTA = replace(
    BERT,
    prefixes=("roberta.",),
    tied=(("lm_head.decoder.weight", _WORDS), ("lm_head.decoder.bias", "lm_head.bias")),
    vocabulary=_by_row(_WORDS, "lm_head.decoder.weight", "lm_head.decoder.bias", "lm_head.bias"),
    padded_positions=True,
)
ELECTRA = replace(
    BERT,
    outside={
        **BERT.outside,
        "embeddings_project": _BEFORE,
        "generator_predictions": _HEAD,
        "generator_lm_head": _HEAD,
        "discriminator_predictions": _HEAD,
        "sequence_summary": _AFTER,
    },
    prefixes=("electra.",),
    tied=(("generator_lm_head.weight", _WORDS),),
    vocabulary=_by_row(_WORDS, "generator_lm_head.weight", "generator_lm_head.bias"),
)
DISTILBERT = Family(
    stacks={"": Stack(("transformer.layer",), "n_layers")},
    outside={
        "embeddings": _EMBEDDING,
        "embeddings.LayerNorm": Outside("norm", "before"),
        "vocab_transform": _HEAD,
        "vocab_layer_norm": _HEAD,
        "vocab_projector": _HEAD,
        "pre_classifier": _HEAD,
        **_HEADS,
    },
    inside={"attention": "attention", "ffn": "ffn", "sa_layer_norm": "norm", "output_layer_norm": "norm"},
    prefixes=("distilbert.",),
    buffers=("embeddings.position_ids",),
    tied=(("vocab_projector.weight", _WORDS),),
    ties_by_default=True,
    tokens=_WORDS,
    vocabulary=_by_row(_WORDS, "vocab_projector.weight", "vocab_projector.bias"),
    positions="learned",
)

T5 = Family(
    stacks={
        "encoder": Stack(("encoder.block",), "num_layers"),
        "decoder": Stack(("decoder.block",), "num_decoder_layers"),
    },
    outside={
        "shared": _EMBEDDING,
        "encoder.embed_tokens": Outside("embedding", "before", "encoder"),
        "decoder.embed_tokens": Outside("embedding", "before", "decoder"),
        "encoder.final_layer_norm": Outside("norm", "after", "encoder"),
        "decoder.final_layer_norm": Outside("norm", "after", "decoder"),
        "classification_head": _HEAD,
        **_HEADS,
    },
    inside={
        "layer.*.SelfAttention": "attention",
        "layer.*.EncDecAttention": "attention",
        "layer.*.DenseReluDense": "ffn",
        "layer.*.layer_norm": "norm",
    },
    prefixes=("transformer.",),
    tied=(("lm_head.weight", "shared.weight"),),
    always_tied=(("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight")),
    ties_by_default=True,
    tokens="shared.weight",
    vocabulary=_by_row("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    positions="relative",
    of_the_stack={"layer.*.SelfAttention.relative_attention_bias": True},
)

VIT = Family(
    stacks={"": Stack(("encoder.layer", "layers"), "num_hidden_layers")},
    outside={
        "embeddings": _EMBEDDING,
        "layernorm": _NORM,
        "pooler": _AFTER,
        "decoder": _HEAD,
        "cls_classifier": _HEAD,
        "distillation_classifier": _HEAD,
        **_HEADS,
    },
    inside={
        "attention": "attention",
        "intermediate": "ffn",
        "output": "ffn",
        "mlp": "ffn",
        "layernorm_before": "norm",
        "layernorm_after": "norm",
    },
    prefixes=("vit.", "deit."),
    positions="learned",
)

_CLIP_LAYER = {"self_attn": "attention", "mlp": "ffn", "layer_norm1": "norm", "layer_norm2": "norm"}


def _tower(prefix: str, stack: str, tensors: Mapping[str, Outside]) -> dict[str, Outside]:
    return {prefix + name: replace(outside, stack=stack) for name, outside in tensors.items()}


_CLIP_TEXT = {"embeddings": _EMBEDDING, "final_layer_norm": _NORM}
_CLIP_VISION = {"embeddings": _EMBEDDING, "pre_layrnorm": Outside("norm", "before"), "post_layernorm": _NORM}
CLIP = Family(
    stacks={
        "text": Stack(("text_model.encoder.layers",), "text_config.num_hidden_layers"),
        "vision": Stack(("vision_model.encoder.layers",), "vision_config.num_hidden_layers"),
    },
    outside={
        **_tower("text_model.", "text", _CLIP_TEXT),
        **_tower("vision_model.", "vision", _CLIP_VISION),
        "text_projection": Outside("", "after", "text"),
        "visual_projection": Outside("", "after", "vision"),
        "logit_scale": _AFTER,
        **_HEADS,
    },
    inside=_CLIP_LAYER,
    buffers=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    tokens="text_model.embeddings.token_embedding.weight",
    vocabulary=_by_row("text_model.embeddings.token_embedding.weight"),
    vocabulary_size="text_config.vocab_size",
    positions="learned",
)
CLIP_TEXT = Family(
    stacks={"": Stack(("encoder.layers",), "num_hidden_layers")},
    outside={**_CLIP_TEXT, "text_projection": _AFTER},
    inside=_CLIP_LAYER,
    prefixes=("text_model.",),
    buffers=("embeddings.position_ids",),
    tokens="embeddings.token_embedding.weight",
    vocabulary=_by_row("embeddings.token_embedding.weight"),
    positions="learned",
)
CLIP_VISION = replace(
    CLIP_TEXT,
    outside={**_CLIP_VISION, "visual_projection": _AFTER, **_HEADS},
    prefixes=("vision_model.",),
    tokens="",
    vocabulary={},
)

# `model_type` of config.json -> table. Each of them is checked against a real model in tests/axes.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "granite": LLAMA,
    "mixtral": LLAMA,
    "gemma": _LLAMA_TIED,
    "gemma2": _LLAMA_TIED,
    "gemma3_text": _LLAMA_TIED,
    "smollm3": _LLAMA_TIED,
    "gpt2": GPT2,
    "bert": BERT,
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
    "electra": ELECTRA,
    "distilbert": DISTILBERT,
    "t5": T5,
    "mt5": T5,
    "vit": VIT,
    "deit": VIT,
    "clip": CLIP,
    "clip_text_model": CLIP_TEXT,
    "clip_vision_model": CLIP_VISION,
}
