"""Writing weights: any dtype, in slices, from many threads; readable by others."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

import models
from regraft.checkpoint import open_files, writer
from regraft.checkpoint.dtypes import DTYPES, dtype_name
from regraft.checkpoint.writer import ModelWriter, TensorSpec
from regraft.errors import UserError


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()]


def save(out: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> None:
    with ModelWriter(out, specs_of(tensors), **settings) as w:
        for name, tensor in tensors.items():
            w.write(name, 0, tensor.reshape(-1))
        w.publish()


def load(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    raw = [{k: v.contiguous().reshape(-1).view(torch.uint8) for k, v in x.items()} for x in (a, b)]
    return {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()} and all(
        torch.equal(raw[0][k], raw[1][k]) for k in a
    )


def small(n: int = 4, size: int = 100) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.arange(size, dtype=torch.float32) + i for i in range(n)}


def refused(code: str, *args: Any, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        ModelWriter(*args, **settings)
    assert caught.value.code == code
    return caught.value


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (3 * 5 * dtype.itemsize,), dtype=torch.uint8)
    tensors = {"x": bits.view(dtype).reshape(3, 5), "odd": torch.ones(3, dtype=torch.int8)}
    save(tmp_path / "out", tensors)
    assert same(load(tmp_path / "out"), tensors)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 7), "last": torch.ones(2, dtype=torch.uint8)}
    save(tmp_path / "out", tensors)
    assert same(load(tmp_path / "out"), tensors)


def test_transformers_loads_shards(tmp_path: Path) -> None:
    model = models.model("llama")
    state = {k: v.detach() for k, v in model.state_dict().items()}
    with ModelWriter(tmp_path / "out", specs_of(state), shard_bytes=20_000) as w:
        for name, tensor in state.items():
            w.write(name, 0, tensor.reshape(-1))
        model.config.save_pretrained(w.staging)
        w.publish()
    loaded, info = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same({k: v.detach() for k, v in loaded.state_dict().items()}, state)


def test_slices_in_any_order_from_many_threads(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(37, 53).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(8)}
    pieces = [(name, at, t.reshape(-1)[at : at + 91]) for name, t in tensors.items() for at in range(0, t.numel(), 91)]
    random.Random(0).shuffle(pieces)
    with ModelWriter(tmp_path / "out", specs_of(tensors), shard_bytes=10_000) as w:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda piece: w.write(*piece), pieces))
        w.publish()
    assert same(load(tmp_path / "out"), tensors)


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "MOST_OPEN", 2)
    tensors = small(9, 64)
    with ModelWriter(tmp_path / "out", specs_of(tensors), shard_bytes=1) as w:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda at: [w.write(n, at, t[at : at + 8]) for n, t in tensors.items()], range(0, 64, 8)))
        assert len(w._files._open) <= 4
        w.publish()
    assert same(load(tmp_path / "out"), tensors)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30))
def test_ranges_count_every_element_once(pairs: list[tuple[int, int]]) -> None:
    ranges, elements = writer._Ranges(), set()
    for a, b in pairs:
        ranges.add(min(a, b), max(a, b))
        elements |= set(range(min(a, b), max(a, b)))
    assert ranges.count == len(elements)


def test_publish_refuses_holes(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(small(2))) as w:
        w.write("t0", 0, torch.zeros(100))
        w.write("t1", 0, torch.zeros(40))
        w.write("t1", 41, torch.zeros(59))
        assert w.missing() == {"t1": 1}
        with pytest.raises(RuntimeError, match=r"t1 \(1\)"):
            w.publish()
        assert not (tmp_path / "out").exists()
        w.write("t1", 40, torch.zeros(1))
        w.publish()
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "start", "values", "says"),
    [
        ("nope", 0, torch.zeros(1), "no tensor"),
        ("t0", 0, torch.zeros(1, dtype=torch.float16), "float16"),
        ("t0", 0, torch.zeros(1, 1), "2 dimensions"),
        ("t0", 0, torch.zeros(1, device="meta"), "meta"),
        ("t0", 99, torch.zeros(2), r"\[99, 101\)"),
        ("t0", -1, torch.zeros(1), r"\[-1, 0\)"),
    ],
)
def test_wrong_slices_are_refused(tmp_path: Path, name: str, start: int, values: torch.Tensor, says: str) -> None:
    with ModelWriter(tmp_path / "out", specs_of(small(1))) as w, pytest.raises(ValueError, match=says):
        w.write(name, start, values)


def test_write_needs_an_open_writer(tmp_path: Path) -> None:
    w = ModelWriter(tmp_path / "out", specs_of(small(1)))
    with pytest.raises(RuntimeError, match="not open"):
        w.write("t0", 0, torch.zeros(100))
    with w:
        w.write("t0", 0, torch.zeros(100))
        w.publish()
        with pytest.raises(RuntimeError, match="not open"):
            w.write("t0", 0, torch.zeros(100))
        with pytest.raises(RuntimeError, match="not open"):
            w.publish()


def test_abort_waits_for_writes_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, entered, results = os.pwrite, threading.Event(), []

    def slow(descriptor: int, data: memoryview, at: int) -> int:
        entered.set()
        time.sleep(0.2)
        os.fstat(descriptor)  # raises if it was closed under us
        results.append("written")
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    with ModelWriter(tmp_path / "out", specs_of(small(1))) as w:
        thread = threading.Thread(target=w.write, args=("t0", 0, torch.zeros(100)))
        thread.start()
        entered.wait()
    assert results == ["written"]
    thread.join()


def test_disk_too_small(tmp_path: Path) -> None:
    error = refused("RG402", tmp_path / "out", [TensorSpec("x", (10**9, 10**9), "F32")])
    assert "4000000000.00 GB" in str(error)
    refused("RG402", tmp_path / "out", specs_of(small()), extra_bytes=10**18)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_disk_full_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(os, call, full, raising=False)
    with pytest.raises(UserError) as caught:
        save(tmp_path / "out", small())
    assert caught.value.code == "RG402"
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_preallocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    save(tmp_path / "a", small())
    monkeypatch.delattr(os, "posix_fallocate")
    save(tmp_path / "b", small())
    assert same(load(tmp_path / "a"), load(tmp_path / "b"))
