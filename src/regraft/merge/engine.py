"""The streaming engine: chunks flow read -> rule -> write, in a few threads, whatever the size of the model.

A job is one output tensor. Jobs that a rule decides on at once form a unit (a tensor, or the whole model); a unit goes
through as many sweeps as its statistics ask for, then through one last pass that combines and writes. Memory is
bounded by workers x chunk. Results are the same bits for any chunk size and any number of workers: chunks start at
multiples of `BLOCK`, torch computes with one thread per worker, and statistics do not depend on order.
"""

from __future__ import annotations

import importlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from regraft.checkpoint.dtypes import DTYPES, as_array, is_float, largest_value
from regraft.checkpoint.tensor import BLOCK, Scratch, StoredRows, TensorSource, numel, read_rows, stored_dtype
from regraft.errors import UserError
from regraft.merge.allocator import keep_pages
from regraft.merge.jobs import Job, all_compiled, default_chunk, default_workers, group
from regraft.merge.kernels import Values
from regraft.merge.rule import Chunk, Copy, TensorInfo, Unit
from regraft.merge.storage import all_within, narrow
from regraft.merge.torch_threads import accelerator, one_thread_each, torch_is_loaded
from regraft.merge.units import Task, UnitState, as_chunk, count_non_finite
from regraft.methods import Options

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Outcome:
    """What a run has to tell: facts per unit, remarks, and elements that left the range of the output dtype."""

    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    saturated: dict[str, int] = field(default_factory=dict)
    non_finite: dict[str, dict[str, int]] = field(default_factory=dict)


# Takes the name of a tensor, the first element, and flat values as they are stored: of `array_dtype` of its dtype.
Sink = Callable[[str, int, np.ndarray], None]


class Observer(Protocol):
    """Sees every chunk of the last pass before it is combined, in any order and from several threads."""

    def observe(self, chunk: Chunk[Any]) -> None: ...
    def facts(self, name: str) -> Any:
        """What was found in a tensor, JSON-able; asked for once all its chunks were seen."""
        ...

    def restore(self, info: TensorInfo, facts: Any) -> None:
        """Take over what an earlier run found in a tensor."""
        ...


