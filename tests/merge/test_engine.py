"""The engine itself, with rules made for the purpose: chunks, workers, sweeps, copies, failures."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field

from regraft.checkpoint.dtypes import DTYPES, array_dtype, as_tensor, dtype_name
from regraft.checkpoint.tensor import BLOCK, MemoryTensor, StoredTensor
from regraft.errors import UserError
from regraft.merge.engine import run_jobs
from regraft.merge.jobs import Job, all_compiled, fit_memory, group, predict_memory
from regraft.merge.rule import Chunk, Copy, Rule, Steps, TensorInfo, Unit
from regraft.merge.statistics import OrderStatistic, Sum
from regraft.methods import Options


class Caps(Options):
    scope: str = "tensor"
    factor: float = Field(1.0, ge=0)


def _capped(unit: Unit[Caps]) -> Steps:
    """Clamp task vectors to their median magnitude, then scale by a sum: two stages of statistics."""
    (median,) = yield [OrderStatistic(lambda c: c.deltas.abs(), ranks=[unit.numel // 2])]
    (total,) = yield [Sum(lambda c: c.deltas.abs().minimum(c.like(median)))]
    unit.note(total=total.tolist())

    def combine(c: Chunk[Caps]) -> torch.Tensor:
        cap = c.like(median)
        return c.base + c.options.factor * (c.deltas.clamp(-cap, cap) / c.per_model(total)).sum(0)

    return combine


def make_rule(function, **settings) -> Rule:
    return Rule(name="probe", room="merge", summary="", options=Caps, function=function, **settings)


CAPPED = make_rule(_capped, needs_base=True, scope=lambda o: o.scope, model_wide=("factor",))
SHAPES = {"a": (3, BLOCK + 5), "b": (7,), "c": (), "d": (5 * BLOCK + 3,), "e": (0, 4)}


def jobs_for(rule: Rule | None, options: Caps | None = None, dtype: torch.dtype = torch.float32) -> list[Job]:
    generator = torch.Generator().manual_seed(0)
    jobs = []
    for name, shape in SHAPES.items():
        three = [MemoryTensor(name, torch.randn(shape, generator=generator).to(dtype)) for _ in range(3)]
        info = TensorInfo(name, shape)
        jobs.append(Job(info, tuple(three[:2]), dtype_name(dtype), rule, options or Caps(), three[2], ("x", "y", "z")))
    return jobs


def collect(jobs: list[Job], **settings) -> tuple[dict[str, torch.Tensor], object]:
    dtypes = {job.info.name: job.out_dtype for job in jobs}
    out = {job.info.name: torch.full((job.info.numel,), -77.0).to(DTYPES[job.out_dtype]) for job in jobs}

    def write(name: str, start: int, values: np.ndarray) -> None:
        out[name][start : start + len(values)] = as_tensor(values, dtypes[name])

    return out, run_jobs(jobs, write, **settings)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_chunk_size_and_workers_never_change_a_bit(scope: str) -> None:
    jobs = jobs_for(CAPPED, Caps(scope=scope))
    reference, outcome = collect(jobs, workers=1, chunk=1 << 20)
    for workers in (1, 2, 5):
        for chunk in (1, BLOCK, 3 * BLOCK):
            out, other = collect(jobs, workers=workers, chunk=chunk)
            assert all(torch.equal(out[n], reference[n]) for n in reference)
            assert other.notes == outcome.notes


def test_the_result_is_the_formula() -> None:
    jobs = jobs_for(CAPPED, Caps(factor=2.0))
    out, _ = collect(jobs, workers=2, chunk=BLOCK)
    for job in jobs:
        x, y, base = (s.read().double() for s in (*job.models, job.base))
        expected = base.clone()
        for delta in (x - base, y - base):
            if delta.numel():
                median = delta.abs().sort().values[delta.numel() // 2]
                capped = delta.clamp(-median, median)
                expected += 2 * capped / capped.abs().sum()
        torch.testing.assert_close(out[job.info.name].double(), expected, rtol=1e-5, atol=1e-6)


def test_model_scope_is_one_unit_and_its_options_must_agree() -> None:
    jobs = jobs_for(CAPPED, Caps(scope="model"))
    assert [len(unit) for unit in group(jobs)] == [len(SHAPES)]
    odd = jobs_for(CAPPED, Caps(scope="model", factor=3.0))[0]
    with pytest.raises(UserError, match=r"factor varies: 1\.0 and 3\.0") as error:
        group([*jobs, odd])
    assert error.value.code == "RG303"


def test_a_copy_reads_one_model_and_keeps_its_bits() -> None:
    class Forbidden(MemoryTensor):
        def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
            raise AssertionError("must not be read")

    x = torch.randn(BLOCK * 2 + 1).to(torch.bfloat16)
    sources = (Forbidden("w", x), MemoryTensor("w", x))
    rule = make_rule(lambda unit: Copy(1))
    out, _ = collect([Job(TensorInfo("w", tuple(x.shape)), sources, "BF16", rule, Caps())], workers=2, chunk=BLOCK)
    assert torch.equal(out["w"], x)


def test_integers_are_copied() -> None:
    ids = torch.arange(10)
    out, _ = collect([Job(TensorInfo("ids", (10,)), (MemoryTensor("ids", ids),), "I64")])
    assert torch.equal(out["ids"], ids)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_not_finite_are_reported_with_their_counts(which: int) -> None:
    jobs = jobs_for(CAPPED)
    big = jobs[3]
    source = (*big.models, big.base)[which]
    source.read()[5] = float("nan")
    source.read()[4 * BLOCK : 4 * BLOCK + 2] = float("inf")
    with pytest.raises(UserError, match=r"d holds 1 NaN and 2 infinite of 81923 values \([xyz]\)") as error:
        collect(jobs, chunk=BLOCK, workers=2)
    assert error.value.code == "RG206"
    _, outcome = collect(jobs, allow_nan=True)
    assert outcome.non_finite == {"xyz"[which]: {"d": 3}}


def test_large_finite_values_are_no_infinities() -> None:
    x = torch.full((100,), 3e38)
    rule = make_rule(lambda unit: lambda c: c.models[0])
    out, outcome = collect([Job(TensorInfo("w", (100,)), (MemoryTensor("w", x),), "F32", rule, Caps())])
    assert torch.equal(out["w"], x)
    assert outcome.non_finite == {}


@pytest.mark.parametrize("dtype", ["F16", "F8_E4M3"])
def test_values_beyond_the_output_dtype_are_counted(dtype: str) -> None:
    x = torch.tensor([1.0, 7e4, -7e4, 2.0])
    rule = make_rule(lambda unit: lambda c: c.models[0])
    _, outcome = collect([Job(TensorInfo("w", (4,)), (MemoryTensor("w", x),), dtype, rule, Caps())])
    assert outcome.saturated == {"w": 2}


def test_an_error_in_a_worker_reaches_the_caller_and_ends_all_threads() -> None:
    def fail(unit: Unit[Caps]):
        def combine(c: Chunk[Caps]) -> torch.Tensor:
            raise RuntimeError(f"no {c.info.name}")

        return combine

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no "):
        collect(jobs_for(make_rule(fail)), workers=4, chunk=BLOCK)
    assert threading.active_count() == before


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    collect(jobs_for(CAPPED, Caps(scope="model")), workers=3, chunk=BLOCK, on_progress=lambda d, t: seen.append((d, t)))
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_observers_see_every_element_once() -> None:
    seen = []

    class Lengths:
        def observe(self, chunk: Chunk[Any]) -> None:
            seen.append(chunk.length)

        def facts(self, name: str) -> None:
            return None

        def restore(self, info: TensorInfo, facts: None) -> None:
            raise AssertionError("nothing was finished before")

    jobs = jobs_for(CAPPED)
    collect(jobs, workers=2, chunk=BLOCK, observer=Lengths())
    assert sum(seen) == sum(job.info.numel for job in jobs)


class Notes:
    """An observer that counts the elements of each tensor, and can go on from counts."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self._lock = threading.Lock()

    def observe(self, chunk: Chunk[Any]) -> None:
        with self._lock:
            if chunk.length:
                self.seen[chunk.info.name] = self.seen.get(chunk.info.name, 0) + chunk.length

    def facts(self, name: str) -> int:
        return self.seen.get(name, 0)

    def restore(self, info: TensorInfo, facts: int) -> None:
        if facts:
            self.seen[info.name] = facts


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_tensors_that_are_finished_are_not_computed_again_and_their_facts_are_kept(scope: str) -> None:
    rule = make_rule(_saturating, needs_base=True, scope=lambda o: scope, model_wide=("factor",))
    told: dict[str, dict[str, Any]] = {}
    whole, written = Notes(), []

    def write(name: str, start: int, values: np.ndarray) -> None:
        written.append(name)

    settings = {"workers": 2, "chunk": BLOCK, "allow_nan": True}
    expected = run_jobs(poisoned(rule), write, observer=whole, on_finished=lambda n, f: told.update({n: f}), **settings)
    assert set(told) == set(SHAPES)
    assert expected.saturated
    assert expected.non_finite
    assert expected.notes
    assert expected.warnings == ["watch out"]
    told = json.loads(json.dumps(told))  # as a journal keeps them
    for finished in (["a"], ["b", "c", "e"], list(SHAPES)):
        written.clear()
        later, again = Notes(), []
        outcome = run_jobs(
            poisoned(rule),
            write,
            observer=later,
            finished={name: told[name] for name in finished},
            on_finished=lambda n, f, again=again: again.append(n),
            **settings,
        )
        assert set(written) == set(again) == set(SHAPES) - set(finished)
        # As text: a sum over an infinite value is NaN, and the order counts.
        assert json.dumps(dataclasses.asdict(outcome)) == json.dumps(dataclasses.asdict(expected))
        assert later.seen == whole.seen


