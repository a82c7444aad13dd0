"""The contract of a claim: one file `claims/NN_slug.py` with a `CLAIM = Claim(...)`, fixed before it is run.

A claim runs an experiment once per seed and gives figures (name -> number). What the figures must show is written as
`Check`s: an effect per seed, formed from figures of the same seed and so paired, and the smallest mean that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from regraft.methods import Paper

if TYPE_CHECKING:
    from regraft.claims.paper_scale import Inputs

SCALES = ("laptop", "smoke", "paper")
HELD, NOT_HELD, INCONCLUSIVE, NOT_JUDGED = "held", "not held", "inconclusive", "not judged"

Figures: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Check:
    """One thing that the figures must show. Over the seeds, with the 95 % bootstrap interval of the mean effect:

    - held: the interval lies above `beyond` and the mean reaches `least`;
    - not held: the interval lies below `least`;
    - inconclusive: anything else, as with fewer than two seeds.

    Attributes:
        says: the expectation as a sentence.
        effect: one number from the figures of a seed; larger is more of what is expected.
        least: the smallest mean effect that counts.
        beyond: what the interval must exclude; 0 unless losing a little is allowed (then both are negative).
        decides: whether the claim's verdict depends on it; premises and side findings are only told.
        percent: whether the effect is a share, shown in points of a hundred.
    """

    says: str
    effect: Callable[[Figures], float]
    least: float
    beyond: float = 0.0
    decides: bool = True
    percent: bool = True


@dataclass(frozen=True)
class Row:
    """A row of a claim's plot: its label, the figure that it shows, and the group that it stands in."""

    label: str
    figure: str
    group: str = ""


@dataclass(frozen=True)
class Plot:
    """What a claim's plot shows: figures over seeds, one row each."""

    title: str
    rows: tuple[Row, ...]
    percent: bool = True


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An experiment and what it must show.

    Attributes:
        title: short name.
        paper: where the claim comes from; `paper.number` names the claim.
        sentence: the claim in one sentence.
        baselines: what the method is compared with, each tuned with as many tries as the method.
        run: seed and scale ("laptop" or "smoke") -> figures, all of them finite.
        checks: the verdict's rule.
        plot: what is drawn.
        at_paper_scale: seed and the user's own models and data -> the same figures, or some of them.
    """

    title: str
    paper: Paper
    sentence: str
    baselines: tuple[str, ...]
    run: Callable[[int, str], Figures]
    checks: tuple[Check, ...]
    plot: Plot
    at_paper_scale: Callable[[int, Inputs], Figures] | None = None

    @property
    def number(self) -> int:
        return self.paper.number
