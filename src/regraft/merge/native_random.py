"""Random draws as compiled loops for the processor; see `native` for how these are made, and `random` for the draws."""

from __future__ import annotations

import numpy as np

from regraft.merge.native import TILE, kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)

_DIGIT = 1 << 11  # values of a digit when a row is sorted


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

    `order` and `spare` are int32 of at least the length of `keys`, `counts` has 2048 entries; they are overwritten.
    """
    length = keys.shape[0]
    for k in range(length):
        order[k] = k
    for digit in range(3):
        shift = np.uint32(11 * digit)
        counts[:] = 0
        for k in range(length):
            counts[(keys[k] >> shift) & np.uint32(_DIGIT - 1)] += np.int32(1)
        before = np.int32(0)
        for d in range(counts.shape[0]):
            here = counts[d]
            counts[d] = before
            before += here
        for k in range(length):
            element = order[k]
            d = (keys[element] >> shift) & np.uint32(_DIGIT - 1)
            spare[counts[d]] = element
            counts[d] += np.int32(1)
        order, spare = spare, order
    for k in range(length):
        out[order[k]] = k


@kernel
def rank_memory(width):
    """What `drop_ranked` needs for rows of that width, to be used again and again."""
    return (
        np.empty((3, width), np.int32),
        np.empty(_DIGIT, np.int32),
        np.empty(width, np.uint32),
        np.empty((2, width // 4 + 2), np.uint64),
    )


@kernel
def drop_ranked(values, bits, first_key, second_key, start, low, step, divide, memory, out):
    """One row: out = the value where its draw is below low + step · rank, else 0, with the rank of its magnitude.

    `bits` are the values in float32, of which the rank is taken. What is kept is divided by its probability if
    `divide`. `out` may be `values`.
    """
    zero = values.dtype.type(0)
    length = values.shape[0]
    places, counts, keys, draws = memory
    rank = places[2]
    for k in range(length):
        keys[k] = bits[k] & np.uint32(0x7FFFFFFF)
    ranks(keys[:length], places[0], places[1], counts, rank)
    lane = start % 4
    mix(first_key, start // 4, draws[0, : (lane + length + 3) // 4])
    mix(second_key, start // 4, draws[1, : (lane + length + 3) // 4])
    high, rest = draws[0].view(np.uint16)[lane:], draws[1].view(np.uint16)[lane:]
    for k in range(length):
        draw = np.float64(high[k]) * 65536.0 + np.float64(rest[k])
        chance = low + step * np.float64(rank[k])
        value = values[k] / values.dtype.type(chance) if divide else values[k]
        out[k] = value if draw < chance * 4294967296.0 else zero


@kernel
def keep_ranked(values, bits, width, first_key, second_key, start, low, step, divide, out):
    """`drop_ranked` for rows of `width`, one after another."""
    memory = rank_memory(width)
    for begin in range(0, values.shape[0], width):
        end = begin + width
        drop_ranked(
            values[begin:end], bits[begin:end], first_key, second_key, start + begin, low, step, divide, memory,
            out[begin:end],
        )  # fmt: skip