def _saturating(unit: Unit[Caps]) -> Steps:
    (total,) = yield [Sum(lambda c: c.deltas, absolute=True)]
    unit.note(total=total.tolist())
    unit.warn("watch out")
    return lambda c: c.base + c.models[0] * 1e5


def poisoned(rule: Rule) -> list[Job]:
    """Jobs with an infinite value, whose results leave the range of float16."""
    jobs = jobs_for(rule, dtype=torch.float16)
    values = jobs[3].models[1].read().clone()
    values[5] = torch.inf
    poisoned = MemoryTensor("d", values.view(SHAPES["d"]))
    jobs[3] = dataclasses.replace(jobs[3], models=(jobs[3].models[0], poisoned))
    return jobs


def test_double_precision_inputs_are_computed_in_double_precision() -> None:
    x = torch.randn(50, dtype=torch.float64)
    rule = make_rule(lambda unit: lambda c: c.models.mean(0))
    out, _ = collect(
        [Job(TensorInfo("w", (50,)), (MemoryTensor("w", x), MemoryTensor("w", x + 1)), "F64", rule, Caps())]
    )
    torch.testing.assert_close(out["w"], x + 0.5, rtol=0, atol=1e-15)


def test_memory_limits_shrink_chunks_then_workers_and_refuse_what_cannot_be() -> None:
    jobs = jobs_for(CAPPED)
    full = predict_memory(jobs, 4, 4 * BLOCK)
    workers, chunk = fit_memory(jobs, full // 3, workers=4, chunk=4 * BLOCK)
    assert predict_memory(jobs, workers, chunk) <= full // 3
    assert (workers, chunk) == (4, BLOCK)
    workers, chunk = fit_memory(jobs, predict_memory(jobs, 1, BLOCK), workers=4, chunk=4 * BLOCK)
    assert (workers, chunk) == (1, BLOCK)
    with pytest.raises(UserError, match=r"needs 1 MB .* 0 MB are left") as error:
        fit_memory(jobs, 10_000, workers=4, chunk=4 * BLOCK)
    assert error.value.code == "RG403"


def stored(dtype: str = "BF16") -> StoredTensor:
    return StoredTensor("w", (2, 3), dtype, np.zeros(6, array_dtype(dtype)))


def test_torch_is_left_out_only_where_nothing_needs_it() -> None:
    options, info = Caps(), TensorInfo("w", (2, 3))
    served = make_rule(_capped, needs_base=True, compiled=lambda o: o.factor == 1)
    plain = Job(info, (stored(), stored()), "F32", served, options, stored())
    assert plain.compiled
    assert all_compiled([plain, plain], "cpu")
    for other in (
        dataclasses.replace(plain, options=Caps(factor=2.0)),
        dataclasses.replace(plain, rule=CAPPED),
        dataclasses.replace(plain, models=(stored(), stored("F32"))),
        dataclasses.replace(plain, models=(stored("F16"), stored("F16")), base=stored("F16")),
        dataclasses.replace(plain, models=(stored(), MemoryTensor("w", torch.zeros(2, 3, dtype=torch.bfloat16)))),
        dataclasses.replace(plain, out_dtype="F16"),
        dataclasses.replace(plain, double=True),
    ):
        assert not other.compiled
        assert not all_compiled([plain, other], "cpu")
    assert not all_compiled([plain], "cuda:0")
    assert Job(info, (stored("I64"),), "I64").compiled
    assert not Job(info, (stored("F16"),), "BF16").compiled
