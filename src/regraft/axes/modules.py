"""The modules of a model: parts with layers of their own, by the names that mergekit's recipes give them.

A family of several modules has a table here, with the names of mergekit's file on that family. For a family without
one mergekit takes the names of the tensors: with one stack of layers the whole model is the module `default`; with
several, each stack is a module by its path (`text_model.encoder.layers`), and all that is left is `default`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from regraft.axes.layout import Layout

DEFAULT = "default"


@dataclass(frozen=True)
class Module:
    """How the names of a module's tensors begin ("" for all that no other module claims; the longest counts).

    `count`: keys of config.json that may hold its number of layers, dotted for nested configurations.
    """

    starts: tuple[str, ...]
    count: tuple[str, ...] = ()


def _beside_a_tower(tower: str) -> dict[str, Module]:
    """A language model with a projector and a vision tower, as transformers has spelt them."""
    return {
        "text_decoder": Module(
            ("language_model.", "model.language_model.", "lm_head."), ("text_config.num_hidden_layers",)
        ),
        "multi_modal_projector": Module(("multi_modal_projector.", "model.multi_modal_projector.")),
        tower: Module((f"{tower}.", f"model.{tower}."), ("vision_config.num_hidden_layers",)),
    }


_QWEN_TEXT = Module(("model.", "language_model.", "lm_head."), ("text_config.num_hidden_layers", "num_hidden_layers"))
_QWEN_VISION = Module(("visual.", "model.visual."), ("vision_config.depth",))
_QWEN2_VL = {
    "text_decoder": _QWEN_TEXT,
    "multi_modal_projector": Module(("visual.merger.", "model.visual.merger.")),
    "vision_tower": _QWEN_VISION,
}
_QWEN3_VL = {
    "text_decoder": _QWEN_TEXT,
    "multi_modal_projector": Module(
        tuple(f"{path}{name}." for path in ("visual.", "model.visual.") for name in ("merger", "deepstack_merger_list"))
    ),
    "vision_tower": _QWEN_VISION,
}

# `model_type` of config.json -> its modules, names without what a model with a head puts before its base model's.
MODULES: dict[str, Mapping[str, Module]] = {
    "t5": {
        "decoder": Module(("decoder.",), ("num_decoder_layers",)),
        "encoder": Module(("encoder.",), ("num_layers",)),
        "shared": Module(("",)),
    },
    "whisper": {
        "decoder": Module(("model.decoder.", "decoder.", "proj_out."), ("decoder_layers",)),
        "encoder": Module(("model.encoder.", "encoder."), ("encoder_layers",)),
    },
    "gemma3": _beside_a_tower("vision_tower"),
    "mistral3": _beside_a_tower("vision_tower"),
    "llama4": _beside_a_tower("vision_model"),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
}


class Modules:
    """The modules of one model, from its configuration, its layout and the names of its tensors.

    Attributes:
        names: of the modules that have tensors, in the order of the table.
        layers: module -> (stack of the layout, key of config.json with its number of layers), for those whose layers
            are known.
        strays: tensors that belong to none of them.
    """

    def __init__(self, config: Mapping[str, Any], own: Layout, tensors: Collection[str]) -> None:
        table = MODULES.get(own.family) or _by_path(own, tensors)
        self._of = {name: _longest(table, own.bare(name)) for name in tensors}
        there = set(self._of.values())
        self.names = tuple(name for name in table if name in there)
        self.strays = tuple(name for name, module in self._of.items() if not module)
        self.layers: dict[str, tuple[str, str]] = {}
        for name, module in self._of.items():
            place = own.place(name)
            if place.layer is None or not module or module in self.layers:
                continue
            known = own.layer_count_key.get(place.stack)
            right = [key for key in table[module].count if _at(config, key) == own.stacks[place.stack]]
            if key := known or next(iter(right), ""):
                self.layers[module] = (place.stack, key)

    def of(self, tensor: str) -> str:
        """The module of a tensor of the model; "" if it is in none, or the model has no such tensor."""
        return self._of.get(tensor, "")


def _by_path(own: Layout, tensors: Collection[str]) -> dict[str, Module]:
    """What names alone tell: a module per stack of layers, if there are several, and `default`."""
    paths: dict[str, None] = {}
    for name in tensors:
        if own.place(name).layer is not None:
            paths.setdefault(own.path(name))
    if len(paths) < 2:
        return {DEFAULT: Module(("",))}
    return {**{path: Module((own.bare(f"{path}."),)) for path in paths}, DEFAULT: Module(("",))}


def _longest(table: Mapping[str, Module], name: str) -> str:
    found = [(len(start), module) for module, one in table.items() for start in one.starts if name.startswith(start)]
    return max(found, default=(0, ""))[1]


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None if there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
