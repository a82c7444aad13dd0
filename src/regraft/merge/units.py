"""What the engine keeps of a unit while its chunks are on their way: the rule's steps, statistics and decision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoint.tensor import Scratch, TensorSource, numel, read_rows
from regraft.merge.jobs import DEFAULT_CHUNK, Job
from regraft.merge.rule import Chunk, Steps, Unit
from regraft.merge.statistics import Statistic

# A statistic that wants to look at a sample first sees this many runs of elements from all over a tensor, or the model.
_SAMPLES, _SAMPLES_OF_MODEL = 8, 128
_SAMPLE_LENGTH = 4096


@dataclass(eq=False)
class UnitState:
    jobs: list[Job]
    unit: Unit[Any]
    steps: Steps | None = None
    statistics: list[Statistic] = field(default_factory=list)
    active: list[Statistic] = field(default_factory=list)
    decision: Any = None  # how to combine, once the rule has returned it
    pending: int = 0
    left: dict[str, int] = field(default_factory=dict)  # chunks to go in the last pass, by tensor
    first_pass: bool = True
    kept: Chunk[Any] | None = None  # the only chunk of a small unit, kept between sweeps

    @property
    def numel(self) -> int:
        return sum(job.info.numel for job in self.jobs)

    def sample(self, device: torch.device) -> Chunk[Any]:
        """Runs of elements from all over the unit, one after another as if they were one chunk."""
        step = max(self.numel // (_SAMPLES if len(self.jobs) == 1 else _SAMPLES_OF_MODEL), 1)
        pieces: list[Chunk[Any]] = []
        passed, wanted = 0, step // 2
        for job in self.jobs:
            while wanted < passed + job.info.numel:
                length = -(-_SAMPLE_LENGTH // job.grain) * job.grain
                start = min(wanted - passed, max(job.info.numel - length, 0)) // job.grain * job.grain
                stop = min(start + length, job.info.numel)
                pieces.append(read_chunk(job, start, stop, device))
                wanted += max(step, length)
            passed += job.info.numel
        rows = torch.cat([torch.cat([p.models, p.base.unsqueeze(0)]) if p.has_base else p.models for p in pieces], 1)
        return Chunk(self.jobs[0].info, self.jobs[0].options, 0, rows, pieces[0].has_base)


@dataclass(frozen=True)
class Task:
    state: UnitState
    job: Job
    start: int
    stop: int


def read_chunk(job: Job, start: int, stop: int, device: torch.device, scratch: Scratch | None = None) -> Chunk[Any]:
    """Elements `[start, stop)` of all that a job reads, on a device; with a `scratch`, until its next use."""
    raw = read_rows(job.sources, start, stop, scratch)
    rows = raw.to(device) if isinstance(raw, Tensor) else [row.to(device) for row in raw]
    return Chunk(job.info, job.options, start, rows, job.base is not None, job.arithmetic, job.block)


def count_non_finite(source: TensorSource) -> tuple[int, int]:
    """(NaN, infinite) values in a whole tensor, read in chunks."""
    nans = infinities = 0
    total = numel(source)
    for start in range(0, total, DEFAULT_CHUNK):
        values = source.read(start, min(start + DEFAULT_CHUNK, total)).to(torch.float64)
        nans += int(torch.isnan(values).sum())
        infinities += int(torch.isinf(values).sum())
    return nans, infinities
