"""A look at every value: NaN, infinity, tensors that are all zero. Reads the whole model in slices, in some threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from regraft.checkpoint import BLOCK, Checkpoint, TensorSource, numel

_CHUNK = 64 * BLOCK


@dataclass(frozen=True)
class Scan:
    """What the values of a model are like.

    Attributes:
        nan, inf: how many values are NaN or infinite.
        damaged: name of each tensor that has such values -> how many.
        zero: names of the float tensors whose values are all zero.
        digest: SHA-256 of config and tensors, the same for any file format.
    """

    nan: int
    inf: int
    damaged: dict[str, int]
    zero: tuple[str, ...]
    digest: str


def scan(checkpoint: Checkpoint, *, on_progress: Callable[[int, int], None] | None = None) -> Scan:
    """Read every value once, and once more for the digest.

    Raises:
        UserError: RG101 or RG103 if a file has gone or changed.
    """
    floats = [source for source in checkpoint.tensors.values() if source.dtype.is_floating_point]
    total = sum(map(numel, floats))
    done = 0
    found: list[tuple[int, int, bool]] = []
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for source, result in zip(floats, pool.map(_look, floats), strict=True):
            found.append(result)
            done += numel(source)
            if on_progress is not None:
                on_progress(done, total)
    pairs = [(source.name, *result) for source, result in zip(floats, found, strict=True)]
    return Scan(
        nan=sum(nan for _, nan, _, _ in pairs),
        inf=sum(inf for _, _, inf, _ in pairs),
        damaged={name: nan + inf for name, nan, inf, _ in pairs if nan + inf},
        zero=tuple(name for name, _, _, zero in pairs if zero),
        digest=checkpoint.full_digest(),
    )


def _look(source: TensorSource) -> tuple[int, int, bool]:
    """(NaN, infinite, whether all are zero)."""
    nan = inf = 0
    zero = numel(source) > 0
    for start in range(0, numel(source), _CHUNK):
        values = source.read(start, min(start + _CHUNK, numel(source)))
        if values.dtype.itemsize == 1:
            values = values.float()
        zero = zero and not bool((values != 0).any())
        if not bool(torch.isfinite(values).all()):
            nan += int(torch.isnan(values).sum())
            inf += int(torch.isinf(values).sum())
    return nan, inf, zero
