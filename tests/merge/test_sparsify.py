"""What is kept of a task vector, and what the lineage file is told about it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regraft.merge as merge
from regraft.checkpoint.tensor import BLOCK, MemoryTensor
from regraft.merge import sparsify
from regraft.merge.engine import Outcome, run_jobs
from regraft.merge.jobs import Job
from regraft.merge.kernels import between
from regraft.merge.rule import TensorInfo
from regraft.methods import method


def run(rule_name: str, base: torch.Tensor, models: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, Outcome]:
    """One tensor through the engine; the result and what there is to tell."""
    rule = method("merge", rule_name)
    out = torch.empty(base.numel())
    sources = tuple(MemoryTensor("w", m) for m in models)
    info = TensorInfo("w", tuple(base.shape))
    job = Job(info, sources, "F32", rule, rule.resolve(len(models), options), MemoryTensor("w", base), ("a", "b"))

    def write(name: str, start: int, values: np.ndarray) -> None:
        out[start : start + len(values)] = torch.from_numpy(values)

    return out, run_jobs([job], write, workers=2, chunk=BLOCK)


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 0.1, -0.1, 0.25, -3.0]), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_entries_that_reach_the_threshold_are_kept(
    values: list[float], dtype: torch.dtype, data: st.DataObject
) -> None:
    row = torch.tensor(values, dtype=dtype)
    threshold = abs(float(data.draw(st.sampled_from(row.tolist()))))
    expected = torch.where(row.abs() >= threshold, row, torch.zeros_like(row))
    assert torch.equal(between(row.unsqueeze(0), [threshold], [math.inf])[0], expected)


@pytest.mark.parametrize("numel", [1000, 100_001])  # sorted as a whole; counted in histograms
def test_the_share_that_is_kept_is_noted(numel: int) -> None:
    generator = torch.Generator().manual_seed(3)
    grid = torch.randint(0, 6, (numel,), generator=generator).float() / 8  # six magnitudes: many at the threshold
    free = torch.randn(numel, generator=generator)
    _, outcome = run("ties", torch.zeros(numel), [grid, free], density=[0.3, 0.1], trim_scope="tensor")
    (notes,) = outcome.notes.values()
    threshold = grid.sort().values[numel - math.floor(0.3 * numel)]
    assert notes["thresholds"][0] == float(threshold)
    assert notes["kept"] == [
        pytest.approx((grid >= threshold).double().mean().item(), abs=1e-6),
        pytest.approx(math.floor(0.1 * numel) / numel, abs=1e-6),
    ]
    _, outcome = run("breadcrumbs", torch.zeros(numel), [free], density=0.6, gamma=0.1)
    (notes,) = outcome.notes.values()
    assert notes["kept"][0] == pytest.approx(0.6, abs=2 / numel)


def test_a_threshold_of_zero_keeps_everything() -> None:
    base, delta = torch.zeros(100), torch.zeros(100)
    delta[:10] = torch.arange(1, 11).float()
    found, outcome = run("ties", base, [delta], density=0.2)
    assert torch.equal(found, delta)
    assert next(iter(outcome.notes.values()))["kept"] == [1.0]


def test_breadcrumbs_keep_a_small_tensor_without_outliers() -> None:
    # gamma is less than one entry here; mergekit would drop the whole change.
    delta = torch.arange(1, 51).float()
    found = merge.breadcrumbs([delta], base=torch.zeros(50), density=0.8, gamma=0.01)
    assert torch.equal(found, torch.where(delta > 10, delta, torch.zeros(50)))


def test_breadcrumbs_with_density_one_read_nothing_twice() -> None:
    _, outcome = run("breadcrumbs", torch.zeros(50), [torch.randn(50)], density=1.0, gamma=0.1)
    assert outcome.notes == {}


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
def test_dare_warns_of_what_is_sparse_already(name: str, rescale: str) -> None:
    numel = 3 * BLOCK + 7
    generator = torch.Generator().manual_seed(0)
    base, delta = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
    sparse = delta * (torch.rand(numel, generator=generator) < 0.4)
    frozen = torch.zeros(numel)
    _, outcome = run(name, base, [base + delta, base + sparse, base + frozen], density=0.5, rescale=rescale)
    assert len(outcome.warnings) == 1
    assert outcome.warnings[0].startswith("model 2 does not differ from the base in more than half")
    _, outcome = run(name, base, [base + delta, base + sparse], density=[0.5, 1.0], rescale=rescale)
    assert outcome.warnings == []


def test_dare_says_yes_and_no_to_rescale() -> None:
    rule = method("merge", "dare_linear")
    assert rule.resolve(1, {"rescale": True}).rescale == "density"
    assert rule.resolve(1, {"rescale": False}).rescale == "none"
    assert rule.mergekit_values["rescale"] == {True: "l1", False: "none"}


@pytest.mark.parametrize("width", [1, 5, 64, 1003])
def test_decisions_by_rank_that_are_kept_are_those_that_are_made_again(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(width)
    shape = (3 * BLOCK // width + 7, width)
    base = torch.randn(shape, generator=generator)
    models = [base + 1e-3 * torch.randn(shape, generator=generator) for _ in range(2)]
    options = {"density": [0.6, 1.0], "epsilon": 0.2, "rescale": "l1"}
    kept, told = run("della", base, models, **options)
    monkeypatch.setattr(sparsify, "_MOST_MARKS", -1)
    again, told_again = run("della", base, models, **options)
    assert torch.equal(kept, again)
    assert told.notes == told_again.notes
    assert not torch.equal(kept, base.view(-1))
