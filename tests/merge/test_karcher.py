"""The Karcher mean against the iteration on whole vectors, and what makes a point the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regraft.merge as merge

GENERATOR = torch.Generator().manual_seed(10)
MODELS = [size * torch.randn(25, 9, generator=GENERATOR) for size in (1.0, 0.5, 2.0, 1.5)]


def iterated(vectors: list[np.ndarray], steps: int) -> np.ndarray:
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True)]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(steps):
        step = np.zeros_like(mean)
        for unit in units:
            angle = np.arccos((mean * unit).sum())
            step += angle / np.sin(angle) * (unit - np.cos(angle) * mean) / len(units)
        length = np.linalg.norm(step)
        mean = np.cos(length) * mean + np.sin(length) * step / length
        mean = mean / np.linalg.norm(mean)
    return mean * np.mean(norms)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_iteration(steps: int) -> None:
    reference = iterated([m.double().numpy() for m in MODELS], steps)
    found = merge.karcher(MODELS, max_iter=steps, tol=1e-12)
    np.testing.assert_allclose(found.double().numpy(), reference, rtol=2e-6, atol=1e-6)


def test_nothing_pulls_at_the_mean() -> None:
    """The directions to the models on the sphere, each as long as its angle, add up to zero."""
    found = merge.karcher([m.double() for m in MODELS], max_iter=100, tol=1e-10).numpy().ravel()
    mean = found / np.linalg.norm(found)
    pull = np.zeros_like(mean)
    for model in MODELS:
        unit = model.double().numpy().ravel()
        unit = unit / np.linalg.norm(unit)
        angle = np.arccos(mean @ unit)
        pull += angle / np.sin(angle) * (unit - np.cos(angle) * mean)
    assert np.linalg.norm(pull) < 1e-9
    np.testing.assert_allclose(np.linalg.norm(found), np.mean([m.double().norm() for m in MODELS]))


def test_two_of_equal_norm_meet_in_the_middle_of_the_arc() -> None:
    x, y = MODELS[0], MODELS[1] * MODELS[0].norm() / MODELS[1].norm()
    torch.testing.assert_close(merge.karcher([x, y]), merge.slerp([x, y], t=0.5))


def test_what_has_no_direction() -> None:
    x = MODELS[0]
    torch.testing.assert_close(merge.karcher([x, torch.zeros_like(x)]), x / 2)  # the mean norm is half
    torch.testing.assert_close(merge.karcher([x, -x]), x)  # opposites: the first
    assert torch.equal(merge.karcher([torch.zeros(3)] * 3), torch.zeros(3))
    small = 1e-9 * x
    torch.testing.assert_close(merge.karcher([small, small]), small, rtol=0, atol=0)


def test_one_model_is_itself() -> None:
    assert torch.equal(merge.karcher(MODELS[:1]), MODELS[0])
