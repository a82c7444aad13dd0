"""Smaller models of an architecture, to be trained: of random weights, or of some parts of a trained one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from regraft.axes.module_map import modules_of
from regraft.errors import UserError
from regraft.methods import Options
from regraft.resize.surgery import surgeries_of

_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_ALLOWED: dict[str, tuple[str, ...]] = {
    "weights": (),
    "layers": ("num_layers",),
    "bottom": ("num_layers",),
    "embeddings": ("num_layers", "num_attention_heads", "intermediate_size"),
    "random": _SIZES,
}


class SizeOptions(Options):
    """What the model that is trained is made of: the given one, or another of its architecture."""

    init: Literal["weights", "layers", "bottom", "embeddings", "random"] = Field(
        "weights",
        description="train the model as it is, evenly spaced layers of it, its lowest layers, or random weights "
        "with or without its token embeddings",
    )
    num_layers: int | None = Field(None, ge=1, description="layers of the new model, for any init but weights")
    hidden_size: int | None = Field(None, ge=1, description="its width, for init: random")
    num_attention_heads: int | None = Field(
        None, ge=1, description="its heads, for random weights; as wide as those of the model if not given"
    )
    intermediate_size: int | None = Field(
        None, ge=1, description="its feed-forward width, for random weights; in proportion to the width if not given"
    )

    @model_validator(mode="after")
    def _sizes_fit_init(self) -> SizeOptions:
        given = [name for name in _SIZES if getattr(self, name) is not None]
        allowed = _ALLOWED[self.init]
        if wrong := [name for name in given if name not in allowed]:
            raise ValueError(f"{wrong[0]} has no place with init: {self.init}")
        if self.init in ("layers", "bottom") and not given:
            raise ValueError(f"init: {self.init} needs num_layers")
        return self


def student_of(model: Any, options: SizeOptions, seed: int) -> Any:
    """The model to train; the given one itself with init: weights.

    Args:
        model: a dense transformers model.
        seed: of random weights.

    Raises:
        UserError: RG303 for sizes that do not go together, RG208 for layers of a family that is not known, RG309 for a
            compressed model.
    """
    if options.init == "weights":
        return model
    if surgeries_of(model.config):
        raise UserError("RG309", "another size of a compressed model", fix="take the dense model")
    if options.init == "random" and not any(getattr(options, name) for name in _SIZES):
        return _random(model, copy.deepcopy(model.config), seed)
    if len(modules_of(model).blocks) != 1:
        raise UserError("RG309", "another size of a model with several stacks of layers", fix="use init: weights")
    if hasattr(model.config, "depths"):
        what = f"another size of a {model.config.model_type} model, whose stages differ in width"
        raise UserError("RG309", what, fix="use init: weights")
    config = copy.deepcopy(model.config)
    depth = config.num_hidden_layers
    layers = options.num_layers or depth
    if options.init in ("layers", "bottom") and layers > depth:
        raise UserError("RG303", f"{layers} layers of a model that has {depth}", fix="give a smaller num_layers")
    config.num_hidden_layers = layers
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    if options.init in ("random", "embeddings"):
        _resize(config, options, modules_of(model).ffn_size)
    student = _random(model, config, seed)
    if options.init == "layers":
        _copy(model, student, chosen_layers(depth, layers))
    elif options.init == "bottom":
        _copy(model, student, list(range(layers)))
    elif options.init == "embeddings":
        _copy_embeddings(model, student)
    return student


def with_classes(model: Any, labels: Sequence[str], seed: int) -> Any:
    """A classifier of texts on the body of a language model. What the body lacks, head and pooler, begins at random.

    Raises:
        UserError: RG309 for an architecture without such a classifier.
    """
    import transformers

    config = copy.deepcopy(model.config)
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    config.problem_type = "single_label_classification"
    known = transformers.AutoModelForSequenceClassification
    if type(config) not in known._model_mapping:
        raise UserError("RG309", f"a {config.model_type} model cannot classify texts", fix="take another architecture")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = known.from_config(config, dtype=model.dtype)
    body = model.base_model.state_dict()
    lacking = classifier.base_model.load_state_dict(body, strict=False)
    assert not [name for name in lacking.missing_keys if "pooler" not in name]
    return classifier.eval()


def _random(model: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)._from_config(config, dtype=model.dtype).eval()


def _copy_embeddings(model: Any, student: Any) -> None:
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)


def chosen_layers(depth: int, layers: int) -> list[int]:
    """`layers` of `depth` numbers, evenly spaced, the last one among them."""
    return [-(-(i + 1) * depth // layers) - 1 for i in range(layers)]


def _resize(config: Any, options: SizeOptions, ffn_size: str) -> None:
    old, heads = config.hidden_size, config.num_attention_heads
    width = options.hidden_size or old
    inner = getattr(config, ffn_size, None)
    config.hidden_size = width
    if options.intermediate_size is not None:
        setattr(config, ffn_size, options.intermediate_size)
    elif inner:
        setattr(config, ffn_size, max(1, round(inner * width / old)))
    new_heads = options.num_attention_heads or max(1, heads * width // old)
    if width % new_heads:
        what = f"a width of {width} cannot be split into {new_heads} heads"
        raise UserError("RG303", what, fix="change hidden_size or num_attention_heads")
    config.num_attention_heads = new_heads
    groups = getattr(config, "num_key_value_heads", None)
    if groups:
        each = max(1, heads // groups)
        config.num_key_value_heads = new_heads // each if new_heads % each == 0 else new_heads
    if isinstance(getattr(config, "head_dim", None), int):
        config.head_dim = width // new_heads


def _copy(model: Any, student: Any, chosen: list[int]) -> None:
    """The student's weights from those of the model: block i from block chosen[i], everything else as it is."""
    whole, small = modules_of(model).blocks, modules_of(student).blocks
    names = dict(zip(next(iter(small.values())), (next(iter(whole.values()))[i] for i in chosen), strict=True))
    state, values = student.state_dict(), model.state_dict()
    for name in state:
        block = next((b for b in names if name.startswith(b + ".")), "")
        source = names[block] + name[len(block) :] if block else name
        state[name] = values[source]
    student.load_state_dict(state)
