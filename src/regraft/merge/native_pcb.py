"""PCB-Merging's scores and its weighted mean as compiled loops for the processor; see `native` for how these are made.

The formulas are those of `rules.pcb` in float32. exp and tanh are computed here, as the C library's take an element at
a time: exp by a polynomial of degree 7 after reduction by powers of two (relative error below 2e-7), tanh by its series
where a whole tile has arguments below 0.1, which is the rule for products of small changes.
"""

from __future__ import annotations

import math

import numpy as np

from regraft.merge.native import TILE, kernel

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.1219444e-4)  # the first has few bits: its product is exact
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer
_EXP = tuple(np.float32(1 / math.factorial(k)) for k in range(8))
_SMALL = np.float32(0.1)
_TANH = (np.float32(-1 / 3), np.float32(2 / 15), np.float32(-17 / 315))


@kernel
def _exp(x, bits, powers):
    """x = exp(x), x <= 0; `bits` and `powers` are one scratch memory as uint32 and float32."""
    c2, c3, c4, c5, c6, c7 = _EXP[2], _EXP[3], _EXP[4], _EXP[5], _EXP[6], _EXP[7]
    one = np.float32(1)
    for k in range(x.shape[0]):
        value = np.float32(-87) if x[k] < np.float32(-87) else x[k]
        whole = (value * _LOG2E + _ROUND) - _ROUND
        r = value - whole * _LN2_HIGH - whole * _LN2_LOW
        x[k] = one + r * (one + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))))
        bits[k] = np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23)
    for k in range(x.shape[0]):
        x[k] *= powers[k]


@kernel
def _tanh(x):
    """x = tanh(x)."""
    small = True
    for k in range(x.shape[0]):
        small &= abs(x[k]) < _SMALL
    if small:
        c0, c1, c2, one = _TANH[0], _TANH[1], _TANH[2], np.float32(1)
        for k in range(x.shape[0]):
            s = x[k] * x[k]
            x[k] *= one + s * (c0 + s * (c1 + s * c2))
    else:
        for k in range(x.shape[0]):
            x[k] = np.float32(math.tanh(x[k]))


@kernel
def scores(rows, low, high, out):
    """out[i] = exp(n (z² - 1)) · tanh(δᵢ Σ δ), with z the magnitude clipped to [low, high] and mapped to [0, 1]."""
    n, length = rows.shape
    zero, one, models = np.float32(0), np.float32(1), np.float32(n)
    total, agree, intra = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits = np.empty(TILE, np.uint32)
    powers = bits.view(np.float32)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        total[:] = zero
        for i in range(n):
            row = rows[i, begin : begin + size]
            for k in range(size):
                total[k] += row[k]
        for i in range(n):
            row, target = rows[i, begin : begin + size], out[i, begin : begin + size]
            least, most = low[i], high[i]
            span = most - least
            divisor = span if span > zero else one
            for k in range(size):
                value = abs(row[k])
                value = least if value < least else value
                value = (most if value > most else value) - least
                value = value / divisor if span > zero else zero
                intra[k] = models * (value * value - one)
                agree[k] = row[k] * total[k]
            _exp(intra[:size], bits[:size], powers[:size])
            _tanh(agree[:size])
            for k in range(size):
                target[k] = intra[k] * agree[k]


@kernel
def mean(rows, weights, low, high, cut, top, factors, out):
    """out = Σ λᵢ sign(δᵢ) aᵢ wᵢ / max(Σ wᵢ, 1e-12): wᵢ are scores mapped so that `cut` is 0 and `top` 1, aᵢ magnitudes
    clipped to [low, high].
    """
    n, length = rows.shape
    zero, one, least_weight = np.float32(0), np.float32(1), np.float32(1e-12)
    above, below = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        target = out[begin : begin + size]
        above[:] = zero
        below[:] = zero
        for i in range(n):
            row, weight = rows[i, begin : begin + size], weights[i, begin : begin + size]
            least, most, start, factor = low[i], high[i], cut[i], factors[i]
            span = top[i] - start
            divisor = span if span > zero else one
            for k in range(size):
                share = (start if weight[k] < start else weight[k]) - start
                share = share / divisor if span > zero else zero
                value = abs(row[k])
                value = least if value < least else value
                value = most if value > most else value
                value = value if row[k] > zero else (-value if row[k] < zero else row[k])
                above[k] += value * share * factor
                below[k] += share
        for k in range(size):
            target[k] = above[k] / (least_weight if below[k] < least_weight else below[k])
