"""WUDI-Merging: move the sum of task vectors to where it disturbs the inputs of each task least, without data.

    τ = argmin Σᵢ ‖(τ − δᵢ) δᵢᵀ‖² / ‖δᵢ‖²,   θ = θ₀ + λ τ

per linear layer. Gradient descent writes the inputs of a layer into the rows of its task vector, so the rows of δᵢ
stand for the inputs of task i, on which τ should do what δᵢ does. From τ = Σ δᵢ, Adam takes `iterations` steps. Use it
for fine-tunes of one base on different tasks. One model comes back, and so does a task vector whose rows are
orthogonal to those of all others; n equal models start at n times their task vector and move back towards it.

A step moves an entry by at most about `learning_rate`, whatever the size of the task vectors, so how far this gets
depends on that size: sweep it where changes are much larger than 300 · 0.00001. Matrices are tensors of two axes but
for embeddings and heads; all else is θ₀ + λ · mean(δᵢ). FusionBench does so too, but takes embeddings for matrices;
the official code changes nothing but the matrices of attention and feed-forward layers, and one of its files divides
by ‖δᵢ‖ instead of its square. The paper needs no λ. `weight`, the factor of each δᵢ, is not the paper's.

The gradient is computed from Σ δᵢᵀδᵢ / ‖δᵢ‖², which is summed up once, where that takes fewer operations: the same up
to rounding, several times faster. Inputs are the last axis; layers that are known to be stored transposed (GPT-2) are
turned round first. Whole matrices are in memory, as many as there are workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from regraft.merge.consensus import TaskVectorOptions, added
from regraft.merge.spectral import matrix_rule
from regraft.methods import Paper

if TYPE_CHECKING:
    from torch import Tensor

_BETAS = (0.9, 0.999)  # Adam's, as in the official code
_EPSILON = 1e-8


class WudiOptions(TaskVectorOptions):
    iterations: int = Field(300, ge=0, description="steps of Adam")
    learning_rate: float = Field(1e-5, gt=0, description="Adam's learning rate, in the unit of the weights")


@matrix_rule(
    summary="descend from the sum of task vectors to the least interference with each task",
    options=WudiOptions,
    papers=[
        Paper(
            "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
            "Cheng et al.",
            "ICML 2025",
            "2503.08099",
        )
    ],
)
def wudi(tasks: Tensor, o: WudiOptions) -> Tensor:
    total = added(tasks)
    start = torch.zeros_like(total)
    for task in tasks:
        inputs = _normalized(task)
        start.addmm_((total - task) @ inputs.T, inputs, alpha=2)
    if not bool(start.any()):
        return total
    return total + _descended(start, _curvature(tasks), o)


def _normalized(task: Tensor) -> Tensor:
    """A task vector of norm one; one of zeros stays."""
    size = torch.linalg.matrix_norm(task)
    return task / torch.where(size > 0, size, 1)


def _curvature(tasks: Tensor) -> Callable[[Tensor], Tensor]:
    """By how much the gradient changes with a change X of τ, (rows, columns): 2 X Σ δᵢᵀδᵢ / ‖δᵢ‖²."""
    n, rows, columns = tasks.shape
    if columns > 2 * n * rows:
        each = [_normalized(task) for task in tasks]
        return lambda x: added(2 * (x @ inputs.T @ inputs) for inputs in each)
    gram = tasks.new_zeros(columns, columns)
    for task in tasks:
        inputs = _normalized(task)
        gram.addmm_(inputs.T, inputs, alpha=2)
    return lambda x: x @ gram


def _descended(start: Tensor, curvature: Callable[[Tensor], Tensor], o: WudiOptions) -> Tensor:
    """What Adam adds to τ, by itself so that small steps are not rounded; `start` is the gradient before the first."""
    change, mean, square = (torch.zeros_like(start) for _ in range(3))
    first, second = _BETAS
    for step in range(1, o.iterations + 1):
        gradient = curvature(change).add_(start)
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (square / (1 - second**step)).sqrt_().add_(_EPSILON)
        change.addcdiv_(mean, size, value=-o.learning_rate / (1 - first**step))
    return change
