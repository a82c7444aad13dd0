"""Random draws as compiled loops for the processor; see `native` for how these are made, and `random` for the draws."""

from __future__ import annotations

import numpy as np

from regraft.merge.native import TILE, kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@kernel
def mix(key, first, words):
    """words[w] = the SplitMix64 finaliser of the counter first + w under a key."""
    for w in range(words.shape[0]):
        z = (np.uint64(first) + np.uint64(w)) * _GOLDEN + key
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        words[w] = z ^ (z >> np.uint64(31))


@kernel
def keep_drawn(row, key, second_key, start, kept, factor, out):
    """out = row · factor where the element's draw (see `random`) is below `kept` of 2**32, else 0.

    The upper half of a draw decides unless it equals that of the bound, once in 65536 times. `start` is a multiple
    of 4.
    """
    zero = row.dtype.type(0)
    words, one = np.empty(TILE // 4, np.uint64), np.empty(1, np.uint64)
    lanes = words.view(np.uint16)
    bound, rest = np.uint16(kept >> np.uint64(16)), np.uint64(kept & np.uint64(0xFFFF))
    for begin in range(0, row.shape[0], TILE):
        size = min(TILE, row.shape[0] - begin)
        mix(key, (start + begin) // 4, words[: (size + 3) // 4])
        part, target = row[begin : begin + size], out[begin : begin + size]
        equal = np.int32(0)
        for k in range(size):
            equal = np.int32(equal + np.int32(lanes[k] == bound))
            target[k] = part[k] * factor if lanes[k] < bound else zero
        if equal:
            for k in range(size):
                if lanes[k] == bound:
                    at = start + begin + k
                    mix(second_key, at // 4, one)
                    if (one[0] >> np.uint64(16 * (at % 4))) & np.uint64(0xFFFF) < rest:
                        target[k] = part[k] * factor


@kernel
def ranks(keys, order, spare, counts, out):
    """out = rank of each 31-bit key among all, from 0; equal keys by their place. A radix sort of three digits.

    `order` and `spare` are int32 of the length of `keys`, `counts` has 2048 entries; they are overwritten.
    """
    length = keys.shape[0]
    for k in range(length):
        order[k] = k
    for digit in range(3):
        shift = np.uint32(11 * digit)
        counts[:] = 0
        for k in range(length):
            counts[(keys[k] >> shift) & np.uint32(0x7FF)] += np.int32(1)
        before = np.int32(0)
        for d in range(counts.shape[0]):
            here = counts[d]
            counts[d] = before
            before += here
        for k in range(length):
            element = order[k]
            d = (keys[element] >> shift) & np.uint32(0x7FF)
            spare[counts[d]] = element
            counts[d] += np.int32(1)
        order, spare = spare, order
    for k in range(length):
        out[order[k]] = k


@kernel
def keep_ranked(values, bits, width, first_key, second_key, start, low, step, divide, out):
    """Row by row of `width`: out = the value where its draw is below low + step · rank, else 0; ranks are those of the
    magnitudes within the row, given by `bits`. What is kept is divided by its probability if `divide`.
    """
    zero = values.dtype.type(0)
    order, spare, rank = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int32)
    counts, keys = np.empty(2048, np.int32), np.empty(width, np.uint32)
    upper, lower = np.empty(width // 4 + 2, np.uint64), np.empty(width // 4 + 2, np.uint64)
    high, rest = upper.view(np.uint16), lower.view(np.uint16)
    for begin in range(0, values.shape[0], width):
        row, target, magnitude = values[begin : begin + width], out[begin : begin + width], bits[begin : begin + width]
        for k in range(width):
            keys[k] = np.uint32(magnitude[k])
        ranks(keys, order, spare, counts, rank)
        at = start + begin
        mix(first_key, at // 4, upper)
        mix(second_key, at // 4, lower)
        lane = at % 4
        for k in range(width):
            draw = np.float64(high[lane + k]) * 65536.0 + np.float64(rest[lane + k])
            chance = low + step * np.float64(rank[k])
            value = row[k] / row.dtype.type(chance) if divide else row[k]
            target[k] = value if draw < chance * 4294967296.0 else zero
