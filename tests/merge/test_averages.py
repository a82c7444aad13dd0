"""Averages where something is odd: weights that add up to nothing, models that must not count, opposite directions."""

from __future__ import annotations

import math

import pytest
import torch

import regraft.merge as merge
from regraft.checkpoint.tensor import BLOCK, MemoryTensor
from regraft.merge.engine import run_jobs
from regraft.merge.jobs import Job
from regraft.merge.rule import TensorInfo
from regraft.methods import method


def test_a_model_without_weight_has_no_say() -> None:
    x, y = torch.randn(40), torch.randn(40)
    broken = torch.full((40,), math.inf)
    found = merge.linear([broken, x, y], weight=[0, 1, 3], allow_nan=True)
    torch.testing.assert_close(found, (x + 3 * y) / 4)
    assert torch.equal(merge.linear([x, y], weight=[0, 0], normalize=False), torch.zeros(40))


def test_weights_that_add_up_to_one_need_no_normalising_to_be_exact() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(merge.linear([x, x, x], weight=[0.3, 0.3, 0.4], normalize=False), x)


def test_weights_that_add_up_to_zero_are_used_as_they_are() -> None:
    x, y = torch.randn(40), torch.randn(40)
    with pytest.warns(UserWarning, match="add up to zero"):
        found = merge.linear([x, y], weight=[1, -1])
    torch.testing.assert_close(found, x - y)


def test_task_arithmetic_starts_from_the_model_with_factor_one() -> None:
    # A bf16 model that is far from its base: base + (model - base) would round, model + other does not.
    base, model = torch.full((64,), 1000.0), torch.randn(64, generator=torch.Generator().manual_seed(2)) * 1e-3
    assert torch.equal(merge.task_arithmetic([model, base], base=base, weight=[1, 0.5]), model)


def test_slerp_tells_which_branch_ran() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(2 * BLOCK + 5, generator=generator)
    other = torch.randn(a.shape, generator=generator)
    for b, branch in ((a + 0.001 * other, "linear"), (other, "spherical")):
        rule = method("merge", "slerp")
        sources = (MemoryTensor("w", a), MemoryTensor("w", b))
        job = Job(TensorInfo("w", tuple(a.shape)), sources, "F32", rule, rule.resolve(2, {"t": 0.4}))
        notes = run_jobs([job], lambda *_: None, chunk=BLOCK, workers=2).notes["w"]
        assert notes["branch"] == branch
        expected = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()
        assert notes["cosine"] == pytest.approx(expected, abs=1e-6)


def test_slerp_warns_beyond_its_ends() -> None:
    x, y = torch.randn(40), torch.randn(40)
    with pytest.warns(UserWarning, match=r"t is 1\.5"):
        merge.slerp([x, y], t=1.5)


def test_slerp_with_nothing_on_one_side() -> None:
    x = torch.randn(40)
    torch.testing.assert_close(merge.slerp([x, torch.zeros(40)], t=0.5), math.sin(math.pi / 4) * x)
    assert torch.equal(merge.slerp([torch.zeros(40), torch.zeros(40)], t=0.5), torch.zeros(40))


def test_model_stock_keeps_the_base_between_opposites_and_warns_where_models_part() -> None:
    base = torch.zeros(60)
    delta = torch.arange(1, 61).float()
    with pytest.warns(UserWarning, match="opposite directions"):
        assert torch.equal(merge.model_stock([delta, -delta], base=base), base)
    with pytest.warns(UserWarning, match="away from one another"):
        apart = merge.model_stock([delta, -delta + 30], base=base)
    a, b = delta.double(), (-delta + 30).double()
    cosine = (a @ b) / (a.norm() * b.norm())
    t = 2 * cosine / (1 + cosine)
    torch.testing.assert_close(apart.double(), t * (a + b) / 2, rtol=1e-4, atol=1e-4)


def test_sce_gives_equal_weights_to_small_changes_and_follows_large_ones() -> None:
    base = torch.zeros(200)
    generator = torch.Generator().manual_seed(5)
    a, b = torch.rand(200, generator=generator) + 0.5, 3 * (torch.rand(200, generator=generator) + 0.5)
    weights = torch.stack([a.square().mean(), b.square().mean()])
    expected = (weights[0] * a + weights[1] * b) / weights.sum()
    torch.testing.assert_close(merge.sce([a, b], base=base), expected)
    small = 1e-4
    torch.testing.assert_close(merge.sce([small * a, small * b], base=base), small * (a + b) / 2)


def test_opposite_task_vectors_of_pcb_give_the_base_back_under_either_formula() -> None:
    base = torch.zeros(300)
    delta = torch.randn(300, generator=torch.Generator().manual_seed(6))
    for options in ({}, {"inter": "normsum"}, {"formula": "paper"}):
        assert torch.equal(merge.pcb([delta, -delta], base=base, **options), base), options
