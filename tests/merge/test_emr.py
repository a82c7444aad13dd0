"""EMR-Merging against the paper's algorithm and the official code's rescalers, written in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regraft.merge as merge
from regraft.errors import UserError

GENERATOR = torch.Generator().manual_seed(61)
SHAPES = {"w": (23, 17), "v": (90,), "u": (3, 4, 5)}
BASE = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
# The vector moves farther than the others, so that it matters how tensors count in a rescaler.
SIZES = {"w": 0.01, "v": 0.2, "u": 0.05}
MODELS = [{k: v + SIZES[k] * torch.randn(v.shape, generator=GENERATOR) ** 3 for k, v in BASE.items()} for _ in range(4)]


def differences(model: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {k: (v.double() - BASE[k].double()).numpy() for k, v in model.items()}


def unified(deltas: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    found = {}
    for name in SHAPES:
        stack = np.stack([d[name] for d in deltas])
        sign = np.where(stack.sum(0) >= 0, 1, -1)
        found[name] = sign * np.where(stack * sign > 0, np.abs(stack), 0).max(0)
    return found


def of_task(deltas: list[dict[str, np.ndarray]], task: int, means: bool) -> dict[str, np.ndarray]:
    tau = unified(deltas)
    masked = {k: np.where(tau[k] * deltas[task][k] > 0, tau[k], 0) for k in tau}
    size = np.mean if means else np.sum
    scale = sum(size(np.abs(d)) for d in deltas[task].values()) / sum(size(np.abs(m)) for m in masked.values())
    return {k: scale * m for k, m in masked.items()}


def check(found: dict[str, torch.Tensor], change: dict[str, np.ndarray], factor: float = 1.0) -> None:
    for name, base in BASE.items():
        expected = base.double().numpy() + factor * change[name]
        np.testing.assert_allclose(found[name].double().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_unified_model() -> None:
    deltas = [differences(m) for m in MODELS]
    check(merge.emr(MODELS, base=BASE), unified(deltas))
    check(merge.emr(MODELS, base=BASE, **{"lambda": 0.3}), unified(deltas), 0.3)


@pytest.mark.parametrize("task", range(4))
@pytest.mark.parametrize("rescaler", ["sum", "tensor_means"])
def test_a_task(task: int, rescaler: str) -> None:
    change = of_task([differences(m) for m in MODELS], task, rescaler == "tensor_means")
    check(merge.emr(MODELS, base=BASE, task=task, rescaler=rescaler), change)
    check(merge.emr(MODELS, base=BASE, task=task, rescaler=rescaler, **{"lambda": 0.5}), change, 0.5)


def test_the_two_rescalers_differ() -> None:
    deltas = [differences(m) for m in MODELS]
    one, other = (of_task(deltas, 1, means)["v"] for means in (False, True))
    assert np.abs(one / np.where(other == 0, 1, other)).max() > 1.005


def test_a_task_has_the_size_and_the_signs_of_its_fine_tune() -> None:
    found = differences(merge.emr(MODELS, base=BASE, task=2))
    own = differences(MODELS[2])
    size, wanted = (sum(np.abs(d).sum() for d in each.values()) for each in (found, own))
    assert abs(size / wanted - 1) < 1e-5
    assert all((found[k] * own[k] >= 0).all() for k in SHAPES)


def test_a_task_is_nearer_to_its_fine_tune_than_the_unified_model_is() -> None:
    def distance(found: dict[str, torch.Tensor], task: int) -> float:
        return sum(float((found[k] - MODELS[task][k]).square().sum()) for k in SHAPES)

    unified = merge.emr(MODELS, base=BASE)
    for task in range(4):
        assert distance(merge.emr(MODELS, base=BASE, task=task), task) < 0.5 * distance(unified, task)


def test_one_model_comes_back() -> None:
    check(merge.emr(MODELS[:1], base=BASE), differences(MODELS[0]))
    check(merge.emr(MODELS[:1], base=BASE, task=0), differences(MODELS[0]))


def test_what_cancels_out_elects_the_positive_sign() -> None:
    base, step = torch.zeros(3), torch.tensor([0.5, -0.25, 0.0])
    assert torch.equal(merge.emr([step, -step], base=base), step.abs())
    assert torch.equal(merge.emr([step, -step], base=base, task=0), torch.tensor([0.75, 0.0, 0.0]))


def test_a_task_that_is_the_base_gives_the_base() -> None:
    found = merge.emr([*MODELS, BASE], base=BASE, task=4)
    assert all(torch.equal(found[k], BASE[k]) for k in BASE)


@pytest.mark.parametrize(
    ("task", "message"),
    [(4, "task is 4, and there are 4 models, counted from 0"), (-1, "task is -1"), ("a", "task is 'a'")],
)
def test_a_task_that_there_is_not(task: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        merge.emr(MODELS, base=BASE, task=task)
    assert error.value.code == "RG303"
