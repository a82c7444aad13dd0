"""Karcher mean: the direction in the middle of all models on the sphere, with the mean of their norms.

Each tensor is flattened and divided by its norm. From the normalised average on, the mean m moves along

    v = (1/N) Σ (angle(m, uᵢ) / sin angle) · (uᵢ − ⟨m, uᵢ⟩ m),   m ← cos‖v‖ m + sin‖v‖ v / ‖v‖

until ‖v‖ is below `tol`, at most `max_iter` times: the point with the least sum of squared angles to all. The result is
m times the mean norm. Use it for several models without a known base, where a plain average would be shorter than each
of them; for two models of equal norm it is `slerp` at t = 0.5. All models count the same.

Every m is a weighted sum of the models, so the iteration needs only their inner products. Siblings that are close are
averaged linearly but for the last digits. Tensors of zeros have no direction and lower the mean norm, as in mergekit,
which also takes those with a norm below `tol` for zeros.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from regraft.merge.consensus import blended
from regraft.merge.rule import Copy, Steps, Unit, rule
from regraft.merge.statistics import Gram, models
from regraft.methods import Options, Paper


class KarcherOptions(Options):
    max_iter: int = Field(10, ge=0, description="most iterations")
    tol: float = Field(1e-5, gt=0, description="length of a step at which the iteration ends, in radians")


@rule(
    summary="mean of the models' directions on the sphere, with the mean of their norms",
    options=KarcherOptions,
    compiled=lambda _: True,
    papers=[
        Paper("Functionality-Oriented LLM Merging on the Fisher-Rao Manifold", "Wang, Ye, Yin", "2026", "2603.04972")
    ],
)
def karcher(unit: Unit[KarcherOptions]) -> Steps:
    if unit.n == 1:
        return Copy(0)
    (gram,) = yield [Gram(models)]
    norms = np.sqrt(gram.diagonal())
    moving = np.flatnonzero(norms > 0)
    if len(moving) == 0:
        return Copy(0)
    lengths = norms[moving]
    cosines = gram[moving][:, moving] / np.outer(lengths, lengths)
    mean, iterations = _mean(cosines, unit.options)
    unit.note(iterations=iterations)
    weights = np.zeros_like(norms)
    weights[moving] = norms.mean() * mean / lengths
    return blended(weights.tolist(), has_base=False)


def _mean(cosines: np.ndarray, o: KarcherOptions) -> tuple[np.ndarray, int]:
    """Coefficients of the mean of unit vectors with these inner products, (n,), and how many steps it took."""

    def length(x: np.ndarray) -> float:
        return math.sqrt(max(float(x @ cosines @ x), 0.0))

    n = len(cosines)
    mean = np.full_like(cosines[0], 1 / n)
    if length(mean) < o.tol:  # they cancel out: from the first one on
        mean = np.zeros_like(mean)
        mean[0] = 1
    mean = mean / length(mean)
    for step in range(o.max_iter):
        dots = np.clip(cosines @ mean, -1, 1)
        sines = np.sqrt(1 - dots**2)
        # One that is where the mean is does not pull, and one on the other side has no direction to pull in.
        pull = np.where(sines < o.tol, 0.0, np.arccos(dots) / np.maximum(sines, o.tol) / n)
        move = pull - (pull @ dots) * mean
        angle = length(move)
        if angle < o.tol:
            return mean, step
        mean = mean * math.cos(angle) + move * (math.sin(angle) / angle)
        mean = mean / length(mean)
    return mean, o.max_iter
