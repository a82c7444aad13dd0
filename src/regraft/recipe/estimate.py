"""How much memory and time a plan will take: computed from the jobs, and measured on a small sample of them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence

import torch

from regraft.checkpoint.tensor import MemoryTensor
from regraft.merge.engine import run_jobs
from regraft.merge.jobs import DEFAULT_CHUNK, Job
from regraft.merge.rule import TensorInfo

# Disk and page cache, both ways: what a laptop's solid-state disk sustains. Only the estimate depends on it.
_BYTES_PER_SECOND = 1.0e9


def process_memory() -> int:
    """Resident bytes of this process now (libraries and interpreter; models are not held)."""
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a real file
            return int(file.read().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def estimate_seconds(jobs: Sequence[Job], bytes_moved: int, workers: int) -> float:
    """Seconds that the jobs will take: their rule is timed on one chunk of random numbers, the rest is proportion."""
    seconds = bytes_moved / _BYTES_PER_SECOND
    merged = [job for job in jobs if job.rule is not None]
    if not merged:
        return seconds
    largest = max(merged, key=lambda job: job.info.numel)
    length = min(largest.info.numel, DEFAULT_CHUNK)
    if length == 0:
        return seconds
    generator = torch.Generator().manual_seed(0)
    info = TensorInfo("sample", (length,), largest.info.layer, largest.info.num_layers, largest.info.stack)
    base = torch.randn(length, generator=generator)
    models = tuple(
        MemoryTensor("sample", (base + 0.01 * torch.randn(length, generator=generator)).to(s.dtype))
        for s in largest.models
    )
    reference = MemoryTensor("sample", base.to(largest.base.dtype)) if largest.base is not None else None
    job = Job(info, models, largest.out_dtype, largest.rule, largest.options, reference, double=largest.double)
    run_jobs([job], lambda name, start, values: None, workers=1)  # the first call pays for lazy set-up
    begun = time.perf_counter()
    run_jobs([job], lambda name, start, values: None, workers=1)
    per_element = (time.perf_counter() - begun) / length
    return seconds + per_element * sum(j.info.numel for j in merged) / workers
