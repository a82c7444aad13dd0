"""Run claims over seeds, several at a time, and keep each seed's figures as soon as they are there."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from regraft.claims.find import Found, load
from regraft.claims.paper_scale import Inputs
from regraft.claims.results import Results, results_of, surroundings
from regraft.claims.zoo import NotGoodEnoughError, models_used
from regraft.errors import UserError
from regraft.merge.torch_threads import one_thread_each


@dataclass(frozen=True)
class Task:
    """One seed of one claim."""

    path: Path
    seed: int
    scale: str
    inputs: Inputs | None = None


def run_claims(
    found: Sequence[Found],
    seeds: Sequence[int],
    results: Path,
    *,
    scale: str = "laptop",
    inputs: Inputs | None = None,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Results]:
    """Run what is missing of some claims, and return what there is then.

    Args:
        found: the claims.
        seeds: the seeds wanted; those that the results have already are not run again.
        results: the folder of the results.
        scale: "laptop", "smoke" (seconds, no verdict) or "paper" (the user's own models and data: `inputs`).
        jobs: processes at a time, each with one thread; one per core if None.
        say: is told what is done.

    Raises:
        UserError: RG903 for a claim that cannot be run at this scale, RG904 for results that cannot be used.
        NotGoodEnoughError: after everything else has been run, if a model was no better than its baseline.
    """
    check_scale(found, scale, inputs)
    every = [results_of(one, results, scale) for one in found]
    for one in every:
        if one.earlier_code:
            say(f"note: the results of claim {one.claim.number:02d} were made by another state of its code; run again")
    todo = {
        Task(one.path, seed, scale, inputs): kept
        for one, kept in zip(found, every, strict=True)
        for seed in seeds
        if str(seed) not in kept.seeds
    }
    around = surroundings(found[0].path.parent) if found else {}
    jobs = min(jobs or os.cpu_count() or 1, len(todo))
    refused: list[NotGoodEnoughError] = []
    for task, record in _in_processes(list(todo), jobs) if jobs > 1 else _here(todo):
        name = f"claim {todo[task].claim.number:02d}, seed {task.seed}"
        if isinstance(record, NotGoodEnoughError):
            refused.append(record)
            say(f"{name}: not run, because {record}")
            continue
        todo[task].add(task.seed, {**record, **around})
        say(f"{name}: {record['seconds']:.0f} s")
    if refused:
        raise refused[0]
    return every


def check_scale(found: Sequence[Found], scale: str, inputs: Inputs | None) -> None:
    """Refuse the scale of the papers without models and data, and for claims that have no hook for them."""
    if scale != "paper":
        return
    if inputs is None:
        fix = "name a file of models and data by --inputs; regraft claims run --help says what is in it"
        raise UserError("RG903", "the scale of the papers needs your own models and data", fix=fix)
    for one in found:
        if one.claim.at_paper_scale is None:
            raise UserError(
                "RG903", f"claim {one.name} trains its own models and has no hook for others", fix="leave it out"
            )


def perform(task: Task) -> dict[str, Any]:
    """Run one seed in this process: its figures, the models that it used, and the processor time that it took."""
    claim = load(task.path).claim
    started = time.process_time()
    with models_used() as models, one_thread_each():
        torch.manual_seed(task.seed)
        if task.inputs is not None and claim.at_paper_scale is not None:
            figures = claim.at_paper_scale(task.seed, task.inputs)
        else:
            figures = claim.run(task.seed, task.scale)
    unfit = [name for name, value in figures.items() if not math.isfinite(value)]
    if unfit:
        raise RuntimeError(f"claim {claim.number:02d}, seed {task.seed}: {', '.join(unfit)} is no finite number")
    rounded = {name: round(float(value), 6) for name, value in figures.items()}
    return {"figures": rounded, "models": models, "seconds": round(time.process_time() - started, 1)}


Outcome: TypeAlias = "dict[str, Any] | NotGoodEnoughError"


def _here(tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
    for task in tasks:
        yield _perform(task)


def _in_processes(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, Outcome]]:
    # Fresh processes: forking one that has started threads of torch's may leave locks held for ever.
    with multiprocessing.get_context("spawn").Pool(jobs, _ignore_interrupts) as pool:
        yield from pool.imap_unordered(_perform, tasks)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the one that waits for them ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _perform(task: Task) -> tuple[Task, Outcome]:
    """A model that is not good enough is no reason to lose what else is under way."""
    try:
        return task, perform(task)
    except NotGoodEnoughError as error:
        return task, error
