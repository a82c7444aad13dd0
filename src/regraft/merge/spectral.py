"""Rules that take task vectors for matrices: how they are registered, and what the singular value rules share.

A matrix is a tensor of two axes inside or beside the layers; embeddings, heads and norms are not, nor are convolutions
and experts that are stored in one tensor of three axes. All else gets the mean of the task vectors, as in the official
code of these methods. Matrices are seen as (outputs, inputs), however they are stored.

Directions in which a matrix has no singular value are not unique: what the decomposition gives for them depends on the
library. They are left out here, where official code takes them along. A singular value counts as none up to the
rounding of the decomposition, `eps · longer side · largest`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from regraft.merge.consensus import TaskVectorOptions, added, changed
from regraft.merge.rule import Chunk, Combine, Rule, Unit, rule
from regraft.methods import Paper

if TYPE_CHECKING:
    from torch import Tensor

O = TypeVar("O", bound=TaskVectorOptions)  # noqa: E741

# Tensors that these rules hold beside those per model: a decomposition with its workspace takes seven, and what is kept
# of others meanwhile (the common space, what it leaves of a task) up to four.
_ROWS_BESIDE = 11

ISOTROPIC = Paper(
    "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    "Marczak et al.",
    "ICML 2025",
    "2502.04959",
)


def matrix_rule(
    *, summary: str, options: type[O], papers: Sequence[Paper]
) -> Callable[[Callable[[Tensor, O], Tensor]], Rule[O]]:
    """Register a rule that merges matrices: weighted task vectors (n, outputs, inputs), options -> (outputs, inputs).

    The rule is `base + lambda * merged`, with the mean of the weighted task vectors where a tensor is no matrix.
    """

    def decorate(merge: Callable[[Tensor, O], Tensor]) -> Rule[O]:
        @wraps(merge)
        def last_pass(unit: Unit[O]) -> Combine:
            return _by_matrix(merge)

        register = rule(
            summary=summary,
            options=options,
            papers=papers,
            needs_base=True,
            span=lambda _: "matrices",
            rows_beside=_ROWS_BESIDE,
            in_mergekit=False,
        )
        return register(last_pass)

    return decorate


def _by_matrix(merge: Callable[[Tensor, O], Tensor]) -> Combine:
    def combine(c: Chunk[Any]) -> Tensor:
        o: O = c.options
        tasks = c.deltas if all(w == 1 for w in o.weight) else c.deltas * c.per_model(o.weight)
        if not c.info.is_matrix:
            return changed(c.base, added(tasks) / c.n, o.lambda_)
        if not bool(tasks.isfinite().all()):  # no decomposition takes them
            return torch.full_like(c.base, math.nan)
        matrices = tasks.view(c.n, *c.info.shape)
        if c.info.transposed:
            merged = merge(matrices.transpose(1, 2).contiguous(), o).T
        else:
            merged = merge(matrices, o)
        return changed(c.base, merged.reshape(-1), o.lambda_)

    return combine


class Singular(NamedTuple):
    """Singular values (k,) with their vectors, (rows, k) and (k, columns), in falling order."""

    left: Tensor
    sizes: Tensor
    right: Tensor


def tolerance(matrix: Tensor, largest: Tensor) -> Tensor:
    """Up to where a singular value is rounding, for a matrix whose largest one this is."""
    return largest * (torch.finfo(matrix.dtype).eps * max(matrix.shape))


def leading(matrix: Tensor, count: int, floor: Tensor | None = None) -> Singular:
    """The `count` largest singular values that are none by rounding, or less if the matrix has less.

    Args:
        floor: what is not above it counts as none too, for a matrix that is what is left of a larger one.
    """
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    least = tolerance(matrix, sizes[0])
    if floor is not None:
        least = torch.maximum(least, floor)
    k = min(count, int((sizes > least).sum()))
    return Singular(left[:, :k].clone(), sizes[:k].clone(), right[:k].clone())


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U Vᵀ of a matrix U Σ Vᵀ, the nearest one with orthonormal columns or rows, and all of its singular values."""
    if 0 in matrix.shape:
        return matrix, matrix.new_zeros(0)
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    k = int((sizes > tolerance(matrix, sizes[0])).sum())
    return left[:, :k] @ right[:k], sizes
