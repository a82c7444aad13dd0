"""Rules of thumb, in words: what the sizes of changes suggest for the methods that read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# |delta| of ordinary fine-tuning and of continued pre-training (DARE, arXiv:2311.03099).
DARE_MOSTLY, DARE_WITHIN, DARE_TOO_LARGE = 0.002, 0.005, 0.01
ALREADY_SPARSE = 0.5


def sparsification(quantiles: Mapping[float, float], unchanged: float) -> str:
    """Whether most of a task vector can be dropped and the rest rescaled.

    Args:
        quantiles: share of entries -> the |delta| that they do not exceed, for 0.05, 0.9, 0.99 and others.
        unchanged: share of entries that did not change at all.
    """
    if unchanged == 1.0:
        return "nothing changed: this model is its base"
    if not all(math.isfinite(v) for v in quantiles.values()):
        return "not every change is finite: repair the model first"
    few, most, nearly_all = quantiles[0.05], quantiles[0.9], quantiles[0.99]
    figures = f"90 % of the changes are within {most:.2g}, 99 % within {nearly_all:.2g}"
    if most < DARE_MOSTLY and nearly_all <= DARE_WITHIN:
        verdict = "dropping 90 % and rescaling (DARE) is expected to work"
    elif few > DARE_TOO_LARGE:
        figures = f"95 % of the changes exceed {few:.2g}"
        verdict = "as large as those of continued pre-training, DARE is not expected to work"
    else:
        verdict = "larger than ordinary fine-tuning: try DARE at low drop rates and evaluate"
    if unchanged > ALREADY_SPARSE:
        verdict += f"; {unchanged:.0%} of the entries did not change, so dropping more counts twice"
    return f"{figures}: {verdict}"


def layer_swap(task: Sequence[float | None], language: Sequence[float | None]) -> tuple[int, int]:
    """(bottom, top): the outer layers in which the language expert changed more than the task expert.

    Each profile is mean |delta| per layer, and is compared relative to its own mean over the layers. (0, 0) if there
    are no layers, if a profile is unknown or zero, or if the language expert changes most nowhere or everywhere.
    """
    a, b = ([x or 0.0 for x in profile] for profile in (task, language))
    if not a or not sum(a) or not sum(b):
        return 0, 0
    more = [y / sum(b) > x / sum(a) for x, y in zip(a, b, strict=True)]
    bottom = next((i for i, m in enumerate(more) if not m), len(more))
    top = next((i for i, m in enumerate(reversed(more)) if not m), len(more))
    return (0, 0) if bottom == len(more) else (bottom, top)
