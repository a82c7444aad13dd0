"""RAM+, tensor by tensor: as `ram`, with the changes that only one model made enlarged by how much it shares.

    λᵢ = 1 + r · min(α, sharedᵢ / uniqueᵢ)
    θ  = θ₀ + λᵢ δᵢ    where model i alone changed the entry
    θ  = θ₀ + mean(δᵢ) where several did, over those

with the numbers of entries of a tensor that model i changed (|δᵢ| > `epsilon`) together with others, and alone. What is
shared is averaged, and so loses size; λ makes up for it in the rest. With the defaults it is at most 1.02.

Use it like `ram`, for models trained by reinforcement learning from one base. "tl" is mergekit's for tensor-local: the
numbers are those of one tensor, not of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field

from regraft.merge.consensus import added, changed
from regraft.merge.overlap import RAM, RamOptions, parted
from regraft.merge.rule import Chunk, Steps, Unit, rule
from regraft.merge.statistics import Sum

if TYPE_CHECKING:
    from torch import Tensor


class RamplusTlOptions(RamOptions):
    r: float = Field(0.1, ge=0, description="how strongly unshared changes are enlarged")
    alpha: float = Field(0.2, ge=0, description="largest ratio of shared to unshared entries that counts")


@rule(
    summary="as ram, with what one model changed enlarged by how much it shares",
    options=RamplusTlOptions,
    rows_beside=24,
    needs_base=True,
    papers=[RAM],
)
def ramplus_tl(unit: Unit[RamplusTlOptions]) -> Steps:
    o = unit.options

    def alone_and_shared(c: Chunk[RamplusTlOptions]) -> Tensor:
        deltas, count = parted(c)
        return torch.cat([(deltas != 0) & (count == 1), (deltas != 0) & (count > 1)]).to(c.dtype)

    (entries,) = yield [Sum(alone_and_shared)]
    alone, shared = entries.reshape(2, unit.n)
    factors = (1 + o.r * np.minimum(shared / np.maximum(alone, 1), o.alpha)).tolist()
    unit.note(enlarged_by=factors)

    def combine(c: Chunk[RamplusTlOptions]) -> Tensor:
        deltas, count = parted(c)
        merged = torch.where(count == 1, added(deltas * c.per_model(factors)), added(deltas) / count.clamp(min=1))
        return changed(c.base, merged)

    return combine
