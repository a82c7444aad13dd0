"""What the engine keeps of a unit while its chunks are on their way: the rule's steps, statistics and decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.tensor import StoredRows, TensorSource, numel, read_rows
from regraft.merge.jobs import DEFAULT_CHUNK, Job
from regraft.merge.rule import Chunk, Steps, Unit
from regraft.merge.statistics import Statistic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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

    def sample(self, device: torch.device | None) -> Chunk[Any]:
        """Runs of elements from all over the unit, one after another as if they were one chunk."""
        step = max(self.numel // (_SAMPLES if len(self.jobs) == 1 else _SAMPLES_OF_MODEL), 1)
        pieces: list[Chunk[Any]] = []
        passed, wanted = 0, step // 2
        for job in self.jobs:
            while wanted < passed + job.info.numel:
                length = -(-_SAMPLE_LENGTH // job.grain) * job.grain
                start = min(wanted - passed, max(job.info.numel - length, 0)) // job.grain * job.grain
                stop = min(start + length, job.info.numel)
                pieces.append(as_chunk(job, start, read_rows(job.sources, start, stop), device))
                wanted += max(step, length)
            passed += job.info.numel
        first, rows = pieces[0], [p.stored for p in pieces]
        joined: Any
        if first.stored is not None and all(r is not None and r.dtype == first.stored.dtype for r in rows):
            joined = StoredRows(np.concatenate([r.array for r in rows if r is not None], 1), first.stored.dtype)
        else:
            import torch

            joined = torch.cat(
                [torch.cat([p.models, p.base.unsqueeze(0)]) if p.has_base else p.models for p in pieces], 1
            )
        return Chunk(first.info, first.options, 0, joined, first.has_base, first.arithmetic)


@dataclass(frozen=True)
class Task:
    state: UnitState
    job: Job
    start: int
    stop: int


def as_chunk(job: Job, start: int, read: StoredRows | Sequence[Tensor], device: torch.device | None) -> Chunk[Any]:
    """What was read of a job's sources from element `start` on, on an accelerator if one is given."""
    rows: Any = read
    if device is not None:
        rows = rows.tensor.to(device) if isinstance(rows, StoredRows) else [row.to(device) for row in rows]
    return Chunk(job.info, job.options, start, rows, job.base is not None, job.arithmetic, job.block)


def count_non_finite(source: TensorSource) -> tuple[int, int]:
    """(NaN, infinite) values in a whole tensor, read in chunks."""
    nans = infinities = 0
    total = numel(source)
    for start in range(0, total, DEFAULT_CHUNK):
        values = source.read(start, min(start + DEFAULT_CHUNK, total)).double()
        nans += int(values.isnan().sum())
        infinities += int(values.isinf().sum())
    return nans, infinities
