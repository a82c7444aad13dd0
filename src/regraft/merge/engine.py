"""The streaming engine: chunks flow read -> rule -> write, in a few threads, whatever the size of the model.

A job is one output tensor. Jobs that a rule decides on at once form a unit (a tensor, or the whole model); a unit goes
through as many sweeps as its statistics ask for, then through one last pass that combines and writes. Memory is
bounded by workers x chunk. Results are the same bits for any chunk size and any number of workers: chunks start at
multiples of `BLOCK`, torch computes with one thread per worker, and statistics do not depend on order.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoint.tensor import BLOCK, TensorSource, numel
from regraft.errors import UserError, UserWarningMessage
from regraft.merge.jobs import DEFAULT_CHUNK, Job, default_workers, group
from regraft.merge.rule import Chunk, Copy, Rule, Steps, Unit
from regraft.merge.statistics import Statistic
from regraft.methods import Options


@dataclass
class Outcome:
    """What a run has to tell: facts per unit, remarks, and elements that left the range of the output dtype."""

    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    saturated: dict[str, int] = field(default_factory=dict)
    non_finite: dict[str, dict[str, int]] = field(default_factory=dict)


Sink = Callable[[str, int, Tensor], None]


def run_jobs(
    jobs: Sequence[Job],
    write: Sink,
    *,
    workers: int | None = None,
    chunk: int | None = None,
    allow_nan: bool = False,
    observe: Callable[[Chunk[Any]], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Compute every job and hand the results to `write(name, start, values)`, from several threads.

    Args:
        workers: threads; all cores by default.
        chunk: elements per chunk, rounded up to a multiple of `BLOCK`; more means more memory, never another result.
        allow_nan: go on if a source holds values that are not finite (they are counted all the same).
        observe: sees every chunk of the last pass before it is combined, in any order and from several threads.
        on_progress: called with (elements passed through, elements to pass through in all sweeps as far as known).

    Raises:
        UserError: RG206 with tensor, model and counts; whatever a source or the sink raises.
    """
    size = max(BLOCK, -(-(chunk or DEFAULT_CHUNK) // BLOCK) * BLOCK)
    run = _Run(group(jobs), write, size, allow_nan, observe, on_progress)
    run.execute(workers or default_workers())
    return run.outcome


@dataclass(eq=False)
class _UnitState:
    jobs: list[Job]
    unit: Unit[Any]
    steps: Steps | None = None
    statistics: list[Statistic] = field(default_factory=list)
    active: list[Statistic] = field(default_factory=list)
    decision: Any = None  # how to combine, once the rule has returned it
    pending: int = 0
    first_pass: bool = True
    kept: Chunk[Any] | None = None  # the only chunk of a small unit, kept between sweeps

    @property
    def numel(self) -> int:
        return sum(job.info.numel for job in self.jobs)


@dataclass(frozen=True)
class _Task:
    state: _UnitState
    job: Job
    start: int
    stop: int


class _Run:
    """One execution. Workers take tasks from a shared deque; who ends a sweep queues the next one in front."""

    def __init__(
        self,
        units: list[list[Job]],
        write: Sink,
        chunk: int,
        allow_nan: bool,
        observe: Callable[[Chunk[Any]], None] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.outcome = Outcome()
        self._waiting = deque(units)
        self._ready: deque[_Task] = deque()
        self._open = 0  # units begun and not finished
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._write, self._chunk, self._allow_nan = write, chunk, allow_nan
        self._observe, self._on_progress = observe, on_progress
        self._done = 0
        self._total = sum(job.info.numel for unit in units for job in unit)

    def execute(self, workers: int) -> None:
        with _one_thread_each():
            threads = [threading.Thread(target=self._work, name=f"merge-{i}", daemon=True) for i in range(workers)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():  # a timeout lets Ctrl-C through
                        thread.join(0.2)
            except BaseException as interrupt:  # noqa: BLE001 - raised again below
                self._fail(interrupt)
                for thread in threads:
                    thread.join()
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _work(self) -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                while (task := self._next()) is not None:
                    self._process(task)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            self._fail(error)

    def _next(self) -> _Task | None:
        with self._changed:
            while True:
                if self._error is not None:
                    return None
                if self._ready:
                    return self._ready.popleft()
                if self._waiting:
                    self._begin(self._waiting.popleft())
                elif self._open == 0:
                    self._changed.notify_all()
                    return None
                else:
                    self._changed.wait()

    def _begin(self, jobs: list[Job]) -> None:
        first = jobs[0]
        self._open += 1
        unit: Unit[Any] = Unit(
            tuple(job.info for job in jobs), len(first.models), first.options or Options(), first.base is not None
        )
        state = _UnitState(jobs, unit)
        if first.rule is None or state.numel == 0:
            state.decision = Copy(0)
            self._queue(state)
            return
        state.steps = first.rule.start(unit)
        self._advance(state, None)

    def _advance(self, state: _UnitState, results: list[Tensor] | None) -> None:
        """Ask the rule for its next statistics, or for its decision; queue the next sweep."""
        assert state.steps is not None
        try:
            wanted = next(state.steps) if results is None else state.steps.send(results)
            state.statistics = state.active = list(wanted)
            for statistic in state.active:
                statistic.begin(state.numel)
            self._total += state.numel * max((s.sweeps for s in state.active), default=0)
        except StopIteration as stop:
            state.decision = stop.value
            state.active = []
        self._queue(state)

    def _queue(self, state: _UnitState) -> None:
        tasks = []
        for job in state.jobs:
            for start in range(0, max(job.info.numel, 1), self._chunk):
                tasks.append(_Task(state, job, start, min(start + self._chunk, job.info.numel)))
        state.pending = len(tasks)
        self._ready.extendleft(reversed(tasks))
        self._changed.notify_all()

    def _process(self, task: _Task) -> None:
        state = task.state
        if isinstance(state.decision, Copy):
            self._copy(task, state.decision.model)
        else:
            chunk = self._load(task)
            if state.decision is None:
                for statistic in state.active:
                    statistic.absorb(statistic.observe(chunk))
            else:
                if self._observe is not None:
                    self._observe(chunk)
                self._store(task, state.decision(chunk))
        with self._changed:
            self._done += task.stop - task.start
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)
            state.pending -= 1
            if state.pending == 0 and self._error is None:
                self._end_of_pass(state)

    def _end_of_pass(self, state: _UnitState) -> None:
        state.first_pass = False
        if state.decision is not None:
            self._open -= 1
            if state.unit.notes:
                self.outcome.notes[state.unit.name] = state.unit.notes
            self.outcome.warnings += [w for w in state.unit.warnings if w not in self.outcome.warnings]
            self._changed.notify_all()
            return
        state.active = [s for s in state.active if not s.finish()]
        if state.active:
            self._queue(state)
        else:
            self._advance(state, [s.result for s in state.statistics])

    def _load(self, task: _Task) -> Chunk[Any]:
        state, job = task.state, task.job
        if state.kept is not None:
            return state.kept
        length, dtype = task.stop - task.start, job.arithmetic
        rows = torch.empty((len(job.models), length), dtype=dtype)
        for row, source in zip(rows, job.models, strict=True):
            row.copy_(source.read(task.start, task.stop))
        base = job.base.read(task.start, task.stop).to(dtype) if job.base is not None else None
        if state.first_pass:
            for i, row in enumerate(rows):
                self._check_finite(job, job.models[i], i, row)
            if base is not None and job.base is not None:
                self._check_finite(job, job.base, len(job.models), base)
        chunk: Chunk[Any] = Chunk(job.info, job.options, task.start, rows, base)
        if len(state.jobs) == 1 and length == job.info.numel:
            state.kept = chunk
        return chunk

    def _check_finite(self, job: Job, source: TensorSource, model: int, values: Tensor) -> None:
        # A sum is one cheap pass; it overflows for huge finite values, hence the second look.
        if bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all()):
            return
        label = job.labels[model] if model < len(job.labels) else f"model {model + 1}"
        nans, infinities = count_non_finite(source)
        self.outcome.non_finite.setdefault(label, {})[source.name] = nans + infinities
        if not self._allow_nan:
            what = f"{source.name} holds {nans} NaN and {infinities} infinite of {numel(source)} values"
            raise UserError(
                "RG206", what, where=label, fix="repair that model, or pass --allow-nan to merge them as they are"
            )

    def _store(self, task: _Task, result: Tensor) -> None:
        dtype = task.job.out_dtype
        limit = torch.finfo(dtype).max
        if limit < torch.finfo(result.dtype).max and result.numel() and not bool(result.abs().amax() <= limit):
            lost = int(((result.abs() > limit) & torch.isfinite(result)).sum())
            if lost:
                with self._changed:
                    name = task.job.info.name
                    self.outcome.saturated[name] = self.outcome.saturated.get(name, 0) + lost
        self._write(task.job.info.name, task.start, result.to(dtype))

    def _copy(self, task: _Task, model: int) -> None:
        job = task.job
        source = job.models[model]
        values = source.read(task.start, task.stop)
        if values.dtype.is_floating_point:
            wide = values if values.dtype.itemsize > 1 else values.float()
            self._check_finite(job, source, model, wide)
            if values.dtype != job.out_dtype:
                self._store(task, values.to(torch.promote_types(wide.dtype, torch.float32)))
                return
        self._write(job.info.name, task.start, values)


def count_non_finite(source: TensorSource) -> tuple[int, int]:
    """(NaN, infinite) values in a whole tensor, read in chunks."""
    nans = infinities = 0
    total = numel(source)
    for start in range(0, total, DEFAULT_CHUNK):
        values = source.read(start, min(start + DEFAULT_CHUNK, total)).to(torch.float64)
        nans += int(torch.isnan(values).sum())
        infinities += int(torch.isinf(values).sum())
    return nans, infinities


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Parallelism comes from the workers; a kernel that splits its own work would change the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def merge_in_memory(
    rule: Rule[Any],
    models: Sequence[Any],
    base: Any = None,
    options: Mapping[str, Any] | None = None,
    *,
    workers: int = 1,
    chunk: int | None = None,
    allow_nan: bool = False,
) -> Any:
    """Merge tensors or state dicts that are in memory; see `Rule.__call__`."""
    from regraft.merge.memory import as_jobs

    jobs, outputs = as_jobs(rule, models, base, options or {})

    def write(name: str, start: int, values: Tensor) -> None:
        outputs[name].view(-1)[start : start + values.numel()] = values

    outcome = run_jobs(jobs, write, workers=workers, chunk=chunk, allow_nan=allow_nan)
    for warning in outcome.warnings:
        warnings.warn(warning, UserWarningMessage, stacklevel=3)
    return outputs if isinstance(models[0], Mapping) else outputs["tensor"]
