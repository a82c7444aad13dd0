"""Isotropic merging in the common subspace (Iso-C): the sum of task vectors, with all its singular values made equal.

    Σᵢ δᵢ = U Σ Vᵀ,   θ = θ₀ + λ · mean(Σ) · U Vᵀ

The sum is dominated by the directions that some tasks have in common or in which they moved far; flattened, the others
count as much. Use it for fine-tunes of one base on different tasks, without data; `iso_cts` also makes room for what
is each task's own. The paper chooses λ on validation data, so sweep it. Matrices are tensors of two axes but for
embeddings and heads; all else is θ₀ + λ · mean(δᵢ).

Where implementations differ: the paper and FusionBench flatten the sum, the version that comes with the code of Task
Singular Vectors the mean, so that its λ is n times this one for matrices; both take embeddings for matrices. The mean
is over all min(rows, columns) singular values, but directions in which the sum has none are left alone here: there
that code adds an arbitrary change of full size, for example in rows that no model has touched. `weight` is not the
paper's. A model merged alone does not come back: its spectrum is flattened. Whole matrices are in memory, as many as
there are workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.merge.consensus import TaskVectorOptions, added
from regraft.merge.spectral import ISOTROPIC, matrix_rule, polar

if TYPE_CHECKING:
    from torch import Tensor


@matrix_rule(
    summary="sum the task vectors, then make all singular values equal", options=TaskVectorOptions, papers=[ISOTROPIC]
)
def iso_c(tasks: Tensor, o: TaskVectorOptions) -> Tensor:
    directions, sizes = polar(added(tasks))
    return directions * sizes.mean()
