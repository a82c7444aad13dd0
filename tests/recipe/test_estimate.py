"""What a plan says of memory and time beforehand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from regraft.checkpoint.tensor import BLOCK, MemoryTensor
from regraft.merge.jobs import Job, predict_memory
from regraft.merge.rule import TensorInfo
from regraft.methods import method
from regraft.recipe.estimate import RUN_BYTES, Estimate, estimate, process_memory


def job(rule: str, shape: tuple[int, ...], *, seed: int = 0) -> Job:
    made = method("merge", rule)
    generator = torch.Generator().manual_seed(seed)
    base, *models = (MemoryTensor("w", torch.randn(shape, generator=generator)) for _ in range(3))
    options = made.resolve(2, {})
    info = TensorInfo("w", shape)
    return Job(info, tuple(models), "F32", made, options, base, ("a", "b", "base"))


def cost(jobs: list[Job], *, moved: int = 0, workers: int = 2, chunk: int = BLOCK) -> Estimate:
    return estimate(jobs, moved, workers=workers, chunk=chunk, device="cpu")


def test_time_is_that_of_moving_the_bytes_and_of_what_the_rule_takes_for_a_sample() -> None:
    small, large = job("ties", (4 * BLOCK,)), job("ties", (400 * BLOCK,))
    still = cost([small])
    assert cost([small], moved=10**11).seconds > 99
    assert still.seconds < 10
    assert cost([large]).seconds > 10 * still.seconds


def test_memory_is_measured_beside_what_the_process_has() -> None:
    """In a process of its own: one that has had more memory gives it to what is measured."""
    code = (
        "from regraft.recipe.estimate import process_memory\n"
        "from test_estimate import cost, job\n"
        "before = process_memory()\n"
        "few, many = (cost([job('ties', (1 << 23,))], chunk=chunk).memory_bytes for chunk in (1 << 14, 1 << 22))\n"
        "print(before, few, many)\n"
    )
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    before, few, many = map(int, done.stdout.split())
    assert 10 << 20 < before < few
    # Chunks of 2^22 hold three rows of 16 MB in each of two threads at least.
    assert many > few + 2 * 3 * (1 << 24) // 2


def test_memory_of_rules_that_need_whole_matrices_is_computed() -> None:
    jobs = [job("tsvm", (64, 48))]
    before = process_memory()
    expected = RUN_BYTES + predict_memory(jobs, 2, BLOCK)
    assert abs(cost(jobs).memory_bytes - before - expected) < 4 << 20
