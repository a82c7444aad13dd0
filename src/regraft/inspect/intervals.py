"""Intervals for scores: closed form for shares, seeded resampling for the rest. All are two-sided, 95 %.

A small test set says little about which of two models is better; a score without an interval hides that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
RESAMPLES = 1000
_ENTRIES = 20_000_000  # cap on resamples x observations, which bounds the time at some seconds


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's interval for a share of `right` out of `n` > 0: within [0, 1], sensible near 0 and 1 and for small n.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    share, z2 = right / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if right == 0 else centre - half  # exact ends, where rounding would leave 1e-17
    high = 1.0 if right == n else centre + half
    return low, high


def bootstrap(n: int, statistic: Callable[[NDArray[np.int64]], float], *, seed: int = 0) -> tuple[float, float] | None:
    """Percentile interval of a statistic over `n` observations that are drawn again with replacement.

    Args:
        n: number of observations; fewer than two give None.
        statistic: takes indices into the observations, shape (n,), and gives the statistic of that draw; draws for
            which it is not finite are left out.
    """
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = max(100, min(RESAMPLES, _ENTRIES // n))
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)])
    values = values[np.isfinite(values)]
    if len(values) < draws // 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
