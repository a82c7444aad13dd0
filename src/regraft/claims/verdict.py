"""From figures over seeds to a verdict, by the rule that each claim has fixed.

Effects are paired: each is formed within a seed, from models that share data, base and split, so that what differs
between seeds cancels. The interval is the percentile bootstrap of their mean. With five seeds it is narrower than its
name says (it covers about 85 %), which is why a claim must also reach the smallest effect that counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from regraft.claims.claim import HELD, INCONCLUSIVE, NOT_HELD, Check, Figures
from regraft.inspect.intervals import bootstrap


@dataclass(frozen=True)
class Finding:
    """What became of one check: the effect of each seed, their mean, its interval, and the verdict on it."""

    says: str
    effects: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None
    least: float
    beyond: float
    decides: bool
    percent: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(check: Check, figures: Sequence[Figures]) -> Finding:
    """One check over the figures of one or more seeds."""
    effects = np.array([check.effect(one) for one in figures])
    mean = float(effects.mean())
    interval = bootstrap(len(effects), lambda drawn: float(effects[drawn].mean()))
    verdict = INCONCLUSIVE
    if interval is not None:
        low, high = interval
        if low > check.beyond and mean >= check.least:
            verdict = HELD
        elif high < check.least:
            verdict = NOT_HELD
    return Finding(
        check.says,
        tuple(effects.tolist()),
        mean,
        interval,
        check.least,
        check.beyond,
        check.decides,
        check.percent,
        verdict,
    )


def overall(findings: Sequence[Finding]) -> str:
    """Held if everything that decides is held; not held if something that decides is not; else inconclusive."""
    verdicts = {finding.verdict for finding in findings if finding.decides}
    if NOT_HELD in verdicts:
        return NOT_HELD
    return HELD if verdicts == {HELD} else INCONCLUSIVE


def values_of(name: str, seeds: Mapping[str, Figures]) -> list[float]:
    """One figure over the seeds that have it."""
    return [figures[name] for figures in seeds.values() if name in figures]
