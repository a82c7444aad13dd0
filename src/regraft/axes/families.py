"""One table per model family: which tensors are layers, embeddings, heads and final norms, and what is tied.

Patterns are regular expressions that are searched in the tensor's name, with a group `layer` for the number of the
layer. `^(.*\\.)?` in front lets a name carry the prefix of a class with a head, or none. Names are those that
transformers 5 writes. A new family is a new table; a test builds a small model of each and checks every name.
"""

from __future__ import annotations

from dataclasses import dataclass

_ANY = r"^(?:.*\.)?"


@dataclass(frozen=True)
class Stack:
    """A stack of layers: its name, the pattern of a layer, the config key of their number, the pattern of its part."""

    name: str
    layers: str
    count_key: str
    prefix: str = ""


@dataclass(frozen=True)
class Family:
    """Tensors of a family by role. `after`: outside the layers, on the output side. `ties`: the default of its config."""

    stacks: tuple[Stack, ...]
    embedding: tuple[str, ...]
    head: tuple[str, ...]
    norm: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ties: bool = False


def _decoder(ties: bool = False) -> Family:
    return Family(
        stacks=(Stack("", _ANY + r"layers\.(?P<layer>\d+)\.", "num_hidden_layers"),),
        embedding=(_ANY + r"embed_tokens\.weight$",),
        head=(r"^lm_head\.", r"^score\.", r"^classifier\.", r"^qa_outputs\."),
        norm=(r"^(?:model\.)?norm\.weight$",),
        after=(r"^(?:model\.)?norm\.weight$", r"^lm_head\.", r"^score\.", r"^classifier\.", r"^qa_outputs\."),
        tied=(("lm_head.weight", "embed_tokens.weight"),),
        ties=ties,
    )


_ENCODER_HEADS = (r"^cls\.", r"^lm_head\.", r"^classifier\.", r"^qa_outputs\.")


def _encoder(tied: tuple[tuple[str, str], ...]) -> Family:
    return Family(
        stacks=(Stack("", _ANY + r"encoder\.layer\.(?P<layer>\d+)\.", "num_hidden_layers"),),
        embedding=(_ANY + r"embeddings\.word_embeddings\.weight$",),
        head=_ENCODER_HEADS,
        after=(*_ENCODER_HEADS, _ANY + r"pooler\."),
        tied=tied,
        ties=True,
    )


_BERT = _encoder(
    (
        ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    )
)
_ROBERTA = _encoder(
    (
        ("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    )
)

_GPT2 = Family(
    stacks=(Stack("", r"^(?:transformer\.)?h\.(?P<layer>\d+)\.", "n_layer"),),
    embedding=(r"^(?:transformer\.)?wte\.weight$",),
    head=(r"^lm_head\.", r"^score\.", r"^classifier\.", r"^qa_outputs\."),
    norm=(r"^(?:transformer\.)?ln_f\.",),
    after=(r"^(?:transformer\.)?ln_f\.", r"^lm_head\.", r"^score\.", r"^classifier\.", r"^qa_outputs\."),
    tied=(("lm_head.weight", "wte.weight"),),
    ties=True,
)

_T5 = Family(
    stacks=(
        Stack("encoder", _ANY + r"encoder\.block\.(?P<layer>\d+)\.", "num_layers", _ANY + r"encoder\."),
        Stack("decoder", _ANY + r"decoder\.block\.(?P<layer>\d+)\.", "num_decoder_layers", _ANY + r"decoder\."),
    ),
    embedding=(_ANY + r"shared\.weight$", _ANY + r"embed_tokens\.weight$"),
    head=(r"^lm_head\.", r"^classification_head\.", r"^classifier\.", r"^qa_outputs\."),
    norm=(_ANY + r"final_layer_norm\.weight$",),
    after=(
        _ANY + r"final_layer_norm\.weight$",
        r"^lm_head\.",
        r"^classification_head\.",
        r"^classifier\.",
        r"^qa_outputs\.",
    ),
    tied=(
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.embed_tokens.weight", "shared.weight"),
        ("lm_head.weight", "shared.weight"),
    ),
    ties=True,
)

_VIT = Family(
    stacks=(Stack("", r"^(?:\w+\.)?(?:encoder\.layer|layers|encoder\.layers)\.(?P<layer>\d+)\.", "num_hidden_layers"),),
    embedding=(),
    head=(r"^classifier\.", r"^cls_classifier\.", r"^distillation_classifier\.", r"^decoder\."),
    norm=(r"^(?:\w+\.)?layernorm\.",),
    after=(
        r"^(?:\w+\.)?layernorm\.",
        r"^(?:\w+\.)?pooler\.",
        r"^classifier\.",
        r"^cls_classifier\.",
        r"^distillation_classifier\.",
        r"^decoder\.",
    ),
)

_CLIP = Family(
    stacks=(
        Stack(
            "text", r"^text_model\.(?:encoder\.)?layers\.(?P<layer>\d+)\.", "text_config.num_hidden_layers", r"^text_"
        ),
        Stack(
            "vision",
            r"^vision_model\.(?:encoder\.)?layers\.(?P<layer>\d+)\.",
            "vision_config.num_hidden_layers",
            r"^visi?on|^visual_",
        ),
    ),
    embedding=(r"token_embedding\.weight$",),
    head=(r"^text_projection\.", r"^visual_projection\.", r"^classifier\.", r"^logit_scale$"),
    norm=(r"final_layer_norm\.", r"post_layernorm\."),
    after=(
        r"final_layer_norm\.",
        r"post_layernorm\.",
        r"^text_projection\.",
        r"^visual_projection\.",
        r"^classifier\.",
        r"^logit_scale$",
    ),
)

# By the `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "llama": _decoder(),
    "mistral": _decoder(),
    "qwen2": _decoder(),
    "qwen3": _decoder(),
    "gpt2": _GPT2,
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "t5": _T5,
    "vit": _VIT,
    "deit": _VIT,
    "clip": _CLIP,
}
