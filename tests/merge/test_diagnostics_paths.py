"""The compiled loop over stored values and the path for other dtypes and devices find the same of task vectors."""

import numpy as np
import pytest
import torch

from regraft.checkpoint.tensor import BLOCK
from regraft.merge.chunk import Chunk, TensorInfo
from regraft.merge.diagnostics import _stored_sums, _sums
from regraft.methods import Options


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
@pytest.mark.parametrize("first", [0, 1])
def test_both_paths_measure_the_same_blocks(stride: int, first: int) -> None:
    rng = np.random.default_rng(0)
    length = 5 * BLOCK + 777
    base = rng.standard_normal(length, np.float32)
    changes = 0.1 * rng.standard_normal((3, length), np.float32) * (rng.random((3, length)) < 0.5)
    rows = np.concatenate([base + changes, base[None]]).astype(np.float32)
    info = TensorInfo("x", (length + BLOCK,))
    one = _sums(Chunk(info, Options(), first * BLOCK, torch.from_numpy(rows), True), stride)
    other = _stored_sums(rows, first, stride)
    blocks = [b for b in range(6) if (first + b) % stride == 0]
    measured = np.concatenate([rows[:, b * BLOCK : (b + 1) * BLOCK] for b in blocks] or [rows[:, :0]], 1)
    deltas = measured[:3] - measured[3]
    conflicts = int(((deltas > 0).any(0) & (deltas < 0).any(0)).sum())
    for found in (one, other):
        assert (found.elements, found.moved) == (measured.shape[1], int((deltas != 0).any(0).sum()))
        assert found.conflicts == conflicts
        np.testing.assert_allclose(found.gram, deltas.astype(float) @ deltas.astype(float).T, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.absolute, abs(deltas.astype(float)).sum(1), rtol=1e-5)
        np.testing.assert_allclose(found.base, (measured[3].astype(float) ** 2).sum(), rtol=1e-6)
