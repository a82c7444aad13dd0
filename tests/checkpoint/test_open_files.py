"""Writing past the page cache: any slices in any order from many threads, and file systems that refuse."""

from __future__ import annotations

import errno
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from regraft.checkpoint import open_files, shards
from regraft.checkpoint.open_files import ALIGNMENT, OpenFiles
from regraft.checkpoint.writer import ModelWriter, TensorSpec

SIZE = 40 * ALIGNMENT + 123
REAL = os.pwrite


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(open_files, "WORTHWHILE", 0)
    (tmp_path / "x").write_bytes(bytes(SIZE))
    return tmp_path / "x"


def written(file: Path, data: bytes, seed: int) -> bytes:
    """What the file holds after `data` was written in random slices by four threads."""
    rng = random.Random(seed)
    cuts = sorted({0, SIZE, *(rng.randrange(SIZE) for _ in range(30)), *range(0, 9 * ALIGNMENT, 3 * ALIGNMENT)})
    slices = list(itertools.pairwise(cuts))
    rng.shuffle(slices)
    files = OpenFiles({file: SIZE})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda s: files.write(file, memoryview(data)[s[0] : s[1]], s[0]), slices))
    files.close()
    return file.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_slices_in_any_order(file: Path, seed: int) -> None:
    data = random.Random(seed).randbytes(SIZE)
    assert written(file, data, seed) == data


def test_a_slice_longer_than_the_buffer(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_BUFFER", 2 * ALIGNMENT)
    data = random.Random(9).randbytes(SIZE)
    files = OpenFiles({file: SIZE})
    files.write(file, memoryview(data), 0)
    files.close()
    assert file.read_bytes() == data


def test_whole_blocks_go_past_the_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def watched(descriptor: int, data: memoryview, at: int) -> int:
        calls.append((at, len(data)))
        return REAL(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", watched)
    files = OpenFiles({file: SIZE})
    files.write(file, memoryview(b"x" * (3 * ALIGNMENT)), 100)
    files.close()
    assert sorted(calls) == [(100, ALIGNMENT - 100), (ALIGNMENT, 2 * ALIGNMENT), (3 * ALIGNMENT, 100)]


def test_a_file_system_that_refuses(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *rest)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    data = random.Random(5).randbytes(SIZE)
    assert written(file, data, 5) == data
    assert 1 <= len(refused) <= 4  # threads that were there at once; nobody tries again


def test_a_disk_that_fills_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes a part of what it is given, then nothing."""
    left = [ALIGNMENT + 100]

    def full(descriptor: int, data: memoryview, at: int) -> int:
        taken = min(left[0], len(data))
        left[0] -= taken
        return taken

    monkeypatch.setattr(os, "pwrite", full)
    files = OpenFiles({file: SIZE})
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        files.write(file, memoryview(bytes(4 * ALIGNMENT)), 0)
    assert caught.value.errno == errno.ENOSPC
    files.close()
    with pytest.raises(RuntimeError, match="closed"):
        files.write(file, memoryview(b"x"), 0)


def test_large_files_have_aligned_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "WORTHWHILE", 10**4)
    monkeypatch.setattr(shards, "WORTHWHILE", 10**4)
    values = torch.arange(10**4, dtype=torch.float32)
    with ModelWriter(tmp_path / "out", [TensorSpec("a", (10**4,), "F32")]) as w:
        for at in range(0, 10**4, 999):
            w.write("a", at, values[at : at + 999])
        w.publish()
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    assert begin % ALIGNMENT == 0
    assert raw[begin:] == values.numpy().tobytes()
