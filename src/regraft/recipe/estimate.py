"""How much memory and time a plan will take: measured by running its rules on a sample, or else computed."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regraft.checkpoint.tensor import StoredTensor, TensorSource, nbytes, stored_dtype
from regraft.merge.diagnostics import TaskVectorStatistics
from regraft.merge.engine import run_jobs
from regraft.merge.jobs import DEFAULT_CHUNK, Job, all_compiled, predict_memory
from regraft.merge.rule import TensorInfo
from regraft.merge.storage import narrow

# Disk and page cache, both ways: what a laptop's solid-state disk sustains. Only the estimate depends on it.
_BYTES_PER_SECOND = 1.0e9
# What a run adds to the program whatever it computes: compiled loops, and what allocators keep for threads (measured).
RUN_BYTES = 130 << 20
# What looking at the task vectors of real tensors adds to that of a sample: pieces of many sizes, whose memory the
# allocators keep, those of torch more than those of compiled loops (measured).
_OBSERVER_BYTES, _OBSERVER_BYTES_COMPILED = 75 << 20, 20 << 20
# Chunks that each worker gets of a sample, so that memory which is used again is not counted again.
_CHUNKS = 2
_SAMPLE_SECONDS = 0.002


def process_memory() -> int:
    """Private resident bytes of this process now: libraries' data and the interpreter; models are not held.

    Pages of files do not count: the system takes them back when it needs memory. Where it does not tell them apart
    (elsewhere than on Linux), they are in the number.
    """
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123 - not a real file
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon:", "RssShmem:")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Estimate:
    """What jobs take: `seconds` in all, and the peak of the private memory of the process."""

    seconds: float
    memory_bytes: int


def estimate(jobs: Sequence[Job], bytes_moved: int, *, workers: int, chunk: int, device: str) -> Estimate:
    """Run the jobs' rule on random numbers of the same dtypes, in as many threads and chunks of the same size.

    Memory is measured on Linux for work on the processor, else computed, as is that of rules which need whole matrices.
    """
    moved, before = bytes_moved / _BYTES_PER_SECOND, process_memory()
    computed = before + RUN_BYTES + predict_memory(jobs, workers, chunk)
    merged = [job for job in jobs if job.rule is not None]
    if not merged or (largest := max(merged, key=lambda job: job.info.numel)).info.numel == 0:
        return Estimate(moved, computed)
    cut = largest.grain < largest.info.numel or largest.info.numel == 1
    length = min(largest.info.numel, _CHUNKS * chunk if cut and device == "cpu" else DEFAULT_CHUNK)
    grain = largest.grain if cut else 1
    length = -(-length // grain) * grain
    sample = [_sample(largest, (length // grain, grain) if grain > 1 else (length,), n) for n in range(workers)]
    with _Peak() as peak:
        _run(sample, workers, chunk)  # the first call pays for lazy set-up
    begun = time.perf_counter()
    _run(sample, workers, chunk)
    per_element = (time.perf_counter() - begun) / (length * workers)
    seconds = moved + per_element * sum(j.info.numel for j in merged)
    measurable = sys.platform == "linux" and cut and device == "cpu"
    held = sum(nbytes(source) for job in sample for source in job.sources)
    observer = _OBSERVER_BYTES_COMPILED if all_compiled(jobs, device) else _OBSERVER_BYTES
    measured = peak.bytes - held + (observer if largest.base is not None else 0)
    return Estimate(seconds, measured if measurable else computed)


def _run(sample: Sequence[Job], workers: int, chunk: int) -> None:
    first = sample[0]
    observer = TaskVectorStatistics(len(first.models)) if first.base is not None else None
    run_jobs(sample, lambda name, start, values: None, workers=workers, chunk=chunk, observer=observer)


def _sample(job: Job, shape: tuple[int, ...], number: int) -> Job:
    """A job like this one on random numbers."""
    generator = np.random.default_rng(number)
    name = f"sample {number}"
    info = TensorInfo(name, shape, job.info.layer, job.info.num_layers, job.info.stack)
    base = generator.standard_normal(info.numel, np.float32)

    def near(source: TensorSource, distance: float) -> StoredTensor:
        values = base + np.float32(distance) * generator.standard_normal(info.numel, np.float32)
        stored = stored_dtype(source)
        return StoredTensor(name, shape, stored, narrow(values, stored)[0])

    models = tuple(near(source, 0.01) for source in job.models)
    reference = near(job.base, 0.0) if job.base is not None else None
    return Job(info, models, job.out_dtype, job.rule, job.options, reference, double=job.double)


class _Peak(threading.Thread):
    """The most private memory that the process has had while this was open."""

    def __init__(self) -> None:
        super().__init__(name="memory", daemon=True)
        self.bytes = process_memory()
        self._ended = threading.Event()

    def __enter__(self) -> _Peak:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, process_memory())
