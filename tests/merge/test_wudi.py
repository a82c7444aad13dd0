"""WUDI against the descent in NumPy, written from its objective, and what has to come out of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regraft.merge as merge

GENERATOR = torch.Generator().manual_seed(44)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def loss(merged: np.ndarray, deltas: list[np.ndarray]) -> float:
    return sum(np.linalg.norm((merged - d) @ d.T) ** 2 / np.linalg.norm(d) ** 2 for d in deltas)


def descended(deltas: list[np.ndarray], steps: int, rate: float) -> np.ndarray:
    x = sum(deltas)
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, steps + 1):
        g = sum(2 * (x - d) @ d.T @ d / np.linalg.norm(d) ** 2 for d in deltas)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


@pytest.mark.parametrize("shape", [(15, 12), (12, 15), (2, 40)])  # the last one is not worth a Gram matrix
@pytest.mark.parametrize("options", [{}, {"iterations": 40, "learning_rate": 1e-3}])
def test_the_descent(shape: tuple[int, int], options: dict[str, float]) -> None:
    base = draw(*shape).float()
    models = [base + 0.02 * draw(*shape).float() for _ in range(3)]
    weights = [1.0, 0.5, -2.0]
    deltas = [w * (m.double() - base.double()).numpy() for w, m in zip(weights, models, strict=True)]
    steps = descended(deltas, options.get("iterations", 300), options.get("learning_rate", 1e-5))
    expected = base.double().numpy() + 0.7 * steps
    exact = [m.double() for m in models]
    found = merge.wudi(exact, base=base.double(), weight=weights, **{"lambda": 0.7}, **options)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)
    found = merge.wudi(models, base=base, weight=weights, **{"lambda": 0.7}, **options)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=2e-6)


def test_interference_falls_below_that_of_the_sum_and_of_the_mean() -> None:
    deltas = [0.01 * draw(16, 16) for _ in range(4)]
    each = [d.numpy() for d in deltas]
    found = merge.wudi(deltas, base=torch.zeros_like(deltas[0]), iterations=3000).numpy()
    assert loss(found, each) < 0.5 * loss(sum(each), each)
    assert loss(found, each) < 0.9 * loss(sum(each) / 4, each)


def test_equal_models_are_one_in_the_end() -> None:
    """Where their rows span all inputs; Adam also moves what no row sees."""
    base, model = draw(12, 5), draw(12, 5)
    found = merge.wudi([model] * 3, base=base, iterations=8000, learning_rate=3e-3)
    torch.testing.assert_close(found, model, rtol=0, atol=1e-4)
    none = merge.wudi([model] * 3, base=base, iterations=0)
    torch.testing.assert_close(none, base + 3 * (model - base), rtol=0, atol=1e-12)


def test_one_model_comes_back_and_the_base_takes_no_part() -> None:
    base, model = draw(6, 8).float(), draw(6, 8).float()
    one = merge.wudi([model], base=base)
    torch.testing.assert_close(one, model, rtol=0, atol=1e-6)
    assert torch.equal(merge.wudi([base, model, base], base=base), one)


def test_tasks_with_orthogonal_inputs_are_added() -> None:
    models = [torch.zeros(5, 8, dtype=torch.float64) for _ in range(2)]
    models[0][:, :3], models[1][:, 3:] = draw(5, 3), draw(5, 5)
    assert torch.equal(merge.wudi(models, base=torch.zeros(5, 8, dtype=torch.float64)), sum(models))


def test_task_vectors_whose_squares_leave_the_range_of_float32() -> None:
    models = [1e-24 * draw(4, 4).float() for _ in range(2)]
    found = merge.wudi(models, base=torch.zeros(4, 4), learning_rate=1e-30)
    torch.testing.assert_close(found, sum(models), rtol=0.1, atol=1e-26)
