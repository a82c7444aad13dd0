"""Take one model's tensors as they are: the rule of layer stacking ("frankenmerges") by slices.

With `slices`, layers of one or several models are stacked into a deeper, shallower or reordered model; the number of
layers in the configuration follows. `scale` multiplies the tensors, by filters those of some modules only. Without
`scale` tensors are copied bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from regraft.merge.rule import Chunk, Combine, Copy, PerModel, Unit, rule
from regraft.methods import Options

if TYPE_CHECKING:
    from torch import Tensor


class PassthroughOptions(Options):
    scale: PerModel[float] = Field((1.0,), description="factor of the tensor")


@rule(
    summary="copy one model's tensors; stacks layers by slices",
    options=PassthroughOptions,
    max_models=1,
    compiled=lambda o: o.scale == (1,),
)
def passthrough(unit: Unit[PassthroughOptions]) -> Combine | Copy:
    (scale,) = unit.options.scale
    if scale == 1:
        return Copy(0)

    def combine(c: Chunk[PassthroughOptions]) -> Tensor:
        return c.models[0] * scale

    return combine
