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
def ranks(keys, packed, spare, counts, out):
    """out = rank of each 31-bit key among all, from 0; equal keys by their place. A radix sort of three digits.

    What is left of a key goes with its place, so that all but the writing is in order. `packed` and `spare` are uint64
    of at least the length of `keys`, `counts` is (3, 2048); they are overwritten.
    """
    length = keys.shape[0]
    mask = np.uint32(_DIGIT - 1)
    counts[:] = 0
    for k in range(length):
        key = keys[k]
        counts[0, key & mask] += np.int32(1)
        counts[1, (key >> np.uint32(11)) & mask] += np.int32(1)
        counts[2, key >> np.uint32(22)] += np.int32(1)
    for digit in range(3):
        before = np.int32(0)
        for d in range(_DIGIT):
            here = counts[digit, d]
            counts[digit, d] = before
            before += here
    first, second, third = counts[0], counts[1], counts[2]
    for k in range(length):
        d = keys[k] & mask
        packed[first[d]] = (np.uint64(keys[k] >> np.uint32(11)) << np.uint64(32)) | np.uint64(k)
        first[d] += np.int32(1)
    for k in range(length):
        d = np.uint32(packed[k] >> np.uint64(32)) & mask
        spare[second[d]] = packed[k]
        second[d] += np.int32(1)
    for k in range(length):
        d = spare[k] >> np.uint64(43)
        out[np.uint32(spare[k])] = third[d]
        third[d] += np.int32(1)


@kernel
def rank_memory(width):
    """What `decide_ranked` needs for rows of that width, to be used again and again."""
    return (
        np.empty((2, width), np.uint64),
        np.empty((3, _DIGIT), np.int32),
        np.empty(width, np.uint32),
        np.empty(width, np.int32),
        np.empty(width, np.float64),
        np.empty((2, width // 4 + 2), np.uint64),
    )


@kernel
def decide_ranked(bits, first_key, second_key, start, low, step, memory):
    """One row: whether the draw of each element is below low + step · rank, with the rank of its magnitude.

    `bits` are the values in float32, of which the rank is taken. Returns the decisions, 0 or 1, and the probabilities
    times 2**32; both lie in `memory`.
    """
    length = bits.shape[0]
    places, counts, all_keys, all_ranks, all_chances, draws = memory
    keys, rank, chance = all_keys[:length], all_ranks[:length], all_chances[:length]
    for k in range(length):
        keys[k] = bits[k] & np.uint32(0x7FFFFFFF)
    ranks(keys, places[0], places[1], counts, rank)
    lane = start % 4
    mix(first_key, start // 4, draws[0, : (lane + length + 3) // 4])
    mix(second_key, start // 4, draws[1, : (lane + length + 3) // 4])
    high, rest = draws[0].view(np.uint16)[lane:], draws[1].view(np.uint16)[lane:]
    for k in range(length):
        chance[k] = (low + step * np.float64(rank[k])) * 4294967296.0
    for k in range(length):
        draw = np.float64(np.int64(np.uint32(high[k]) << np.uint32(16) | np.uint32(rest[k])))
        keys[k] = np.uint32(draw < chance[k])
    return keys, chance


@kernel
def keep_decided(values, kept, chance, divide):
    """values = the value where `kept` is not 0, else 0; divided by its probability `chance` / 2**32 if `divide`."""
    zero, unit = values.dtype.type(0), 1 / 4294967296.0
    if divide:
        for k in range(values.shape[0]):
            values[k] /= values.dtype.type(chance[k] * unit)
    for k in range(values.shape[0]):
        values[k] = values[k] if kept[k] else zero


@kernel
def keep_ranked(values, bits, width, first_key, second_key, start, low, step, divide, out):
    """Rows of `width`, one after another: out = what `decide_ranked` keeps of them, else 0."""
    memory = rank_memory(width)
    out[:] = values
    for begin in range(0, values.shape[0], width):
        end = begin + width
        kept, chance = decide_ranked(bits[begin:end], first_key, second_key, start + begin, low, step, memory)
        keep_decided(out[begin:end], kept, chance, divide)
