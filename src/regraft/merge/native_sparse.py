"""Task vectors from the models as they are stored to their merged sum, tile by tile: what most rules do in one pass.

Nothing of the length of a chunk is written but the result; see `native` for how these loops are made, and `sparsify`
and `consensus` for the same in torch. `raw` holds the models and, last, the base: (n + 1, L), bfloat16 as uint16 or
float32. An entry of a task vector is kept if its magnitude is in [low[i], high[i]] and its draw below kept[i] of 2**32,
and multiplied by factors[i]. Where chances[i, 0] is below 1 the draw has to be below chances[i, 0] + chances[i, 1] ·
rank of the magnitude within its row; a tile is a row then.
"""

from __future__ import annotations

import numpy as np

from regraft.merge.native import TILE, count_low, dot, kernel, sign_conflicts, sum_abs
from regraft.merge.native_random import decide_ranked, keep_decided, mix, rank_memory

_ALL = np.uint64(1 << 32)


@kernel
def load(raw, values, bits):
    """values = raw in float32; `bits` is the memory of `values`."""
    if raw.itemsize == 2:
        for k in range(raw.shape[0]):
            bits[k] = np.uint32(raw[k]) << np.uint32(16)
    else:
        for k in range(raw.shape[0]):
            values[k] = raw[k]


@kernel
def difference(raw, base, values, bits):
    """values = raw - base; the number of entries that are 0."""
    load(raw, values, bits)
    zeros = np.int32(0)
    for k in range(raw.shape[0]):
        values[k] -= base[k]
        zeros = np.int32(zeros + np.int32(values[k] == 0))
    return zeros


@kernel
def _select(values, low, high):
    """Entries outside [low, high] become 0; a NaN stays."""
    zero = np.float32(0)
    for k in range(values.shape[0]):
        value = values[k]
        values[k] = zero if (abs(value) < low) | (abs(value) > high) else value


