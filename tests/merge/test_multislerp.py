"""Multi-SLERP against the step in the tangent space that defines it, and where it becomes other rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regraft.merge as merge

GENERATOR = torch.Generator().manual_seed(9)
BASE = torch.randn(30, 11, generator=GENERATOR)
MODELS = [BASE + size * torch.randn(30, 11, generator=GENERATOR) for size in (0.2, 0.5, 0.3)]


def barycentre(vectors: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """To the tangent space at the mean direction, averaged there, and back to the sphere."""
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    angle = np.linalg.norm(tangent) + 1e-300
    point = np.cos(angle) * mean + np.sin(angle) / angle * tangent
    return point * sum(w * n for w, n in zip(weights, norms, strict=True))


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_formula(normalize: bool, with_base: bool) -> None:
    origin = BASE.double().numpy() if with_base else 0.0
    weights = [0.4, 1.0, -0.2]
    shares = [w / 1.2 for w in weights] if normalize else weights
    reference = origin + barycentre([m.double().numpy() - origin for m in MODELS], shares)
    base = BASE if with_base else None
    found = merge.multislerp(MODELS, base=base, weight=weights, normalize_weights=normalize)
    np.testing.assert_allclose(found.double().numpy(), reference, rtol=2e-6, atol=1e-6)


@given(st.floats(0.1, 3))
def test_only_the_ratio_of_the_weights_counts(scale: float) -> None:
    found = merge.multislerp(MODELS, weight=[scale, 2 * scale, scale])
    torch.testing.assert_close(found, merge.multislerp(MODELS, weight=[1, 2, 1]))


def test_two_of_equal_norm_meet_in_the_middle_of_the_arc() -> None:
    x, y = torch.randn(2, 500, generator=GENERATOR)
    y *= x.norm() / y.norm()
    found = merge.multislerp([x, y])
    torch.testing.assert_close(found, merge.slerp([x, y], t=0.5))
    torch.testing.assert_close(found.norm(), x.norm())


def test_directions_that_cancel_out_are_averaged() -> None:
    x = torch.randn(50, generator=GENERATOR)
    with pytest.warns(UserWarning, match="cancel out"):
        found = merge.multislerp([x, -3 * x, torch.zeros_like(x)], weight=[1, 1, 2])
    torch.testing.assert_close(found, -x / 2)
    with pytest.warns(UserWarning, match="add up to zero"):
        merge.multislerp([x, x.flip(0)], weight=[1, -1])


@pytest.mark.filterwarnings("error")
def test_what_no_model_changed_stays() -> None:
    assert torch.equal(merge.multislerp([BASE] * 3, base=BASE), BASE)


def test_one_model_is_itself() -> None:
    assert torch.equal(merge.multislerp(MODELS[:1], base=BASE, weight=0.3), MODELS[0])
