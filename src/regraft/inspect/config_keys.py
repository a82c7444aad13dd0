"""Where two configurations differ, and whether that changes what the same weights compute.

A key that is not known to be harmless counts as one that matters: a needless question is cheaper than a silently wrong
model. Files of different versions of transformers spell the same thing differently (`rope_theta` and
`rope_parameters`, defaults left out); before such a difference counts, both files are read by transformers' own
configuration class, which runs none of the model's code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Keys that never change the numbers of a forward pass in evaluation.
_HARMLESS = """
_name_or_path name_or_path transformers_version architectures auto_map torch_dtype dtype use_cache torchscript
return_dict return_dict_in_generate output_attentions output_hidden_states output_scores output_router_logits
gradient_checkpointing attn_implementation _attn_implementation _attn_implementation_autoset
_experts_implementation initializer_range initializer_factor init_std router_aux_loss_coef router_jitter_noise
pretraining_tp n_ctx chunk_size_feed_forward tokenizer_class processor_class finetuning_task
task_specific_params layerdrop encoder_layerdrop decoder_layerdrop pruned_heads tf_legacy_loss use_bfloat16
prefix reorder_and_upcast_attn pad_token_id bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id
unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens
begin_suppress_tokens bad_words_ids max_length min_length max_new_tokens do_sample early_stopping num_beams
num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values
exponential_decay_length_penalty
"""
COSMETIC = frozenset(_HARMLESS.split())
# The tensors themselves show whether embeddings are tied; a merge compares those.
_SHOWN_BY_TENSORS = frozenset({"tie_word_embeddings"})
_LABELS = frozenset({"id2label", "label2id", "num_labels", "problem_type"})
# These use the number of positions in their formula; for other kinds of RoPE it is a statement about training only.
_POSITION_COUNT_COMPUTES = frozenset({"dynamic", "longrope", "su"})
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")


@dataclass(frozen=True)
class Difference:
    """A key (dotted in nested configurations) with its values in two models, None where it is absent.

    `matters`: the same weights compute something else, or their outputs mean something else.
    """

    key: str
    a: Any
    b: Any
    matters: bool


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Where two config.json differ, those that matter first.

    Absent, null and empty are the same. What is only spelt differently, or is a default written out, does not matter.
    """
    raw = _compare(a, b)
    if any(d.matters for d in raw) and a.get("model_type") == b.get("model_type"):
        full_a, full_b = _normalised(a), _normalised(b)
        if full_a is not None and full_b is not None:
            real = [d for d in _compare(full_a, full_b) if d.matters]
            shown = {d.key for d in real} | (set(_ROPE_KEYS) if any(d.key in _ROPE_KEYS for d in real) else set())
            raw = real + [Difference(d.key, d.a, d.b, False) for d in raw if d.key not in shown]
    return sorted(raw, key=lambda d: (not d.matters, d.key))


def _compare(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    found = []
    for key in sorted({*a, *b}):
        mine, theirs = a.get(key), b.get(key)
        if key.endswith("_config") and isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += _compare(mine, theirs, f"{prefix}{key}.")
        elif _plain(mine) != _plain(theirs):
            found.append(Difference(prefix + key, mine, theirs, _matters(key, mine, theirs, a, b)))
    return found


def _matters(key: str, mine: Any, theirs: Any, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if key in COSMETIC or key in _SHOWN_BY_TENSORS or "dropout" in key or key.endswith(("_pdrop", "_drop")):
        return False
    if key.startswith(("summary_", "unsloth_")):
        return False
    if key in _LABELS:
        return not (_has_no_labels(a) or _has_no_labels(b))
    if key == "max_position_embeddings" and _rotary(a) and _rotary(b):
        return bool({_rope_type(a), _rope_type(b)} & _POSITION_COUNT_COMPUTES)
    return True


def _has_no_labels(config: Mapping[str, Any]) -> bool:
    """Whether the classes named are known to have no labelled outputs, so that label maps are only defaults."""
    classes = config.get("architectures") or []
    return bool(classes) and not any("Classification" in str(name) for name in classes)


def _rotary(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in _ROPE_KEYS)


def _rope_type(config: Mapping[str, Any]) -> str:
    for key in _ROPE_KEYS[:2]:
        if isinstance(settings := config.get(key), Mapping):
            return str(settings.get("rope_type") or settings.get("type") or "default")
    return "default"


def _plain(value: Any) -> Any:
    """Values that mean the same as one value: null and empty ones, 1 and 1.0, keys as numbers or texts."""
    if isinstance(value, Mapping):
        entries = {str(k): _plain(v) for k, v in value.items()}
        return {k: v for k, v in entries.items() if v is not None} or None
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value] or None
    return value


def _normalised(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration with defaults, in today's spelling, without keys that its class does not know; None where
    transformers does not know the class or refuses the values."""
    from transformers import CONFIG_MAPPING

    from regraft.checkpoint.model_class import REFUSALS, bounded

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING or config.get("auto_map") or not bounded(config):
        return None
    try:
        cls = CONFIG_MAPPING[kind]
        full = cls.from_dict(copy.deepcopy(dict(config))).to_dict()
        known = {*cls().to_dict(), *_ROPE_KEYS}
    except REFUSALS:
        return None
    # to_dict gives no classes; those of the file say whether there are labels.
    return {key: value for key, value in full.items() if key in known} | {"architectures": config.get("architectures")}
