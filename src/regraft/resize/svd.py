"""Two factors of a matrix: the truncated singular value decomposition, exact, randomised, or aware of activations.

The singular values go half into each factor, so that both have the same scale. Everything is computed in float32 or
above, whatever the dtype of the matrix.

Whitened: the factors minimise the error of the layer's outputs on the inputs that were seen, |W X - B A X|, instead of
that of the weights: with X X^T = L L^T the best factors of W L are those of the outputs (SVD-LLM, arXiv 2403.07378).
Randomised: a sketch of rank + 16 columns, refined by two power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061),
of W or, whitened, of W L. All errors are measured on the factors that come out, none is taken from theory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import UserError

EXACT_UP_TO = 2048  # the smaller side of a matrix, above which an exact decomposition takes minutes
OVERSAMPLING = 16
POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Factors:
    """B (O, r) and A (r, I), and how far their product is from the matrix.

    Attributes:
        error: |W - B A| / |W|, Frobenius.
        best: the smallest error that any product of this rank has, where the whole spectrum is known.
        output_error: |W X - B A X| / |W X| on the inputs that whitening was given.
        randomized: whether they come from a sketch.
    """

    up: Tensor
    down: Tensor
    error: float
    best: float | None = None
    output_error: float | None = None
    randomized: bool = False


def spectrum(weight: Tensor, *, where: str = "") -> Tensor:
    """All singular values of a matrix, largest first. Raises RG206 if it holds values that are not finite."""
    values: Tensor = torch.linalg.svdvals(_finite(weight, where))
    return values


def truncated(weight: Tensor, rank: int, *, randomized: bool = False, seed: int = 0, where: str = "") -> Factors:
    """The best factors of a rank, or of a sketch of it.

    Args:
        weight: (O, I).
        randomized: use the sketch, which for large matrices and small ranks is many times faster.
        seed: of the sketch.
        where: the name of the layer, for messages.

    Raises:
        UserError: RG206 for values that are not finite.
    """
    matrix = _finite(weight, where)
    if randomized:
        u, s, vh = _sketched(matrix, rank, seed)
        best = None
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        total = float(s.double().square().sum())
        best = float(s[rank:].double().square().sum() / total) ** 0.5 if total else 0.0
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    return Factors(up, down, _error(matrix, up, down), best, randomized=randomized)


def whitened(
    weight: Tensor, moments: Tensor, rank: int, *, randomized: bool = False, seed: int = 0, where: str = ""
) -> Factors:
    """The best factors for inputs with these second moments, or of a sketch.

    Args:
        weight: (O, I).
        moments: (I, I), the mean of x x^T over inputs.
        randomized: use the sketch; the moments, which are square, are decomposed exactly all the same.
        seed: of the sketch.

    Raises:
        UserError: RG206 for values that are not finite.
    """
    matrix, second = _finite(weight, where), _finite(moments.double(), where)
    values, vectors = torch.linalg.eigh(second)
    # Directions that no input had get a little weight, so that the inverse exists and nothing there is thrown away.
    values = values.clamp(min=float(values.max()) * 1e-6 if float(values.max()) > 0 else 1.0)
    half = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    shaped = matrix.double() @ half
    u, s, vh = _sketched(shaped, rank, seed) if randomized else torch.linalg.svd(shaped, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = (u[:, :rank] * root).to(matrix.dtype), (root[:, None] * vh[:rank] @ inverse).to(matrix.dtype)
    output_error = _error(shaped, up.double(), down.double() @ half)
    return Factors(up, down, _error(matrix, up, down), None, output_error, randomized)


def _sketched(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    width = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _error(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    size = float(torch.linalg.vector_norm(matrix.double()))
    return float(torch.linalg.vector_norm((matrix - up @ down).double())) / size if size else 0.0


def _finite(matrix: Tensor, where: str) -> Tensor:
    wide = matrix.detach() if matrix.dtype in (torch.float32, torch.float64) else matrix.detach().float()
    if not bool(torch.isfinite(wide).all()):
        raise UserError("RG206", "the matrix holds values that are not finite", where=where, fix="repair the model")
    return wide
