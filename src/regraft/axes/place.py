"""The vocabulary of a layout: the place of a tensor, and what a way of reading names has to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Place:
    """What one tensor is.

    Attributes:
        layer: number of its layer from 0 at the input; None outside the layers.
        num_layers: how many layers its stack has; None outside the layers.
        stack: "" for the only stack, else "encoder", "decoder", "text", "vision", ...
        role: outside the layers "embedding", "head", "norm"; "buffer" for a stored constant; else "".
        position: "before" or "after" the layers, or "inside" (also for what lies beside them).
        part: inside a layer "attention", "ffn", "norm"; "" if that is not known.
        transposed: whether a matrix is stored (inputs, outputs) instead of (outputs, inputs).
    """

    layer: int | None = None
    num_layers: int | None = None
    stack: str = ""
    role: str = ""
    position: str = "inside"
    part: str = ""
    transposed: bool = False


class Scheme(Protocol):
    """A way to read names: a family's table, or what was inferred."""

    def split(self, name: str) -> tuple[str, str, int, str] | None:
        """(stack, what stands before the number, layer, what stands behind it), or None outside the layers."""
        ...

    def outside(self, name: str) -> Place | None:
        """The place of a tensor outside the layers, None if nothing is known of it."""
        ...

    def part(self, rest: str) -> str | None:
        """What a tensor of a layer is; None if nothing is known of it."""
        ...

    def buffer(self, name: str) -> bool:
        """Whether a name (within a layer, or outside) is that of a stored constant."""
        ...

    def transposed(self, rest: str) -> bool:
        """Whether a tensor of a layer is a matrix that is stored (inputs, outputs)."""
        ...

    def bare(self, name: str) -> str:
        """The name without what a model with a head puts before its base model's names."""
        ...