def run_jobs(
    jobs: Sequence[Job],
    write: Sink,
    *,
    workers: int | None = None,
    chunk: int | None = None,
    device: str = "cpu",
    allow_nan: bool = False,
    observer: Observer | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    finished: Mapping[str, Mapping[str, Any]] | None = None,
    on_finished: Callable[[str, dict[str, Any]], None] | None = None,
) -> Outcome:
    """Compute every job and hand the results to `write(name, start, values)`, from several threads.

    Args:
        workers: threads; one more than there are cores by default.
        chunk: elements per chunk, rounded up to a multiple of `BLOCK`; more means more memory, never another result.
        device: where chunks are computed, as torch calls it; sources are read and results are written on the CPU. The
            last bits of statistics, and so of results, may depend on the kind of device.
        allow_nan: go on if a source holds values that are not finite (they are counted all the same).
        observer: looks on.
        on_progress: called with (elements passed through, elements to pass through in all sweeps as far as known).
        finished: tensors that an earlier run wrote, with the facts that it was told by `on_finished`; they are not
            computed again, and their facts become part of the outcome.
        on_finished: called with the name of a tensor when all of it was written, and JSON-able facts about it.

    Raises:
        UserError: RG206 with tensor, model and counts; whatever a source or the sink raises.
    """
    size = max(BLOCK, -(-(chunk or default_chunk(device)) // BLOCK) * BLOCK)
    place = None if not torch_is_loaded() and all_compiled(jobs, device) else device
    run = _Run(group(jobs), write, size, place, allow_nan, observer, on_progress, finished or {}, on_finished)
    run.execute(workers or default_workers())
    return run.outcome([job.info.name for job in jobs])


@dataclass
class _Facts:
    """What was found in one tensor."""

    saturated: int = 0
    non_finite: dict[str, dict[str, int]] = field(default_factory=dict)


class _Run:
    """One execution. Workers take tasks from a shared deque; who ends a sweep queues the next one in front."""

    def __init__(
        self,
        units: list[list[Job]],
        write: Sink,
        chunk: int,
        device: str | None,
        allow_nan: bool,
        observer: Observer | None,
        on_progress: Callable[[int, int], None] | None,
        finished: Mapping[str, Mapping[str, Any]],
        on_finished: Callable[[str, dict[str, Any]], None] | None,
    ) -> None:
        self._ready: deque[Task] = deque()
        self._open = 0  # units begun and not finished
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._write, self._chunk, self._allow_nan = write, chunk, allow_nan
        self._torch, self._device = device is not None, accelerator(device)
        self._observer, self._on_progress = observer, on_progress
        self._finished, self._on_finished = finished, on_finished
        self._notes: dict[str, dict[str, Any]] = {}
        self._warnings: dict[str, list[str]] = {}
        self._facts: dict[str, _Facts] = {}
        self._scratch = Scratch()
        self._done = 0
        self._total = sum(job.info.numel for unit in units for job in unit)
        self._waiting = deque(unit for unit in units if not self._taken_over(unit))

    def outcome(self, names: Sequence[str]) -> Outcome:
        """All facts in the order of the tensors, whoever found them when."""
        result = Outcome()
        for name in names:
            for warning in self._warnings.get(name, ()):
                if warning not in result.warnings:
                    result.warnings.append(warning)
            facts = self._facts.get(name, _Facts())
            if facts.saturated:
                result.saturated[name] = facts.saturated
            for model, found in facts.non_finite.items():
                result.non_finite.setdefault(model, {}).update(found)
        order = {name: i for i, name in enumerate(names)}
        result.notes = dict(sorted(self._notes.items(), key=lambda item: order.get(item[0], -1)))
        return result

    def execute(self, workers: int) -> None:
        keep_pages()
        importlib.import_module("regraft.merge.native")  # a failure to load it in a worker could be a deadlock
        with ExitStack() as stack:
            if self._torch:
                stack.enter_context(one_thread_each())
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
        try:
            with ExitStack() as stack:
                if self._torch:
                    import torch

                    torch.set_num_threads(1)
                    stack.enter_context(torch.inference_mode())
                while (task := self._next()) is not None:
                    if isinstance(task, Task):
                        self._process(task)
                    else:
                        self._begin(task)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            self._fail(error)

    def _next(self) -> Task | list[Job] | None:
        """A chunk to work on, else a unit to begin, None at the end."""
        with self._changed:
            while True:
                if self._error is not None:
                    return None
                if self._ready:
                    return self._ready.popleft()
                if self._waiting:
                    self._open += 1
                    return self._waiting.popleft()
                if self._open == 0:
                    self._changed.notify_all()
                    return None
                self._changed.wait()

    def _begin(self, jobs: list[Job]) -> None:
        first = jobs[0]
        unit: Unit[Any] = Unit(
            tuple(job.info for job in jobs), len(first.models), first.options or Options(), first.base is not None
        )
        state = UnitState(jobs, unit)
        if first.rule is None or state.numel == 0:
            state.decision = Copy(0)
            self._queue(state)
            return
        state.steps = first.rule.start(unit)
        self._advance(state, None)

    def _advance(self, state: UnitState, results: list[np.ndarray] | None) -> None:
        """Ask the rule for its next statistics, or for its decision; queue the next sweep."""
        assert state.steps is not None
        try:
            wanted = next(state.steps) if results is None else state.steps.send(results)
            state.statistics = state.active = list(wanted)
            for statistic in state.active:
                statistic.begin(state.numel)
            curious = [s for s in state.active if hasattr(s, "sample")]
            if curious and state.numel > self._chunk:
                sample = state.sample(self._device)
                for statistic in curious:
                    statistic.sample(sample)
            with self._changed:
                self._total += state.numel * max((s.sweeps for s in state.active), default=0)
        except StopIteration as stop:
            state.decision = stop.value
            state.active = []
        self._queue(state)

    def _queue(self, state: UnitState) -> None:
        tasks = []
        for job in state.jobs:
            if state.decision is not None and job.info.name in self._finished:
                self._take_over(job.info)
                continue
            size = job.chunk(self._chunk)
            starts = range(0, max(job.info.numel, 1), size)
            tasks += [Task(state, job, start, min(start + size, job.info.numel)) for start in starts]
            if state.decision is not None:
                state.left[job.info.name] = len(starts)
        with self._changed:
            state.pending = len(tasks)
            self._ready.extendleft(reversed(tasks))
            self._changed.notify_all()
        if not tasks:
            self._end_of_pass(state)

    def _process(self, task: Task) -> None:
        state = task.state
        if isinstance(state.decision, Copy):
            self._copy(task, state.decision.model)
        else:
            chunk = self._load(task)
            if state.decision is None:
                for statistic in state.active:
                    statistic.observe(chunk)
            else:
                if self._observer is not None:
                    self._observer.observe(chunk)
                self._store(task, state.decision(chunk))
        with self._changed:
            self._done += task.stop - task.start
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)
            state.pending -= 1
            ended = state.pending == 0 and self._error is None
            last_of_tensor = False
            if state.decision is not None:
                state.left[task.job.info.name] -= 1
                last_of_tensor = state.left[task.job.info.name] == 0 and self._error is None
        if last_of_tensor and self._on_finished is not None:
            self._on_finished(task.job.info.name, self._told(state, task.job.info.name))
        if ended:
            self._end_of_pass(state)

    def _end_of_pass(self, state: UnitState) -> None:
        """Called by the one thread that ended the pass."""
        state.first_pass = False
        if state.decision is not None:
            with self._changed:
                if state.unit.notes:
                    self._notes[state.unit.name] = state.unit.notes
                if state.unit.warnings:
                    self._warnings[state.jobs[0].info.name] = state.unit.warnings
                self._open -= 1
                self._changed.notify_all()
            return
        state.active = [s for s in state.active if not s.finish()]
        if state.active:
            with self._changed:
                self._total += state.numel
            self._queue(state)
        else:
            self._advance(state, [s.result for s in state.statistics])

    def _told(self, state: UnitState, name: str) -> dict[str, Any]:
        """Facts about a finished tensor, for a later run that goes on from here."""
        facts = self._facts.get(name, _Facts())
        told: dict[str, Any] = {"saturated": facts.saturated, "non_finite": facts.non_finite}
        if self._observer is not None:
            told["observed"] = self._observer.facts(name)
        if len(state.jobs) == 1:
            told |= {"notes": state.unit.notes, "warnings": state.unit.warnings}
        return told

    def _taken_over(self, unit: list[Job]) -> bool:
        """Whether an earlier run finished this unit, a single tensor; a larger one needs its statistics again."""
        name = unit[0].info.name
        if len(unit) > 1 or name not in self._finished:
            return False
        told = self._finished[name]
        self._take_over(unit[0].info)
        if told["notes"]:
            self._notes[name] = told["notes"]
        if told["warnings"]:
            self._warnings[name] = told["warnings"]
        self._done += unit[0].info.numel
        return True

    def _take_over(self, info: TensorInfo) -> None:
        told = self._finished[info.name]
        self._facts[info.name] = _Facts(told["saturated"], {k: dict(v) for k, v in told["non_finite"].items()})
        if self._observer is not None:
            self._observer.restore(info, told["observed"])

    def _load(self, task: Task) -> Chunk[Any]:
        state, job = task.state, task.job
        if state.kept is not None:
            return state.kept
        whole = task.stop - task.start == job.info.numel
        rows = read_rows(job.sources, task.start, task.stop, None if whole else self._scratch)
        if state.first_pass:
            self._check_rows(job, rows)
        chunk = as_chunk(job, task.start, rows, self._device)
        if len(state.jobs) == 1 and whole:
            state.kept = chunk
        return chunk

    def _found(self, name: str) -> _Facts:
        with self._changed:
            return self._facts.setdefault(name, _Facts())

    def _check_rows(self, job: Job, rows: StoredRows | Sequence[Tensor]) -> None:
        if isinstance(rows, StoredRows) and all_within(rows.array, rows.dtype):
            return
        each = rows.array if isinstance(rows, StoredRows) else map(as_array, rows)
        for i, (source, row) in enumerate(zip(job.sources, each, strict=True)):
            self._check_finite(job, source, i, row)

    def _check_finite(self, job: Job, source: TensorSource, model: int, values: np.ndarray) -> None:
        if all_within(values, stored_dtype(source)):
            return
        label = job.labels[model] if model < len(job.labels) else f"model {model + 1}"
        nans, infinities = count_non_finite(source)
        self._found(job.info.name).non_finite.setdefault(label, {})[source.name] = nans + infinities
        if not self._allow_nan:
            what = f"{source.name} holds {nans} NaN and {infinities} infinite of {numel(source)} values"
            raise UserError(
                "RG206", what, where=label, fix="repair that model, or pass --allow-nan to merge them as they are"
            )

    def _store(self, task: Task, result: Values) -> None:
        dtype = task.job.out_dtype
        stored, within = narrow(result, dtype)
        if not within:
            values = result if isinstance(result, np.ndarray) else result.cpu().numpy()
            lost = int(((abs(values) > largest_value(dtype)) & np.isfinite(values)).sum())
            facts = self._found(task.job.info.name)
            with self._changed:
                facts.saturated += lost
        self._write(task.job.info.name, task.start, stored)

    def _copy(self, task: Task, model: int) -> None:
        job = task.job
        source = job.models[model]
        rows = read_rows([source], task.start, task.stop, self._scratch)
        assert isinstance(rows, StoredRows)
        values, dtype = rows.array[0], rows.dtype
        if is_float(dtype):
            self._check_finite(job, source, model, values)
            if dtype != job.out_dtype:
                self._store(task, rows.tensor[0].to(DTYPES["F64" if dtype == "F64" else "F32"]))
                return
        self._write(job.info.name, task.start, values)
