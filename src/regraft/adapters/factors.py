"""Low-rank factors of a matrix: truncated singular value decompositions, and exact sums of products.

The best approximation of rank r in the Frobenius norm keeps the r largest singular values (Eckart and Young 1936);
what is lost is the root of the sum of the squares of the others. Large matrices are not decomposed as a whole: a
randomised range finder with subspace iterations (Halko, Martinsson, Tropp 2011, arXiv:0909.4061) finds the leading
part, and the error is always measured on the result, never taken from theory. Draws have a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from regraft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Matrices with a shorter side are decomposed in full.
EXACT_UP_TO = 1024
RANK = 32
# Ranks above this are seldom of use, and a search for energy has to end somewhere.
MAX_RANK = 256
_OVERSAMPLE = 32
_ITERATIONS = 4
_ROWS = 1024


@dataclass(frozen=True)
class Truncation:
    """Where a decomposition ends: at a rank, or at a share of the energy, the sum of the squared singular values.

    Args:
        rank: this many singular values, or fewer where the rest is zero up to rounding; 32 if nothing is given.
        energy: the fewest values that keep this share, in (0, 1], but not more than `max_rank`.
        max_rank: limit for `energy`, 256 if None.

    Raises:
        UserError: RG303 for values out of range, for both `rank` and `energy`, and for `max_rank` without `energy`.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "max_rank"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise UserError("RG303", f"{name} is {value!r}", fix="give a whole number from 1")
        if self.energy is not None and not (type(self.energy) in (int, float) and 0 < self.energy <= 1):
            raise UserError("RG303", f"energy is {self.energy!r}", fix="give a share above 0 and up to 1, such as 0.95")
        if self.rank is not None and self.energy is not None:
            raise UserError("RG303", "both rank and energy are given", fix="give one of them")
        if self.max_rank is not None and self.energy is None:
            raise UserError("RG303", "max_rank is given without energy", fix="give rank, or energy and max_rank")

    @property
    def most(self) -> int:
        """No more singular values than these."""
        return self.rank or RANK if self.energy is None else self.max_rank or MAX_RANK

    def count(self, values: Tensor, total: float) -> int:
        """How many of the descending singular `values` are kept; `total` is the sum of the squares of all."""
        if self.energy is None:
            return min(self.most, values.numel())
        kept = torch.cumsum(values.double().square(), 0)
        # A share of 1 means all, which sums that were rounded may miss by a bit.
        enough = int((kept < self.energy * total * (1 - 1e-12)).sum()) + 1
        return min(enough, self.most, values.numel())


@dataclass(frozen=True)
class Factors:
    """`up @ down`, (out, r) times (r, in): B and A of LoRA, with the scaling folded in."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def turned(self) -> Factors:
        """The factors of the transpose."""
        return Factors(self.down.T, self.up.T)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same on the CPU, rounded to `dtype`."""
        up, down = (t.to("cpu", dtype).contiguous() for t in (self.up, self.down))
        return Factors(up, down)


def decompose(matrix: Tensor, cut: Truncation, noise: float = 0.0) -> Factors:
    """The leading part of a matrix (m, n) in float32 or float64, on its device; at least of rank 1.

    Each factor takes the square root of the singular values, so that both have entries of one size.

    Args:
        noise: singular values up to this are rounding and are not kept.
    """
    shorter = min(matrix.shape)
    width = cut.most + _OVERSAMPLE
    large = shorter > EXACT_UP_TO and 4 * width <= shorter
    left, values, right = _leading(matrix, width) if large else torch.linalg.svd(matrix, full_matrices=False)
    return _kept(left, values, right, cut, square(matrix), noise)


def recompress(factors: Factors, cut: Truncation) -> Factors:
    """The leading part of a product in float64, by QR of its factors: the product itself is never formed."""
    q_up, r_up = torch.linalg.qr(factors.up.double())
    q_down, r_down = torch.linalg.qr(factors.down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return _kept(q_up @ left, values, right @ q_down.T, cut, float(values.square().sum()))


def added(parts: Iterable[tuple[float, Factors]]) -> Factors | None:
    """The exact factors, in float64, of a weighted sum of products; None if it is zero for certain.

    Products with one `down` are added in their `up`, so the rank does not grow; the others are put side by side.
    """
    groups: list[tuple[Tensor, Tensor]] = []
    for weight, one in parts:
        scaled = weight * one.up.double()
        if not (bool(scaled.any()) and bool(one.down.any())):
            continue
        for i, (up, down) in enumerate(groups):
            if down.dtype == one.down.dtype and torch.equal(down, one.down):
                groups[i] = (up + scaled, down)
                break
        else:
            groups.append((scaled, one.down))
    groups = [(up, down) for up, down in groups if bool(up.any())]
    if not groups:
        return None
    return Factors(torch.cat([up for up, _ in groups], 1), torch.cat([down.double() for _, down in groups]))


def size(one: Factors, minus: Factors | None = None) -> float:
    """The Frobenius norm of a product, or of the difference of two, without forming either."""
    up, down = one.up.double(), one.down.double()
    if minus is not None:
        up, down = torch.cat([up, -minus.up.double()], 1), torch.cat([down, minus.down.double()])
    return float((torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T).norm())


def rounding_noise(energy: float, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """A bound on the largest singular value of what rounding to `dtype` does to a matrix.

    Rounding moves an entry by up to half of eps times its size; independent entries of root mean square s make a
    matrix (m, n) of norm s (√m + √n). 0 for 16-bit types, where that bound can exceed all that a light fine-tuning did.

    Args:
        energy: the sum of the squares of the matrix.
    """
    if dtype.itemsize < 4:
        return 0.0
    m, n = shape
    return torch.finfo(dtype).eps / 2 * math.sqrt(energy / (m * n)) * (math.sqrt(m) + math.sqrt(n))


def residual(matrix: Tensor, factors: Factors) -> float:
    """The squared Frobenius norm of `matrix - up @ down`, in groups of rows; sums are in float64."""
    total = 0.0
    down = factors.down.to(matrix.device, matrix.dtype)
    for first in range(0, matrix.shape[0], _ROWS):
        up = factors.up[first : first + _ROWS].to(matrix.device, matrix.dtype)
        total += square(torch.addmm(matrix[first : first + _ROWS], up, down, alpha=-1))
    return total


def square(matrix: Tensor) -> float:
    """The squared Frobenius norm, summed in float64."""
    return sum(float(rows.double().square().sum()) for rows in matrix.split(_ROWS))


def _leading(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ draws).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


def _kept(left: Tensor, values: Tensor, right: Tensor, cut: Truncation, total: float, noise: float = 0.0) -> Factors:
    longest = max(left.shape[0], right.shape[1])
    noise = max(noise, float(values[0]) * torch.finfo(values.dtype).eps * 2 * math.sqrt(longest))
    count = min(cut.count(values, total), max(int((values > noise).sum()), 1))
    scale = values[:count].sqrt()
    return Factors(left[:, :count] * scale, scale.unsqueeze(1) * right[:count])
