"""The arithmetic of verdicts, against a bootstrap that is computed otherwise: over all resamples there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.claims.claim import HELD, INCONCLUSIVE, NOT_HELD, Check
from regraft.claims.verdict import judge, overall


def difference(least: float, beyond: float = 0.0, decides: bool = True) -> Check:
    return Check("a is better than b", lambda f: f["a"] - f["b"], least, beyond=beyond, decides=decides)


def seeds(effects: list[float]) -> list[dict[str, float]]:
    """Figures whose levels differ far more than their pairs do."""
    return [{"a": 10.0 * i + effect, "b": 10.0 * i} for i, effect in enumerate(effects)]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=5))
def test_interval_is_that_of_all_resamples(effects: list[float]) -> None:
    means = np.mean(list(itertools.product(effects, repeat=len(effects))), axis=1)
    found = judge(difference(0.0), seeds(effects))
    assert found.effects == pytest.approx(effects, abs=1e-9)
    assert found.mean == pytest.approx(np.mean(effects), abs=1e-9)
    assert found.interval is not None
    # A sampled quantile lies between those of somewhat smaller and larger shares of all resamples.
    for end, low, high in ((found.interval[0], 0.005, 0.05), (found.interval[1], 0.95, 0.995)):
        below, above = np.quantile(means, low, method="lower"), np.quantile(means, high, method="higher")
        assert below - 1e-9 <= end <= above + 1e-9


def test_pairing_takes_out_what_seeds_have_in_common() -> None:
    found = judge(difference(0.01), seeds([0.02, 0.03, 0.025, 0.02, 0.03]))
    assert found.verdict == HELD
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] < 0.02  # levels differ by 10


@pytest.mark.parametrize(
    ("effects", "least", "beyond", "verdict"),
    [
        ([0.05, 0.06, 0.04, 0.05, 0.05], 0.01, 0.0, HELD),
        ([0.005, 0.006, 0.004, 0.005, 0.005], 0.01, 0.0, NOT_HELD),  # surely positive, too small to count
        ([-0.05, -0.06, -0.04, -0.05, -0.05], 0.01, 0.0, NOT_HELD),
        ([0.2, -0.1, 0.1, -0.15, 0.1], 0.01, 0.0, INCONCLUSIVE),
        ([0.008, 0.012, 0.008, 0.012, 0.008], 0.01, 0.0, INCONCLUSIVE),  # whether it counts is open
        ([-0.004, -0.006, -0.005, -0.004, -0.005], -0.01, -0.01, HELD),  # a loss that is allowed
        ([-0.02, -0.03, -0.02, -0.03, -0.02], -0.01, -0.01, NOT_HELD),
        ([0.5], 0.01, 0.0, INCONCLUSIVE),  # one seed says nothing
        ([0.02, 0.02], 0.01, 0.0, HELD),
    ],
)
def test_verdicts(effects: list[float], least: float, beyond: float, verdict: str) -> None:
    assert judge(difference(least, beyond), seeds(effects)).verdict == verdict


def test_only_what_decides_decides() -> None:
    good, bad, open_ = [0.05] * 5, [-0.05] * 5, [0.2, -0.2, 0.2, -0.2, 0.1]

    def findings(*pairs: tuple[list[float], bool]) -> list:
        return [judge(difference(0.01, decides=decides), seeds(effects)) for effects, decides in pairs]

    assert overall(findings((good, True), (bad, False))) == HELD
    assert overall(findings((good, True), (bad, True))) == NOT_HELD
    assert overall(findings((good, True), (open_, True))) == INCONCLUSIVE
    assert overall(findings((open_, True), (bad, True))) == NOT_HELD
    assert overall(findings((good, False))) == INCONCLUSIVE  # nothing decides
