"""Counter-based random numbers: a draw depends on (seed, model, tensor name, element) and on nothing else.

The same mask therefore comes out for any chunk size, order, number of workers or device, which a shared generator
cannot promise. The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014) on a 64-bit counter; each
64-bit word gives 16 bits to four elements. A draw has 32 bits: the upper half from one stream of words, the lower half
from another, which a mask needs only where the upper half alone does not decide.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from regraft.merge.kernels import array, bit_array, fused

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def keys(seed: int, model: int, name: str) -> tuple[int, int]:
    """The keys of the two streams of a tensor, unsigned 64-bit."""
    digest = hashlib.blake2b(f"{seed}\0{model}\0{name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _shift_xor_(x: Tensor, by: int) -> Tensor:
    """x ^= x >>> by (logical shift: torch's >> on int64 is arithmetic)."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (64 - by)) - 1))


def _halves(key: int, start: int, length: int, device: torch.device | str) -> Tensor:
    """The 16 bits that one stream has for elements `[start, start + length)`, as int32 in [0, 65536)."""
    first, last = start // 4, (start + length + 3) // 4
    x = torch.arange(first, last, dtype=torch.int64, device=device)
    x.mul_(_GOLDEN).add_(key - (1 << 64) if key >> 63 else key)
    _shift_xor_(x, 30).mul_(_MIX1)
    _shift_xor_(x, 27).mul_(_MIX2)
    _shift_xor_(x, 31)
    return x.view(torch.int16)[start - 4 * first :][:length].to(torch.int32) & 0xFFFF


def bits(seed: int, model: int, name: str, start: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform int32 over the full range for elements `[start, start + length)` of a tensor, shape (length,)."""
    upper, lower = (_halves(key, start, length, device) for key in keys(seed, model, name))
    return ((upper - (1 << 15)) << 16) | lower


def keep_mask(random_bits: Tensor, density: float) -> Tensor:
    """Bernoulli mask, True with probability `density` (to within 2**-32)."""
    kept = kept_below(density)
    if kept == 0:
        return torch.zeros_like(random_bits, dtype=torch.bool)
    return random_bits <= kept - 1 - 2**31  # the bound itself must fit in 32 bits


def drop(
    values: Tensor, density: float, factor: float, out: Tensor, *, seed: int, model: int, name: str, start: int
) -> None:
    """out = values * factor where `keep_mask` of the elements' `bits` is True, else 0; both of shape (L,).

    Args:
        values: elements `[start, start + L)` of the tensor `name`, float32 or float64.
        density: probability that an element is kept, in (0, 1].
    """
    kept = kept_below(density)
    if kept == 2**32:
        torch.mul(values, factor, out=out)
    elif fused(values, out) and start % 4 == 0:
        from regraft.merge.native_random import keep_drawn

        first, second = (np.uint64(key) for key in keys(seed, model, name))
        given = array(values)
        keep_drawn(given, first, second, start, np.uint64(kept), given.dtype.type(factor), out.numpy())
    else:
        keep = keep_mask(bits(seed, model, name, start, len(values), values.device), density)
        torch.where(keep, values * factor, torch.zeros_like(values), out=out)


def drop_by_rank(
    values: Tensor,
    width: int,
    density: float,
    epsilon: float,
    out: Tensor,
    *,
    divide: bool,
    seed: int,
    model: int,
    name: str,
    start: int,
) -> None:
    """Drop elements at random, small ones more often; `values` and `out` are whole rows of `width`, one after another.

    The element with the r-th smallest magnitude of its row (from 0; equal ones by their place) is kept with the
    probability `density - epsilon + 2 epsilon r / (width - 1)`, and divided by it if `divide`.

    Args:
        values: elements `[start, start + L)` of the tensor `name`, float32 or float64. Ranks are those of the
            magnitudes in float32.
        density, epsilon: with `density - epsilon` > 0 and `density + epsilon` <= 1.
    """
    low, step = chances(density, epsilon, width)
    if fused(values, out):
        from regraft.merge.native_random import keep_ranked

        first, second = (np.uint64(key) for key in keys(seed, model, name))
        narrow = bit_array(values.to(torch.float32))
        keep_ranked(array(values), narrow, width, first, second, start, low, step, divide, out.numpy())
        return
    order = values.to(torch.float32).abs().view(-1, width).argsort(dim=1, stable=True)
    places = torch.arange(width, device=values.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places).view(-1)
    chance = low + step * rank.to(torch.float64)
    draws = bits(seed, model, name, start, len(values), values.device).to(torch.float64) + 2.0**31
    scaled = values / chance.to(values.dtype) if divide else values
    torch.where(draws < chance * 2.0**32, scaled, torch.zeros_like(values), out=out)


def chances(density: float, epsilon: float, width: int) -> tuple[float, float]:
    """The probability of the smallest element of a row, and by how much that of the next in rank is larger."""
    return (density - epsilon, 2 * epsilon / (width - 1)) if width > 1 else (density, 0.0)


def kept_below(density: float) -> int:
    """The bound, in [0, 2**32], below which a 32-bit draw keeps an element."""
    return min(round(density * 2**32), 2**32)
