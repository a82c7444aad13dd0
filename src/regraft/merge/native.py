"""Fused loops over chunks for the processor, compiled on first use and cached on disk (numba).

Each does in one pass what would take torch several, each through memory. They work on flat or (n, L) C-contiguous
arrays in the arithmetic dtype, release the interpreter lock, and compute every element by itself, in the order that
the torch twin in `kernels` has, so that results do not depend on how tensors are cut. Sums over elements are taken
over blocks of fixed length. Floats are handled as their bits where that is faster: a float's bits without the sign
are in the order of its magnitude.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numba import njit

# Elements per tile: a few rows of it stay in the first-level cache.
TILE = 1024


def _forget_stale() -> None:
    """Remove compiled loops that are older than any of these files: numba looks only at the file that a loop is in, and
    not at those from which loops were inlined into it."""
    here = Path(__file__).parent
    newest = max(file.stat().st_mtime_ns for file in here.glob("native*.py"))
    for index in here.glob("__pycache__/native*.nbi"):
        if index.stat().st_mtime_ns < newest:
            index.unlink(missing_ok=True)


with suppress(OSError):  # a folder that cannot be written is not where numba keeps them; or another process was quicker
    _forget_stale()

# Division by zero gives infinity or NaN, as in torch: the check that Python makes would keep loops scalar.
kernel = njit(nogil=True, cache=True, error_model="numpy")
# Sums may be reordered within a block: the machine code is the same for each block, hence so is the result.
_block_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz"})


@kernel
def widen_bf16(raw, out):
    """bfloat16 as uint16 -> float32 as uint32."""
    for k in range(raw.shape[0]):
        out[k] = np.uint32(raw[k]) << np.uint32(16)


@kernel
def widen_bf16_minus(raw, base, out, out_bits):
    """out[i] = raw[i] - base, for bfloat16 as uint16, else float32; `out_bits` is the memory of `out`."""
    length = base.shape[0]
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        reference = base[begin : begin + size]
        for i in range(raw.shape[0]):
            part, bits = raw[i, begin : begin + size], out_bits[i, begin : begin + size]
            values = out[i, begin : begin + size]
            for k in range(size):
                bits[k] = np.uint32(part[k]) << np.uint32(16)
            for k in range(size):
                values[k] -= reference[k]


@kernel
def narrow_bf16(bits, out):
    """float32 as uint32 -> bfloat16 as uint16, to the nearest, ties to even; the largest magnitude's bits."""
    most = np.uint32(0)
    for k in range(bits.shape[0]):
        raw = bits[k]
        size = np.uint32(raw & np.uint32(0x7FFFFFFF))
        most = size if size > most else most
        odd = np.uint32((raw >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint16((raw + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        out[k] = np.uint16(0x7FC0) if size > np.uint32(0x7F800000) else rounded
    return most


@kernel
def largest_bits(bits, mask):
    """Largest `bits & mask`, over unsigned integers of any width."""
    most = bits.dtype.type(0)
    for k in range(bits.shape[0]):
        value = bits.dtype.type(bits[k] & mask)
        most = value if value > most else most
    return most


@kernel
def weighted_sum(rows, weights, out):
    """out = Σ rows[i] · weights[i], in the order of the rows; rows of weight 0 are not looked at."""
    n, length = rows.shape
    total = np.empty(TILE, rows.dtype)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        target = out[begin : begin + size]
        total[:] = 0
        for i in range(n):
            weight, row = weights[i], rows[i, begin : begin + size]
            if weight != 0:
                for k in range(size):
                    total[k] += row[k] * weight
        target[:] = total[:size]


@kernel
def weighted_distance(rows, first, weights, out):
    """out = Σ (rows[i] - first) · weights[i], in the order of the rows; rows of weight 0 are not looked at."""
    n, length = rows.shape
    total = np.empty(TILE, rows.dtype)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        anchor, target = first[begin : begin + size], out[begin : begin + size]
        total[:] = 0
        for i in range(n):
            weight, row = weights[i], rows[i, begin : begin + size]
            if weight != 0:
                for k in range(size):
                    total[k] += (row[k] - anchor[k]) * weight
        target[:] = total[:size]


@kernel
def elect(rows, weights, normalize, out):
    """Weighted sum (mean, if `normalize`) of the entries that have the sign of their column's weighted sum."""
    n, length = rows.shape
    zero, one = rows.dtype.type(0), rows.dtype.type(1)
    # Tiles of their own: the compiler then knows that they do not overlap with the rows.
    total, sign, divisor = np.empty(TILE, rows.dtype), np.empty(TILE, rows.dtype), np.empty(TILE, rows.dtype)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        target = out[begin : begin + size]
        total[:] = zero
        for i in range(n):
            weight, row = weights[i], rows[i, begin : begin + size]
            for k in range(size):
                total[k] += row[k] * weight
        for k in range(size):
            sign[k] = one if total[k] >= zero else -one
            total[k] = zero
            divisor[k] = zero
        for i in range(n):
            weight, row = weights[i], rows[i, begin : begin + size]
            for k in range(size):
                value = row[k] * weight * sign[k]
                total[k] += zero if value < zero else value  # a NaN stays
                divisor[k] += weight if value > zero else zero
        for k in range(size):
            divided = divisor[k] if normalize and divisor[k] != zero else one
            target[k] = total[k] * sign[k] / divided


@kernel
def winners(rows, sizes, sign):
    """sizes = magnitudes of the entries that have the sign of their column's sum, 0 for the others."""
    n, length = rows.shape
    zero, one = rows.dtype.type(0), rows.dtype.type(1)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        total = sign[begin : begin + size]
        for k in range(size):
            total[k] = zero
        for i in range(n):
            row = rows[i, begin : begin + size]
            for k in range(size):
                total[k] += row[k]
        for k in range(size):
            total[k] = one if total[k] >= zero else -one
        for i in range(n):
            row, target = rows[i, begin : begin + size], sizes[i, begin : begin + size]
            for k in range(size):
                value = row[k] * total[k]
                target[k] = zero if value < zero else value  # a NaN stays


@kernel
def changed(base, change, factor, out):
    """out = base + factor · change; where that product is 0 the base keeps its bits."""
    for k in range(base.shape[0]):
        step = change[k] * factor
        out[k] = base[k] + step if step != 0 else base[k]


@kernel
def between(rows, low, high, out):
    """out = entries whose magnitude is in [low[i], high[i]], 0 for the others. A NaN stays."""
    zero = rows.dtype.type(0)
    for i in range(rows.shape[0]):
        row, target, least, most = rows[i], out[i], low[i], high[i]
        for k in range(row.shape[0]):
            size = abs(row[k])
            target[k] = zero if (size < least) | (size > most) else row[k]


@kernel
def variance(rows, out):
    """Population variance over the rows; exactly 0 where they are equal, as distances are to the first one."""
    n, length = rows.shape
    zero, count = rows.dtype.type(0), rows.dtype.type(n)
    mean = np.empty(TILE, rows.dtype)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        first = rows[0, begin : begin + size]
        target = out[begin : begin + size]
        for k in range(size):
            mean[k] = zero
            target[k] = zero
        for i in range(1, n):
            row = rows[i, begin : begin + size]
            for k in range(size):
                mean[k] += row[k] - first[k]
        for k in range(size):
            mean[k] /= count
        for i in range(n):
            row = rows[i, begin : begin + size]
            for k in range(size):
                apart = (row[k] - first[k]) - mean[k]
                target[k] += apart * apart
        for k in range(size):
            target[k] /= count


@_block_kernel
def _sum(values):
    total = 0.0
    for k in range(values.shape[0]):
        total += values[k]
    return total


@_block_kernel
def sum_abs(values):
    total = 0.0
    for k in range(values.shape[0]):
        total += abs(values[k])
    return total


@_block_kernel
def dot(a, b):
    total = 0.0
    for k in range(a.shape[0]):
        total += np.float64(a[k]) * np.float64(b[k])
    return total


@kernel
def block_sums(rows, block, absolute, out):
    """out[i, b] = Σ over block b of rows[i], or of its magnitudes, in float64."""
    n, length = rows.shape
    for i in range(n):
        for b in range(out.shape[1]):
            part = rows[i, b * block : min((b + 1) * block, length)]
            out[i, b] = sum_abs(part) if absolute else _sum(part)


@kernel
def block_grams(rows, block, out):
    """out[b, i, j] = inner product of rows i and j over block b, in float64."""
    n, length = rows.shape
    for b in range(out.shape[0]):
        begin, end = b * block, min((b + 1) * block, length)
        for i in range(n):
            for j in range(i + 1):
                out[b, i, j] = out[b, j, i] = dot(rows[i, begin:end], rows[j, begin:end])


@kernel
def sign_conflicts(rows):
    """(columns in which any entry is not zero, columns with entries of both signs)."""
    n, length = rows.shape
    moved, conflicts = 0, 0
    signs = np.empty(TILE, np.uint32)
    for begin in range(0, length, TILE):
        size = min(TILE, length - begin)
        signs[:] = 0
        for i in range(n):
            row = rows[i, begin : begin + size]
            for k in range(size):
                signs[k] |= np.uint32(row[k] > 0) | (np.uint32(row[k] < 0) << np.uint32(1))
        here, both = np.int32(0), np.int32(0)
        for k in range(size):
            here = np.int32(here + np.int32(signs[k] != 0))
            both = np.int32(both + np.int32(signs[k] == 3))
        moved += here
        conflicts += both
    return moved, conflicts


@kernel
def count_zeros(rows, out):
    """out[i] += entries of rows[i] that are 0."""
    for i in range(rows.shape[0]):
        for begin in range(0, rows.shape[1], TILE):
            part = rows[i, begin : begin + TILE]
            here = np.int32(0)
            for k in range(part.shape[0]):
                here = np.int32(here + np.int32(part[k] == 0))
            out[i] += here


@kernel
def count_low(keys, heads, first, likely, table):
    """table[head - first, lower half] += 1 for keys whose upper half is one of the len(table) that begin at `first`.

    The key `likely` is counted apart: many entries may be equal to it, too many to foresee and too few to expect.
    """
    width = np.uint32(table.shape[0])
    equal = np.int32(0)
    for k in range(keys.shape[0]):
        equal = np.int32(equal + np.int32(keys[k] == likely))
    for k in range(keys.shape[0]):
        offset = np.uint32(heads[k] - first)
        if (offset < width) & (keys[k] != likely):
            table[offset, keys[k] & np.uint32(0xFFFF)] += np.int32(1)
    offset = np.uint32((likely >> np.uint32(16)) - first)
    if offset < width:
        table[offset, likely & np.uint32(0xFFFF)] += equal


@kernel
def tally32(bits, mask, firsts, likely, top, low):
    """Histograms of order-preserving keys of float32 values, given as their bits; `mask` takes off the sign or nothing.

    top[:, head] counts the keys with the upper half `head`, four ways (see `native_sparse.tally`);
    low[r, head - firsts[r], lower half] those whose upper half is one of the low.shape[1] that begin at firsts[r].
    """
    keys, heads = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    one = np.int32(1)
    for begin in range(0, bits.shape[0], TILE):
        part = bits[begin : begin + TILE]
        size = part.shape[0]
        for k in range(size):
            raw = np.uint32(part[k] & mask)
            keys[k] = np.uint32(~raw) if raw >= np.uint32(0x80000000) else np.uint32(raw | np.uint32(0x80000000))
            heads[k] = keys[k] >> np.uint32(16)
        fours = size // 4 * 4
        for k in range(0, fours, 4):
            top[0, heads[k]] += one
            top[1, heads[k + 1]] += one
            top[2, heads[k + 2]] += one
            top[3, heads[k + 3]] += one
        for k in range(fours, size):
            top[0, heads[k]] += one
        for r in range(low.shape[0]):
            count_low(keys[:size], heads[:size], firsts[r], likely[r], low[r])


@kernel
def tally64(bits, shift, heads, tables):
    """tables[s, (key >> shift) & 0xFFFF] counts the keys of float64 values whose bits above those are heads[s]."""
    for k in range(bits.shape[0]):
        raw = bits[k]
        key = ~raw if raw >> np.uint64(63) else raw | np.uint64(0x8000000000000000)
        digits = key >> np.uint64(shift)
        head = digits >> np.uint64(16)
        for s in range(heads.shape[0]):
            if head == heads[s]:
                tables[s, digits & np.uint64(0xFFFF)] += np.int32(1)
