"""Signals from inside a model, captured by role during a pass: hidden states, and queries, keys and values.

Hooks are put on the modules that the family's table names, so that no method knows a family. Kernels such as SDPA and
flash attention hide the probabilities of attention, but not what they are made of: queries, keys and values are caught
where the projections give them, and relations are computed from these. Fused projections are split here. Hooks live for
one pass, hold nothing afterwards, and see gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from regraft.axes.module_map import ModuleMap, classifier_of, modules_of
from regraft.errors import UserError

KINDS = ("last", "block", "block_input", "query", "key", "value", "features")


@dataclass(frozen=True)
class Signal:
    """One thing to look at.

    Attributes:
        kind: all but the last of them (B, T, width): "last" (the base model's last hidden state, behind its last norm),
            "block" and "block_input" (hidden states behind and before a block), "query", "key", "value" (what the
            projection of self-attention gives, with bias, before heads and rotation), or "features" (what goes into the
            head of a classifier; like "last" of a model of any family, whatever stack and block).
        stack: "" for the only stack, else "encoder", "decoder", "text", "vision".
        block: number of the block; negative numbers count from the last one.
    """

    kind: str
    stack: str = ""
    block: int = -1


LAST = Signal("last")


@dataclass
class Seen:
    """What one pass gave: the model, its output, and the signals that were asked for."""

    model: Any
    output: Any
    signals: dict[Signal, Tensor] = field(default_factory=dict)

    def __getitem__(self, signal: Signal) -> Tensor:
        return self.signals[signal]

    @property
    def logits(self) -> Tensor:
        """The head's output.

        Raises:
            UserError: RG309 for a model without a head.
        """
        logits: Tensor | None = getattr(self.output, "logits", None)
        if logits is None:
            what = f"a {type(self.model).__name__} has no logits"
            raise UserError("RG309", what, fix="use a model with a head")
        return logits


def every_block(model: Any) -> list[Signal]:
    """The outputs of all blocks of all stacks, in order."""
    stacks = modules_of(model).blocks
    return [Signal("block", stack, i) for stack, blocks in stacks.items() for i in range(len(blocks))]


def look(model: Any, batch: Mapping[str, Any], signals: Sequence[Signal] = ()) -> Seen:
    """Run a model on the entries of a batch that it takes, and catch the signals.

    Args:
        model: a transformers model, also behind a wrapper for distributed training.
        batch: tensors by name; what the model has no parameter for is not given to it.
        signals: what to look at.

    Raises:
        UserError: RG208 for signals of a family without a table of modules, RG303 for a block that is not there.
    """
    bare = unwrapped(model)
    inputs = {name: value for name, value in batch.items() if name in accepted(type(bare))}
    seen = Seen(bare, None)
    with tapped(bare, signals, seen.signals):
        seen.output = model(**inputs)
    return seen


def unwrapped(model: Any) -> Any:
    """The model within a wrapper for distributed training or compilation."""
    while not hasattr(model, "config") and hasattr(model, "module"):
        model = model.module
    return getattr(model, "_orig_mod", model)


def accepted(kind: Any) -> frozenset[str]:
    """The names of the inputs that a class of models takes."""
    return _inputs(kind)


@lru_cache(maxsize=64)
def _inputs(kind: Hashable) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


@contextmanager
def tapped(model: nn.Module, signals: Sequence[Signal], into: dict[Signal, Tensor]) -> Iterator[None]:
    """Within the context, each pass of the model enters its signals in `into`."""
    handles: list[Any] = []
    try:
        for signal in signals:
            handles.append(_behind_all(model, signal, into) if signal.kind == "last" else _hook(model, signal, into))
        yield
    finally:
        for handle in handles:
            handle.remove()


_READ: WeakKeyDictionary[nn.Module, tuple[int, ModuleMap]] = WeakKeyDictionary()


def _roles(model: nn.Module) -> ModuleMap:
    """The table's reading of a model, made once; a surgery, which changes the number of modules, makes it anew."""
    count = sum(1 for _ in model.modules())
    known = _READ.get(model)
    if known is None or known[0] != count:
        known = _READ[model] = (count, modules_of(model))
    return known[1]


def _behind_all(model: Any, signal: Signal, into: dict[Signal, Tensor]) -> Any:
    """No table is needed for what the base model gives."""

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if state is None:
            what = f"a {type(module).__name__} gives no hidden states"
            raise UserError("RG309", what, fix="take a model of one stack of layers")
        into[signal] = state

    return model.base_model.register_forward_hook(behind)


def _hook(model: nn.Module, signal: Signal, into: dict[Signal, Tensor]) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        into[signal] = args[0] if args else kwargs["hidden_states"]

    if signal.kind == "features":
        if not (head := classifier_of(model)):
            what = f"a {type(model).__name__} has no head whose input could be looked at"
            raise UserError("RG309", what, fix="use a classifier")
        return model.get_submodule(head).register_forward_pre_hook(before, with_kwargs=True)
    roles = _roles(model)
    blocks = roles.blocks.get(signal.stack)
    if blocks is None or not -len(blocks) <= signal.block < len(blocks):
        there = ", ".join(f"{len(b)} in {s or 'its stack'}" for s, b in roles.blocks.items())
        what = f"there is no block {signal.block} in the stack {signal.stack!r}; the model has {there}"
        raise UserError("RG303", what, fix="name a block that is there")
    block = blocks[signal.block]
    if signal.kind == "block_input":
        return model.get_submodule(block).register_forward_pre_hook(before, with_kwargs=True)
    if signal.kind == "block":

        def behind(module: nn.Module, args: Any, output: Any) -> None:
            into[signal] = output[0] if isinstance(output, tuple) else output

        return model.get_submodule(block).register_forward_hook(behind)
    if signal.kind not in KINDS:
        raise ValueError(f"no signal is called {signal.kind}")
    own = roles.part(block, f"attention.{signal.kind}")
    if own:

        def whole(module: nn.Module, args: Any, output: Tensor) -> None:
            into[signal] = output

        return model.get_submodule(own).register_forward_hook(whole)
    fused = roles.part(block, "attention.qkv")
    place = KINDS.index(signal.kind) - KINDS.index("query")

    def third(module: nn.Module, args: Any, output: Tensor) -> None:
        into[signal] = output.chunk(3, dim=-1)[place]

    return model.get_submodule(fused).register_forward_hook(third)
