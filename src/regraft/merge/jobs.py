"""What the engine works on: one job per output tensor, grouped by what is decided on together, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regraft.checkpoint.dtypes import item_size
from regraft.checkpoint.tensor import BLOCK, TensorSource, stored_dtype
from regraft.errors import UserError
from regraft.merge.rule import Rule, TensorInfo, field_names
from regraft.merge.selection import table_bytes
from regraft.methods import Options

# Elements; a chunk of a few models then stays in the processor's cache, and calls are few against the work in them.
DEFAULT_CHUNK = 1 << 19
# On an accelerator a chunk has to keep all of it busy.
_ACCELERATOR_CHUNK = 1 << 24
# Tensors of chunk length that a rule holds at its peak, per model row (measured over the rules; used for estimates).
_ROWS_PER_MODEL = 5
# Tables of order statistics that are there at once, per worker: of the units in progress, and the sums of all threads.
_TABLES = 4


@dataclass(frozen=True)
class Job:
    """One output tensor: by a rule from the same tensor of several models, or (`rule=None`) a bit-exact copy.

    `labels` name the models in messages, the base last; `double` asks for float64 arithmetic whatever the dtypes are.
    Dtypes are named as in safetensors.
    """

    info: TensorInfo
    models: tuple[TensorSource, ...]
    out_dtype: str
    rule: Rule[Any] | None = None
    options: Options | None = None
    base: TensorSource | None = None
    labels: tuple[str, ...] = ()
    double: bool = False

    @property
    def sources(self) -> tuple[TensorSource, ...]:
        """What is read: the models, then the base if there is one."""
        return (*self.models, self.base) if self.base is not None else self.models

    @property
    def scope(self) -> str:
        return "tensor" if self.rule is None else self.rule.scope(self.options)

    @property
    def grain(self) -> int:
        """Elements that the rule needs to see together."""
        span = "elements" if self.rule is None else self.rule.span(self.options)
        whole = max(self.info.numel, 1)
        matrix = whole if self.info.is_matrix else 1
        return {"elements": 1, "rows": self.info.width, "matrices": matrix, "tensor": whole}[span]

    @property
    def block(self) -> int:
        """Chunks of this tensor start at multiples of so many elements."""
        return BLOCK if self.grain == 1 else self.grain

    def chunk(self, wanted: int) -> int:
        """Elements per chunk: `wanted`, in whole blocks."""
        return max(wanted // self.block, 1) * self.block

    @property
    def arithmetic(self) -> str:
        """ "F64" if it is asked for or if an input or the output is, else "F32"."""
        return "F64" if self.double or "F64" in (self.out_dtype, *map(stored_dtype, self.sources)) else "F32"

    @property
    def compiled(self) -> bool:
        """Whether compiled loops do all of it on the processor, without torch."""
        if not all(getattr(source, "bare", False) for source in self.sources):
            return False
        dtypes = {stored_dtype(source) for source in self.sources}
        if self.rule is None:
            return dtypes == {self.out_dtype}
        served = {"BF16", "F32"}
        return not self.double and len(dtypes) == 1 and {*dtypes, self.out_dtype} <= served and self._served()

    def _served(self) -> bool:
        return self.rule is not None and self.rule.compiled(self.options)


def group(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs that are decided on together, in order.

    Raises:
        UserError: RG303 if an option that must be the same for the whole model is not.
    """
    units: list[list[Job]] = []
    whole: dict[str, list[Job]] = {}
    for job in jobs:
        if job.rule is None or job.scope == "tensor":
            units.append([job])
            continue
        if job.rule.name not in whole:
            whole[job.rule.name] = []
            units.append(whole[job.rule.name])
        _check_same(whole[job.rule.name], job)
        whole[job.rule.name].append(job)
    return units


def scope_option(rule: Rule[Any]) -> str | None:
    """The option by which a rule decides on single tensors, such as `trim_scope`; None if it has no choice."""
    return next((name for name in field_names(rule.options) if name.endswith("scope")), None)


def _check_same(unit: list[Job], job: Job) -> None:
    if not unit:
        return
    rule, first = job.rule, unit[0]
    assert rule is not None
    if len(job.models) != len(first.models):
        what = f"{rule.name} looks at the whole model, but {job.info.name} has {len(job.models)} models"
        fix = "set its scope to tensor" if scope_option(rule) else "give all slices as many models"
        raise UserError("RG303", what, where=f"{first.info.name} has {len(first.models)}", fix=fix)
    for name in rule.model_wide:
        here, there = getattr(job.options, name), getattr(first.options, name)
        if here != there:
            what = f"{rule.name} looks at the whole model, but {name} varies: {there} and {here}"
            where = f"{first.info.name} and {job.info.name}"
            otherwise = ", or set the rule's scope to tensor" if scope_option(rule) else ""
            raise UserError("RG303", what, where=where, fix=f"use one {name}{otherwise}")


def default_chunk(device: str) -> int:
    """Elements per chunk where the user names none, on a device by the name that torch has for it."""
    return DEFAULT_CHUNK if on_processor(device) else _ACCELERATOR_CHUNK


def on_processor(device: str) -> bool:
    """Whether this is no accelerator."""
    return device.partition(":")[0] == "cpu"


def default_workers() -> int:
    """As many threads as this process may use cores, and one that computes while another waits for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def all_compiled(jobs: Sequence[Job], device: str) -> bool:
    """Whether compiled loops do all of it, so that torch is not needed."""
    return on_processor(device) and all(job.compiled for job in jobs)


def predict_memory(jobs: Sequence[Job], workers: int, chunk: int) -> int:
    """Peak bytes of tensors held by a run, beside the program itself."""
    largest = 0
    for job in jobs:
        length = min(job.chunk(chunk), max(job.info.numel, 1))
        rows = 1 if job.rule is None else (len(job.models) + 1) * _ROWS_PER_MODEL + job.rule.rows_beside
        wanted = length * rows * item_size(job.arithmetic)
        if job.rule is not None and job.rule.order_statistics:
            wanted += _TABLES * table_bytes(len(job.models), job.rule.order_statistics)
        largest = max(largest, wanted)
    return largest * workers


def fit_memory(jobs: Sequence[Job], limit: int, *, workers: int, chunk: int) -> tuple[int, int]:
    """(workers, chunk) that keep `predict_memory` below `limit` bytes.

    Raises:
        UserError: RG403 with the number needed.
    """
    while predict_memory(jobs, workers, chunk) > limit:
        if chunk > BLOCK:
            chunk = max(BLOCK, chunk // 2 // BLOCK * BLOCK)
        elif workers > 1:
            workers -= 1
        else:
            need = predict_memory(jobs, workers, chunk)
            what = (
                f"the run needs {need / 1e6:.0f} MB beside the program itself, and {limit / 1e6:.0f} MB are left for it"
            )
            raise UserError("RG403", what, fix="raise --max-memory, or merge fewer models in one step")
    return workers, chunk
