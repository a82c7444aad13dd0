"""Counter-based random numbers: a draw depends on (seed, model, tensor name, element) and on nothing else.

The same mask therefore comes out for any chunk size, order, number of workers or device, which a shared generator
cannot promise. The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014) on a 64-bit counter; each
64-bit word gives two elements.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _key(seed: int, model: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{model}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_xor_(x: Tensor, by: int) -> Tensor:
    """x ^= x >>> by (logical shift: torch's >> on int64 is arithmetic)."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (64 - by)) - 1))


def bits(seed: int, model: int, name: str, start: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform int32 over the full range for elements `[start, start + length)` of a tensor, shape (length,)."""
    first, last = start // 2, (start + length + 1) // 2
    x = torch.arange(first, last, dtype=torch.int64, device=device)
    x.mul_(_GOLDEN).add_(_key(seed, model, name))
    _shift_xor_(x, 30).mul_(_MIX1)
    _shift_xor_(x, 27).mul_(_MIX2)
    _shift_xor_(x, 31)
    return x.view(torch.int32)[start - 2 * first :][:length]


def keep_mask(random_bits: Tensor, density: float) -> Tensor:
    """Bernoulli mask, True with probability `density` (to within 2**-32)."""
    kept = min(round(density * 2**32), 2**32)
    if kept == 0:
        return torch.zeros_like(random_bits, dtype=torch.bool)
    return random_bits <= kept - 1 - 2**31  # the bound itself must fit in 32 bits
