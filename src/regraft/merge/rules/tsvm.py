"""Task Singular Vectors Merging: the leading directions of each task, made orthogonal to those of the others.

    δᵢ ≈ Uᵢ Σᵢ Vᵢᵀ                     the k = ⌊min(rows, columns) / n⌋ largest singular values of each matrix
    U = [U₁ … Uₙ],  V = [V₁ … Vₙ]      side by side; U⊥ and V⊥ are the nearest orthonormal ones
    θ = θ₀ + λ U⊥ diag(Σ₁ … Σₙ) V⊥ᵀ

Use it for several fine-tunes of one base on different tasks, without data; λ = 1 is a good start. Matrices are tensors
of two axes but for embeddings and heads; all else is θ₀ + λ · mean(δᵢ). A single model with all its directions comes
back.

Where implementations differ: the official code takes every tensor of two axes for a matrix, embeddings included, but
the text projection of CLIP, whose name this rule does not know; FusionBench leaves out what it is told to. Both round
k by `int(min · (1 / n))`, which can lose one to floating point, and drop a matrix with fewer rows than models; here at
least one direction of each task is kept. Where tasks share a direction exactly (equal models) it is counted once, with
the mean of its sizes: in the official code the complement, which is arbitrary, adds to the result. `weight` and
`rank_fraction` are not the paper's. Whole matrices are in memory, as many as there are workers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from regraft.merge.consensus import TaskVectorOptions
from regraft.merge.spectral import leading, matrix_rule, polar
from regraft.methods import Paper

if TYPE_CHECKING:
    from torch import Tensor

_SLACK = 1e-9  # of a fraction such as 0.1, which is not exact


class TsvmOptions(TaskVectorOptions):
    rank_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each task's singular values that is kept, in (0, 1]; 1 / number of models by default",
    )


@matrix_rule(
    summary="keep each task's leading singular vectors, made orthogonal to one another",
    options=TsvmOptions,
    papers=[
        Paper(
            "Task Singular Vectors: Reducing Task Interference in Model Merging",
            "Gargiulo et al.",
            "CVPR 2025",
            "2412.00081",
        )
    ],
)
def tsvm(tasks: Tensor, o: TsvmOptions) -> Tensor:
    n, most = len(tasks), min(tasks.shape[1:])
    kept = most // n if o.rank_fraction is None else math.floor(most * o.rank_fraction + _SLACK)
    kept = max(kept, 1)
    if n == 1 and kept == most:
        return tasks[0]
    parts = [leading(task, kept) for task in tasks]
    left, _ = polar(torch.cat([part.left for part in parts], 1))
    sizes = torch.cat([part.sizes for part in parts])
    right, _ = polar(torch.cat([part.right for part in parts], 0))
    return (left * sizes) @ right
