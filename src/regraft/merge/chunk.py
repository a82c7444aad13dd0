"""What a merge rule sees of a tensor: facts about it, and the same slice of it in every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from regraft.checkpoint.dtypes import DTYPES, dtype_name
from regraft.checkpoint.tensor import BLOCK, StoredRows
from regraft.merge.kernels import differences, widened
from regraft.methods import Options

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from regraft.axes import Layout

V = TypeVar("V")
O = TypeVar("O", bound=Options)  # noqa: E741


@dataclass(frozen=True)
class TensorInfo:
    """What a rule may know of a tensor beside its values.

    `layer` counts from 0 at the input within its `stack` of `num_layers` ("" for the only stack, else "encoder",
    "decoder", "vision", ...); None outside the layers. `role` is "embedding", "head", "norm" or "". A matrix is
    (outputs, inputs), or (inputs, outputs) if it is `transposed`.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    num_layers: int | None = None
    stack: str = ""
    role: str = ""
    transposed: bool = False

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def width(self) -> int:
        """Elements per row: all axes but the first, or the whole of a vector."""
        return max(self.numel // self.shape[0], 1) if len(self.shape) > 1 and self.shape[0] else max(self.numel, 1)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes and is no embedding, head, norm or buffer."""
        return len(self.shape) == 2 and not self.role

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], layout: Layout) -> TensorInfo:
        """The tensor `name` of a model with this layout. Outside the layers `num_layers` is that of its stack."""
        place = layout.place(name)
        depth = place.num_layers or layout.stacks.get(place.stack) or next(iter(layout.stacks.values()), None)
        return cls(name, shape, place.layer, depth, place.stack, place.role, place.transposed)


class Chunk(Generic[O]):
    """Elements `[start, start + L)` of one tensor, in every model, in the arithmetic dtype (float32 or float64).

    Args:
        rows: one row of shape (L,) per model and, if `has_base`, the base's last: of any float dtype as they are
            stored, or as a tensor (n, L), or tensors of several dtypes.
        arithmetic: the arithmetic dtype, "F32" or "F64"; that of `rows` by default.
        block: chunks of this tensor start at multiples of so many elements; what is summed up over a tensor is summed
            over blocks first, so that cutting does not matter.
    """

    def __init__(
        self,
        info: TensorInfo,
        options: O,
        start: int,
        rows: StoredRows | Sequence[Tensor] | Tensor,
        has_base: bool = False,
        arithmetic: str | None = None,
        block: int = BLOCK,
    ) -> None:
        self.info, self.options, self.start, self.has_base = info, options, start, has_base
        self.stored = rows if isinstance(rows, StoredRows) else None
        self._rows = None if isinstance(rows, StoredRows) else rows
        self.n, self.length = len(rows) - has_base, _length(rows)
        self.arithmetic = arithmetic or (rows.dtype if isinstance(rows, StoredRows) else dtype_name(rows[0].dtype))
        self.block = block
        self._base: Tensor | None = None
        self._models: Tensor | None = None
        self._deltas: Tensor | None = None
        self._computed: dict[Any, Any] = {}

    @property
    def rows(self) -> Tensor | Sequence[Tensor]:
        """What was read of the models, then of the base, in the dtypes of the files: (n, L), or a tensor for each."""
        if self._rows is None:
            assert self.stored is not None
            self._rows = self.stored.tensor
        return self._rows

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic dtype."""
        return DTYPES[self.arithmetic]

    @property
    def device(self) -> torch.device:
        return self.rows[0].device

    @property
    def base(self) -> Tensor:
        """The base's elements, shape (L,). Treat as read-only."""
        if not self.has_base:
            raise AttributeError("this merge has no base model")
        if self._base is None:
            self._base = widened(self.rows[self.n : self.n + 1], self.dtype)[0]
        return self._base

    @property
    def models(self) -> Tensor:
        """All models' elements, shape (n, L). Treat as read-only."""
        if self._models is None:
            self._models = widened(self.rows[: self.n], self.dtype)
        return self._models

    @property
    def deltas(self) -> Tensor:
        """Task vectors `models - base`, shape (n, L), formed after upcasting. Treat as read-only."""
        if self._deltas is None:
            self._deltas = differences(self.rows[: self.n], self.base)
        return self._deltas

    def computed(self, f: Callable[[Chunk[O]], V]) -> V:
        """`f(self)`, computed once: several statistics may be about the same values. Treat as read-only."""
        if f not in self._computed:
            self._computed[f] = f(self)
        found: V = self._computed[f]
        return found

    def per_model(self, values: Sequence[float]) -> Tensor:
        """One number per model as a column (n, 1), in the arithmetic dtype."""
        return self.like(values).unsqueeze(1)

    def like(self, values: Sequence[float] | np.ndarray) -> Tensor:
        """Numbers, such as a statistic's result, as a tensor in the arithmetic dtype, on this chunk's device."""
        return torch.as_tensor(values, dtype=self.dtype, device=self.device)

    def random_bits(self, seed: int, model: int) -> Tensor:
        """Uniform int32 for each element, shape (L,): a function of (seed, model, tensor name, element) alone."""
        from regraft.merge.random import bits

        return bits(seed, model, self.info.name, self.start, self.length, self.device)


def _length(rows: StoredRows | Sequence[Tensor] | Tensor) -> int:
    return int((rows.array if isinstance(rows, StoredRows) else rows[0]).shape[-1])
