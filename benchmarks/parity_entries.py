"""How far entries of two results are apart, and what explains it: ties at a threshold, and what follows from them."""

from __future__ import annotations

import torch
from torch import Tensor

# Thresholds that a rule has for the score of an entry in each model, or in all of them together.
THRESHOLDS = {"ties": 1, "breadcrumbs": 2, "breadcrumbs_ties": 2, "sce": 1}


def distance(a: Tensor, b: Tensor, inputs: Tensor) -> Tensor:
    """How far two results are apart, (L,), in units of the last place of the largest number involved in an entry.

    `inputs` are what the entries were made from, (3, ...) in float64.
    """
    size = torch.cat([inputs, a.double()[None], b.double()[None]]).abs().amax(0)
    unit = torch.finfo(a.dtype).eps * torch.exp2(torch.floor(torch.log2(size.clamp(min=1e-30))))
    return ((a.double() - b.double()).abs() / unit).flatten()


def scores(rule: str, inputs: Tensor) -> Tensor:
    """What a rule selects entries by, (rows, L), of base and two fine-tunes, (3, L)."""
    changes = inputs[1:] - inputs[0]
    return (changes[:1] - changes[1:]).abs() if rule == "sce" else changes.abs()  # two models vary by their distance


def at_threshold(apart: Tensor, rows: Tensor, thresholds: int) -> Tensor:
    """Which of the entries that are apart, (L,), have the score of a threshold and share it with others, (L,).

    Thresholds are not known, but a row has so many of them: each may account for one score.
    """
    explained = torch.zeros_like(apart)
    shared = torch.stack([counts[which] > 1 for which, counts in (_unique(row) for row in rows)])
    left = [thresholds] * len(rows)
    while True:
        best, count = None, 0
        for i, row in enumerate(rows):
            values, counts = row[apart & ~explained & shared[i]].unique(return_counts=True)
            if left[i] and len(values) and int(counts.max()) > count:
                best, count = (i, values[counts.argmax()]), int(counts.max())
        if best is None:
            return explained
        i, score = best
        left[i] -= 1
        explained |= apart & (rows[i] == score)


def follows(a: Tensor, b: Tensor, inputs: Tensor, tied: Tensor) -> Tensor:
    """Which entries, (L,), are in both results, to one unit, those of SCE for the entries that this result has kept.

    Args:
        inputs: base and two fine-tunes in float64.
        tied: which entries share the score of the threshold, (L,).
    """
    score = scores("sce", inputs.flatten(1))[0]
    threshold = score[tied][0]
    found = torch.ones_like(tied)
    for result in (a, b):
        changed = (result.double() != inputs[0]).flatten()
        kept = (score > threshold) | ((score == threshold) & changed)
        expected = sce_of(inputs.flatten(1), kept).view(inputs.shape[1:]).to(result.dtype)
        found &= distance(result, expected, inputs) <= 1
    return found


def sce_of(models: Tensor, kept: Tensor) -> Tensor:
    """SCE's merge, (L,), of a base and its fine-tunes, (3, L) in float64, given which entries are selected, (L,)."""
    changes = (models[1:] - models[0]) * kept
    sizes = changes.square().mean(1)
    weights = sizes / sizes.sum() if sizes.sum() >= 1e-6 else torch.full_like(sizes, 1 / len(sizes))
    sign = torch.where(changes.sum(0) >= 0, 1.0, -1.0)
    shares = weights[:, None] * (changes.sign() == sign)
    return models[0] + (changes * shares).sum(0) / shares.sum(0).clamp(min=1e-6)


def _unique(row: Tensor) -> tuple[Tensor, Tensor]:
    _, which, counts = row.unique(return_inverse=True, return_counts=True)
    return which, counts
