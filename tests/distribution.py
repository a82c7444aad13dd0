"""Whether two random merges have one distribution, as far as one draw of each over very many entries tells.

Entries are drawn independently of one another, so the means of a quantity over them are about normal, and their
difference is judged by the standard error that the entries themselves show. What all entries of a tensor share, the
factor that restores its norm, is a random number too, and its error is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 10  # of entries of like size, as probabilities may depend on it
# Quantity -> the power of the common factor that is in it.
QUANTITIES = {"density": 0, "expectation": 1, "mean size (L1)": 1, "mean square (L2)": 2}


@dataclass(frozen=True)
class Likeness:
    """A quantity in two merges: its means over all entries, and the largest difference in standard errors."""

    quantity: str
    ours: float
    theirs: float
    sigmas: float


def likeness(ours: Tensor, theirs: Tensor, deltas: Tensor, shared_error: float) -> list[Likeness]:
    """Compare two changes of a base, (entries,), made from the same task vectors, (n, entries).

    The means of each quantity are compared over all entries, and over those in each tenth of the sizes of each task
    vector. `shared_error`: relative standard error of a factor that all entries of one merge have in common.
    """
    every = torch.arange(deltas.shape[1])
    groups = [every, *(g for delta in deltas for g in delta.abs().argsort().chunk(GROUPS))]
    direction = deltas.sum(0).sign()
    found = []
    for quantity, power in QUANTITIES.items():
        a, b = (_values(quantity, change.double(), direction) for change in (ours, theirs))
        worst = max(_sigmas(a[group], b[group], power * shared_error) for group in groups)
        found.append(Likeness(quantity, float(a.mean()), float(b.mean()), worst))
    return found


def shared_error(delta: Tensor, chances: Tensor | float) -> float:
    """Relative standard error of the factor that restores the L1 norm of what is kept with these probabilities."""
    sizes = delta.double().abs()
    return float((sizes.square() * chances * (1 - chances)).sum().sqrt() / (sizes * chances).sum())


def _values(quantity: str, change: Tensor, direction: Tensor) -> Tensor:
    return {
        "density": (change != 0).double(),
        "expectation": change * direction,
        "mean size (L1)": change.abs(),
        "mean square (L2)": change.square(),
    }[quantity]


def _sigmas(a: Tensor, b: Tensor, factor_error: float) -> float:
    apart = abs(float(a.mean() - b.mean()))
    own = ((a.var() + b.var()) / len(a)).sqrt()
    error = float(own + 2**0.5 * factor_error * torch.maximum(a.abs().mean(), b.abs().mean()))
    return apart / error if error else float(apart > 0) * float("inf") if apart else 0.0
