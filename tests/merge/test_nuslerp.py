"""NuSLERP against its formula, run by run, and where it becomes other rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regraft.merge as merge

SHAPE = (12, 5, 7)
GENERATOR = torch.Generator().manual_seed(8)
BASE = torch.randn(SHAPE, generator=GENERATOR)
A, B = (BASE + 0.3 * torch.randn(SHAPE, generator=GENERATOR) for _ in range(2))


def arc(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Between vectors along the last axis."""
    angle = np.arccos((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))[..., None]
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def expected(a: np.ndarray, b: np.ndarray, t: float, flatten: bool, row_wise: bool) -> np.ndarray:
    if flatten:
        return arc(a.ravel(), b.ravel(), t).reshape(SHAPE)
    if row_wise:
        return np.moveaxis(arc(np.moveaxis(a, 0, -1), np.moveaxis(b, 0, -1), t), -1, 0)
    return arc(a, b, t)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(("flatten", "row_wise"), [(True, False), (False, False), (False, True)])
def test_the_formula(flatten: bool, row_wise: bool, with_base: bool) -> None:
    origin = BASE.double().numpy() if with_base else 0.0
    a, b = (x.double().numpy() - origin for x in (A, B))
    options = {"weight": [1.0, 3.0], "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    found = merge.nuslerp([A, B], base=BASE if with_base else None, **options)
    reference = origin + expected(a, b, 0.75, flatten, row_wise)
    np.testing.assert_allclose(found.double().numpy(), reference, rtol=2e-6, atol=1e-6)


@given(st.floats(0.01, 5), st.floats(0.01, 5))
def test_without_a_base_it_is_slerp(first: float, second: float) -> None:
    x, y = A, torch.roll(B, 1, 0)  # far from parallel
    t = second / (first + second)
    torch.testing.assert_close(merge.nuslerp([x, y], weight=[first, second]), merge.slerp([x, y], t=t))


@pytest.mark.parametrize("options", [{}, {"nuslerp_flatten": False}])
def test_all_the_weight_is_that_model(options: dict[str, bool]) -> None:
    for base in (None, BASE):
        assert torch.equal(merge.nuslerp([A, B], base=base, weight=[0, 2], **options), B)
        assert torch.equal(merge.nuslerp([A, B], base=base, weight=[2, 0], **options), A)


def test_weights_without_a_sum_are_equal_ones() -> None:
    assert torch.equal(merge.nuslerp([A, B], weight=[1, -1]), merge.nuslerp([A, B]))
    with pytest.warns(UserWarning, match="extrapolates"):
        merge.nuslerp([A, B], weight=[2, -1])


@pytest.mark.filterwarnings("ignore:tensor points in opposite directions")
@pytest.mark.parametrize("row_wise", [False, True])
def test_rows_without_an_arc(row_wise: bool) -> None:
    base = torch.randn(4, 4, generator=GENERATOR)
    x, y = base.clone(), base.clone()
    x[1], y[1] = base[1] + 1, base[1] + 3  # parallel changes
    x[2], y[2] = base[2] + 1, base[2] - 1  # opposite changes
    x[3] = base[3] + 1  # one model only: its change counts as perpendicular to none
    changes = torch.tensor([0.0, 2.0, 0.0, 0.5**0.5])[:, None]
    if row_wise:
        base, x, y, changes = (v.T.contiguous() for v in (base, x, y, changes))
    found = merge.nuslerp([x, y], base=base, nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    torch.testing.assert_close(found, base + changes)
    unchanged = found[:, 0] if row_wise else found[0]
    assert torch.equal(unchanged, base[:, 0] if row_wise else base[0])