@kernel
def _draw(values, key, second_key, start, kept, words, lanes, one):
    """Entries whose draw is not below `kept` become 0; see `native_random.keep_drawn`. `start` is a multiple of 4."""
    zero = np.float32(0)
    size = values.shape[0]
    bound, rest = np.uint16(kept >> np.uint64(16)), np.uint64(kept & np.uint64(0xFFFF))
    mix(key, start // 4, words[: (size + 3) // 4])
    equal = np.int32(0)
    for k in range(size):
        equal = np.int32(equal + np.int32(lanes[k] == bound))
    if equal:
        for k in range(size):
            if lanes[k] == bound:
                mix(second_key, (start + k) // 4, one)
                if (one[0] >> np.uint64(16 * ((start + k) % 4))) & np.uint64(0xFFFF) >= rest:
                    values[k] = zero
    for k in range(size):
        values[k] = values[k] if lanes[k] <= bound else zero


@kernel
def _note(kept, marks):
    """Decisions, 0 or 1, as bits: eight in each of `marks`, the first in its lowest bit."""
    for j in range(kept.shape[0] // 8):
        byte = np.uint32(0)
        for k in range(8):
            byte |= kept[8 * j + k] << np.uint32(k)
        marks[j] = np.uint8(byte)
    whole = kept.shape[0] // 8 * 8
    if whole < kept.shape[0]:
        byte = np.uint32(0)
        for k in range(whole, kept.shape[0]):
            byte |= kept[k] << np.uint32(k - whole)
        marks[whole // 8] = np.uint8(byte)


@kernel
def _recall(marks, kept):
    """What `_note` made of decisions, as these again."""
    for k in range(kept.shape[0]):
        kept[k] = np.uint32(marks[k >> 3] >> np.uint8(k & 7)) & np.uint32(1)


@kernel
def _choose(values, bits, i, start, chosen, words, memory, marks, known):
    """Model i's tile of the task vector becomes sparse.

    `marks` takes up what was decided by rank, if it has room for it, or tells it if it is `known`.
    """
    low, high, keys, kept, factors, chances, divide = chosen
    if low[i] > 0 or high[i] < np.inf:
        _select(values, low[i], high[i])
    if kept[i] < _ALL:
        _draw(values, keys[i, 0], keys[i, 1], start, kept[i], words[0], words[0].view(np.uint16), words[1])
    if chances[i, 0] < 1:
        if known:
            kept_here = memory[2][: values.shape[0]]
            _recall(marks, kept_here)
            keep_decided(values, kept_here, memory[4], False)
        else:
            kept_here, chance = decide_ranked(
                bits, keys[i, 0], keys[i, 1], start, chances[i, 0], chances[i, 1], memory
            )  # fmt: skip
            if marks.shape[0]:
                _note(kept_here, marks)
            keep_decided(values, kept_here, chance, divide)
    factor = factors[i]
    if factor != 1:
        for k in range(values.shape[0]):
            values[k] *= factor


@kernel
def merge(raw, start, tile, chosen, marks, weights, elect, normalize, scale, zeros, out):
    """out = base + scale · (sum, or elected sum or mean, of the weighted sparse task vectors), float32.

    `chosen` is (low, high, keys, kept, factors, chances, divide), the first six with a row for each model;
    zeros[i] += entries of model i that equal the base's. `marks` are those of an earlier `norms`, or empty.
    """
    n, length = raw.shape[0] - 1, raw.shape[1]
    zero, one = np.float32(0), np.float32(1)
    values, base = np.empty((n, tile), np.float32), np.empty(tile, np.float32)
    bits, base_bits = values.view(np.uint32), base.view(np.uint32)
    total, sign, divisor = np.empty(tile, np.float32), np.empty(tile, np.float32), np.empty(tile, np.float32)
    words, memory = (np.empty(TILE // 4, np.uint64), np.empty(1, np.uint64)), rank_memory(tile)
    no_marks = np.empty(0, np.uint8)
    for begin in range(0, length, tile):
        size = min(tile, length - begin)
        end = begin + size
        load(raw[n, begin:end], base[:size], base_bits[:size])
        total[:] = zero
        for i in range(n):
            row = values[i, :size]
            known = marks.shape[0] > 0
            noted = marks[i, begin // tile] if known else no_marks
            zeros[i] += difference(raw[i, begin:end], base[:size], row, bits[i, :size])
            _choose(row, bits[i, :size], i, start + begin, chosen, words, memory, noted, known)
            weight = weights[i]
            if weight != 0:
                for k in range(size):
                    total[k] += row[k] * weight
        if elect:
            for k in range(size):
                sign[k] = one if total[k] >= zero else -one
                total[k] = zero
                divisor[k] = zero
            for i in range(n):
                row, weight = values[i, :size], weights[i]
                for k in range(size):
                    value = row[k] * weight * sign[k]
                    total[k] += zero if value < zero else value
                    divisor[k] += weight if value > zero else zero
            if normalize:
                for k in range(size):
                    total[k] /= divisor[k] if divisor[k] != zero else one
            for k in range(size):
                total[k] *= sign[k]
        target = out[begin:end]
        for k in range(size):
            step = total[k] * scale
            target[k] = base[k] + step if step != zero else base[k]


@kernel
def norms(raw, start, tile, chosen, marks, block, before, after):
    """before[i, b], after[i, b] = Σ |δ| over block b, of the full and of the sparse task vector, float64.

    What is decided by rank is noted in `marks`, (n, tiles, bytes), if that is not empty.
    """
    n, length = raw.shape[0] - 1, raw.shape[1]
    values, base = np.empty(tile, np.float32), np.empty(tile, np.float32)
    bits, base_bits = values.view(np.uint32), base.view(np.uint32)
    words, memory = (np.empty(TILE // 4, np.uint64), np.empty(1, np.uint64)), rank_memory(tile)
    no_marks = np.empty(0, np.uint8)
    before[:] = 0
    after[:] = 0
    for begin in range(0, length, tile):
        size = min(tile, length - begin)
        end, b = begin + size, begin // block
        load(raw[n, begin:end], base[:size], base_bits[:size])
        for i in range(n):
            difference(raw[i, begin:end], base[:size], values[:size], bits[:size])
            before[i, b] += _magnitude(values[:size])
            noted = marks[i, begin // tile] if marks.shape[0] > 0 else no_marks
            _choose(values[:size], bits[:size], i, start + begin, chosen, words, memory, noted, False)
            after[i, b] += _magnitude(values[:size])


@kernel
def _magnitude(values):
    """Σ |values| in float64, in eight interleaved sums."""
    sums = np.zeros(8, np.float64)
    whole = values.shape[0] // 8 * 8
    for k in range(0, whole, 8):
        for j in range(8):
            sums[j] += abs(values[k + j])
    total = 0.0
    for j in range(8):
        total += sums[j]
    for k in range(whole, values.shape[0]):
        total += abs(values[k])
    return total


@kernel
def tally(raw, firsts, likely, top, low):
    """As `native.tally32` of the magnitudes of all task vectors: firsts and likely (n, r), top (n, ways, bins), low
    (n, r, w, bins).

    Neighbours are counted in tables of their own, four ways: changes of bfloat16 models take few values, and adding to
    one counter again and again waits for it each time.
    """
    n, length = raw.shape[0] - 1, raw.shape[1]
    one = np.int32(1)
    values, base, heads = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.uint32)
    bits, base_bits = values.view(np.uint32), base.view(np.uint32)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        end = begin + size
        load(raw[n, begin:end], base[:size], base_bits[:size])
        for i in range(n):
            difference(raw[i, begin:end], base[:size], values[:size], bits[:size])
            for k in range(size):
                bits[k] |= np.uint32(0x80000000)  # the key of the magnitude: the sign goes, and the top bit is set
                heads[k] = bits[k] >> np.uint32(16)
            counts, fours = top[i], size // 4 * 4
            for k in range(0, fours, 4):
                counts[0, heads[k]] += one
                counts[1, heads[k + 1]] += one
                counts[2, heads[k + 2]] += one
                counts[3, heads[k + 3]] += one
            for k in range(fours, size):
                counts[0, heads[k]] += one
            for r in range(low.shape[1]):
                count_low(bits[:size], heads[:size], firsts[i, r], likely[i, r], low[i, r])


@kernel
def weighted_sum(raw, weights, out):
    """out = Σ weights[i] · raw[i] over as many rows as there are weights, float32; those of weight 0 are not read."""
    length = raw.shape[1]
    row, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits = row.view(np.uint32)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        end = begin + size
        total[:] = np.float32(0)
        for i in range(weights.shape[0]):
            weight = weights[i]
            if weight != 0:
                load(raw[i, begin:end], row[:size], bits[:size])
                for k in range(size):
                    total[k] += row[k] * weight
        out[begin:end] = total[:size]


@kernel
def distance(raw, weights, anchor, origin, out):
    """out = raw[anchor] + Σ weights[i] · (raw[i] - raw[origin]), float32, over as many rows as there are weights.

    An entry that does not change keeps its bits.
    """
    length = raw.shape[1]
    zero = np.float32(0)
    first, row, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    first_bits, row_bits = first.view(np.uint32), row.view(np.uint32)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        end = begin + size
        load(raw[origin, begin:end], first[:size], first_bits[:size])
        total[:] = zero
        for i in range(weights.shape[0]):
            weight = weights[i]
            if weight != 0 and i != origin:
                load(raw[i, begin:end], row[:size], row_bits[:size])
                for k in range(size):
                    total[k] += (row[k] - first[k]) * weight
        if anchor != origin:
            load(raw[anchor, begin:end], first[:size], first_bits[:size])
        target = out[begin:end]
        for k in range(size):
            target[k] = first[k] + total[k] if total[k] != zero else first[k]


@kernel
def widened(raw, base, values, bits, wide):
    """wide = values = raw - base, which is rounded to float32; raw alone if `base` is empty."""
    load(raw, values, bits)
    if base.shape[0]:
        for k in range(raw.shape[0]):
            values[k] -= base[k]
    for k in range(raw.shape[0]):
        wide[k] = values[k]


@kernel
def grams(raw, n, block, out):
    """out[b, i, j] = inner product over block b of rows i and j of the first n, less the last row if it is the n + 1st.

    float64; the sums within a block are taken over tiles.
    """
    length = raw.shape[1]
    values, base, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty((n, TILE), np.float64)
    bits, base_bits = values.view(np.uint32), base.view(np.uint32)
    out[:] = 0
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        end, b = begin + size, begin // block
        origin = base[: size if raw.shape[0] > n else 0]
        if raw.shape[0] > n:
            load(raw[n, begin:end], origin, base_bits[:size])
        for i in range(n):
            widened(raw[i, begin:end], origin, values[:size], bits[:size], wide[i, :size])
            for j in range(i + 1):
                out[b, i, j] += dot(wide[i, :size], wide[j, :size])
    for b in range(out.shape[0]):
        for i in range(n):
            for j in range(i):
                out[b, j, i] = out[b, i, j]


@kernel
def task_vector_sums(raw, block, first, stride, gram, absolute, columns):
    """Sums over those blocks of a tensor whose number is a multiple of `stride`; `first` is the number of raw's first.

    gram += inner products of the task vectors and, last, the base, (n + 1, n + 1) float64, of which the upper half is
    left alone; absolute += magnitudes of the task vectors, (n,) float64; columns += (all, those in which any model
    moved, those in which models moved up and down), int64.
    """
    n, length = raw.shape[0] - 1, raw.shape[1]
    values, wide = np.empty((n, TILE), np.float32), np.empty((n + 1, TILE), np.float64)
    base = np.empty(TILE, np.float32)
    bits, base_bits = values.view(np.uint32), base.view(np.uint32)
    for begin in range(0, length, TILE):
        if (first + begin // block) % stride:
            continue
        size = min(TILE, length - begin)
        end, origin = begin + size, base[:size]
        widened(raw[n, begin:end], base[:0], origin, base_bits[:size], wide[n, :size])
        for i in range(n):
            widened(raw[i, begin:end], origin, values[i, :size], bits[i, :size], wide[i, :size])
            absolute[i] += sum_abs(wide[i, :size])
        for i in range(n + 1):
            for j in range(i + 1):
                gram[i, j] += dot(wide[i, :size], wide[j, :size])
        moved, both = sign_conflicts(values[:, :size])
        columns[0] += size
        columns[1] += moved
        columns[2] += both
