"""Isotropic merging in common and task-specific subspaces (Iso-CTS): Iso-C with directions of each task's own.

    Σᵢ δᵢ = U Σ Vᵀ               its c leading directions are the common ones, C = [u₁ … u_c]
    δᵢ − C Cᵀ δᵢ = Uᵢ Σᵢ Vᵢᵀ     the s = (r − c) / n leading ones of what they leave are the task's own
    U⊥, V⊥                       all of them side by side, replaced by the nearest orthonormal ones
    θ = θ₀ + λ · (mean of the r singular values) · U⊥ V⊥ᵀ

with r = min(rows, columns) and c about `common_space_fraction` of it: s is rounded, and the common space gets the
rest. Use it instead of `iso_c` for many or very different tasks, whose small directions the sum hides; with a fraction
of 1 it is `iso_c`. The paper chooses λ on validation data and takes 0.8 as the fraction. Matrices are tensors of two
axes but for embeddings and heads; all else is θ₀ + λ · mean(δᵢ).

This is what the paper and FusionBench compute, whose code fails where n · s is rounded above r; here s is then lower.
Directions in which a matrix has no singular value are left out, as in `iso_c`, and a direction that several tasks have
exactly in common is counted once. What lies in the common space is removed from the left only, the side of a layer's
outputs; layers that are known to be stored transposed (GPT-2) are turned round first. `weight` is not the paper's.
Whole matrices are in memory, as many as there are workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from regraft.merge.consensus import TaskVectorOptions, added
from regraft.merge.spectral import ISOTROPIC, leading, matrix_rule, polar, tolerance

if TYPE_CHECKING:
    from torch import Tensor


class IsoCtsOptions(TaskVectorOptions):
    common_space_fraction: float = Field(
        0.8, ge=0, le=1, description="share of directions that is taken from the sum of task vectors, in [0, 1]"
    )


@matrix_rule(
    summary="directions of the sum and of each task's own, made orthogonal and equally large",
    options=IsoCtsOptions,
    papers=[ISOTROPIC],
)
def iso_cts(tasks: Tensor, o: IsoCtsOptions) -> Tensor:
    n, most = len(tasks), min(tasks.shape[1:])
    own = min(round((most - int(most * o.common_space_fraction)) / n), most // n)
    common = leading(added(tasks), most - n * own)
    parts = [common]
    for task in tasks if own else ():
        rest = task - common.left @ (common.left.T @ task)
        parts.append(leading(rest, own, floor=tolerance(task, torch.linalg.matrix_norm(task))))
    left, _ = polar(torch.cat([part.left for part in parts], 1))
    right, _ = polar(torch.cat([part.right for part in parts], 0))
    size = torch.cat([part.sizes for part in parts]).sum() / most
    return size * (left @ right)
