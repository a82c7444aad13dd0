"""SCE's steps as compiled loops for the processor, from the models as they are stored; see `native_sparse`.

The formulas are those of `rules.sce` in float32: `raw` holds the models and, last, the base, and an entry is selected
if its variance over the models is not below `threshold`.
"""

from __future__ import annotations

import numpy as np

from regraft.merge.native import TILE, kernel
from regraft.merge.native_sparse import difference, load


@kernel
def _memory(n):
    """Tiles of the task vectors and the base, as floats and as their bits, and of three rows of floats."""
    values, base = np.empty((n, TILE), np.float32), np.empty(TILE, np.float32)
    return values, values.view(np.uint32), base, base.view(np.uint32), np.empty((3, TILE), np.float32)


@kernel
def _task_vectors(raw, begin, size, memory):
    values, bits, base, base_bits, _ = memory
    n = values.shape[0]
    load(raw[n, begin : begin + size], base[:size], base_bits[:size])
    for i in range(n):
        difference(raw[i, begin : begin + size], base[:size], values[i, :size], bits[i, :size])


@kernel
def _variance(values, mean, out):
    """As `native.variance`, of one tile."""
    n, size = values.shape
    count, first = np.float32(n), values[0]
    for k in range(size):
        mean[k] = np.float32(0)
        out[k] = np.float32(0)
    for i in range(1, n):
        row = values[i]
        for k in range(size):
            mean[k] += row[k] - first[k]
    for k in range(size):
        mean[k] /= count
    for i in range(n):
        row = values[i]
        for k in range(size):
            apart = (row[k] - first[k]) - mean[k]
            out[k] += apart * apart
    for k in range(size):
        out[k] /= count


@kernel
def _select(values, threshold, rows):
    """Entries of a tile whose variance is below the threshold become 0; a NaN stays."""
    if threshold > 0:
        mean, spread = rows[0, : values.shape[1]], rows[1, : values.shape[1]]
        _variance(values, mean, spread)
        for i in range(values.shape[0]):
            row = values[i]
            for k in range(row.shape[0]):
                row[k] *= np.float32(spread[k] >= threshold)


@kernel
def variances(raw, out):
    """Population variance of the task vectors over the models, (L,)."""
    memory = _memory(raw.shape[0] - 1)
    for begin in range(0, raw.shape[1], TILE):
        size = min(TILE, raw.shape[1] - begin)
        _task_vectors(raw, begin, size, memory)
        _variance(memory[0][:, :size], memory[4][0, :size], out[begin : begin + size])


@kernel
def squares(raw, threshold, block, out):
    """out[i, b] = Σ δ² over the selected entries of block b, in float64."""
    memory, sums = _memory(raw.shape[0] - 1), np.empty(8, np.float64)
    values, rows = memory[0], memory[4]
    out[:] = 0
    for begin in range(0, raw.shape[1], TILE):
        size = min(TILE, raw.shape[1] - begin)
        _task_vectors(raw, begin, size, memory)
        _select(values[:, :size], threshold, rows)
        eights = size // 8 * 8
        for i in range(values.shape[0]):
            row = values[i]
            sums[:] = 0
            for k in range(0, eights, 8):
                for lane in range(8):
                    sums[lane] += np.float64(row[k + lane] * row[k + lane])
            total = 0.0
            for lane in range(8):
                total += sums[lane]
            for k in range(eights, size):
                total += np.float64(row[k] * row[k])
            out[i, begin // block] += total


@kernel
def merge(raw, threshold, weights, least, out):
    """out = base + weighted mean of the selected entries that have the sign of their sum; a sum of weights below
    `least` counts as that.
    """
    memory = _memory(raw.shape[0] - 1)
    values, base, rows = memory[0], memory[2], memory[4]
    zero, one = np.float32(0), np.float32(1)
    total, sign, divisor = rows[0], rows[1], rows[2]
    for begin in range(0, raw.shape[1], TILE):
        size = min(TILE, raw.shape[1] - begin)
        _task_vectors(raw, begin, size, memory)
        _select(values[:, :size], threshold, rows)
        for k in range(size):
            total[k] = values[0, k]
        for i in range(1, values.shape[0]):
            row = values[i]
            for k in range(size):
                total[k] += row[k]
        for k in range(size):
            sign[k] = one if total[k] >= zero else -one
            total[k] = zero
            divisor[k] = zero
        for i in range(values.shape[0]):
            row, weight = values[i], weights[i]
            for k in range(size):
                value = row[k] * sign[k]
                value = zero if value < zero else value  # a NaN stays
                share = weight if value > zero else value
                total[k] += value * share
                divisor[k] += share
        target = out[begin : begin + size]
        for k in range(size):
            step = total[k] * sign[k] / (least if divisor[k] < least else divisor[k])
            target[k] = base[k] + step if step != zero else base[k]
