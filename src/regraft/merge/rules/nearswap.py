"""Nearswap: take the other model's values where the two are close, and keep the base's where they are far apart.

    w = min(1, t / |θ₁ − θ₀|) per entry;   θ = θ₀ + w (θ₁ − θ₀)

So no entry moves by more than `t`. Use it to add the manner of another model of the same shape to a base that must stay
what it is; published merges of this kind use t around 0.0001. As in mergekit, differences below 1e-6 count as 1e-6,
which matters only for t below that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from regraft.merge.consensus import changed
from regraft.merge.rule import REQUIRED, Chunk, Combine, Unit, rule
from regraft.methods import Options

if TYPE_CHECKING:
    from torch import Tensor


class NearswapOptions(Options):
    t: float = Field(0.0001, ge=0, description="largest change of an entry, in the unit of the weights")


@rule(
    summary="move every entry towards the other model, by at most t",
    options=NearswapOptions,
    needs_base=True,
    max_models=1,
    mergekit_defaults={"t": REQUIRED},
)
def nearswap(unit: Unit[NearswapOptions]) -> Combine:
    def combine(c: Chunk[NearswapOptions]) -> Tensor:
        delta = c.deltas[0]
        weight = (c.options.t / delta.abs().clamp(min=1e-6)).clamp(max=1)
        return changed(c.base, weight * delta)

    return combine
