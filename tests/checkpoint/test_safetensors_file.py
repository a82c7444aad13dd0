"""Safetensors files, honest and hostile."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from regraft.checkpoint import descriptors
from regraft.checkpoint.dtypes import DTYPES
from regraft.checkpoint.safetensors_file import FileTensor, read_safetensors
from regraft.checkpoint.tensor import TensorSource
from regraft.errors import UserError


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (text, bytes or JSON), whether it is right or not."""
    text = header if isinstance(header, (bytes, str)) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern, NaN included; for bool the two that exist."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.Size(shape).numel()
    high = 2 if dtype == torch.bool else 256
    return (
        torch.randint(0, high, (n * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)
    )


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    a, b = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---------------------------------------------------------------- what is right is read bit for bit


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(sorted(DTYPES)), st.integers(0, 99)
        ),
        min_size=1,
        max_size=6,
    ),
    st.data(),
)
def test_round_trip_of_random_sets(tmp_path_factory: Any, described: list[Any], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("set") / "model.safetensors"
    stored = {f"t{i}": random_bits(shape, DTYPES[name], seed) for i, (shape, name, seed) in enumerate(described)}
    save_file(stored, path, metadata={"format": "pt"})
    tensors, metadata = read_safetensors(path)
    assert metadata == {"format": "pt"}
    assert tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        source = tensors[name]
        assert isinstance(source, TensorSource)
        assert (source.name, source.shape, source.dtype) == (name, tuple(tensor.shape), tensor.dtype)
        assert same(source.read(), tensor)
        start = data.draw(st.integers(0, tensor.numel()))
        stop = data.draw(st.integers(start, tensor.numel()))
        assert same(source.read(start, stop), tensor.reshape(-1)[start:stop])


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    header = {"last": entry(offsets=[16, 24]), "first": entry(offsets=[0, 8]), "middle": entry(offsets=[8, 16])}
    tensors, _ = read_safetensors(raw(tmp_path / "x.safetensors", header, bytes(24)))
    assert list(tensors) == ["first", "middle", "last"]


def test_slices_behave_as_in_python_and_are_the_readers_own(tmp_path: Path) -> None:
    save_file({"a": torch.arange(10.0)}, tmp_path / "x.safetensors")
    source = read_safetensors(tmp_path / "x.safetensors")[0]["a"]
    assert source.read(8, 99).tolist() == [8, 9]
    assert source.read(5, 3).tolist() == []
    values = source.read(2, 4)
    values += 100
    assert source.read(2, 4).tolist() == [2, 3]


def test_padded_and_unaligned_headers(tmp_path: Path) -> None:
    data = torch.arange(2.0).numpy().tobytes()
    for spaces in range(8):
        text = json.dumps({"a": entry()}) + " " * spaces
        tensors, _ = read_safetensors(raw(tmp_path / "x.safetensors", text, data))
        assert tensors["a"].read().tolist() == [0, 1]


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    stored = {"scalar": torch.tensor(3.5), "none": torch.empty(0, 7), "one": torch.tensor([1.0])}
    save_file(stored, tmp_path / "x.safetensors")
    tensors, _ = read_safetensors(tmp_path / "x.safetensors")
    assert tensors["scalar"].shape == ()
    assert tensors["scalar"].read().tolist() == [3.5]
    assert tensors["none"].shape == (0, 7)
    assert tensors["none"].read().shape == (0,)


def test_file_without_tensors(tmp_path: Path) -> None:
    assert read_safetensors(raw(tmp_path / "x.safetensors", {"__metadata__": {"a": "b"}})) == ({}, {"a": "b"})


# ---------------------------------------------------------------- what lies is refused, with file and tensor

HUGE = 2**62
HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "begins with a list": ("[1, 2]", b"", "does not begin with"),
    "begins with a space": (' {"a": 1}', b"", "does not begin with"),
    "web page": ("<!doctype html>", b"", "does not begin with"),
    "no JSON": ("{oops}", b"", "no JSON"),
    "two documents": ("{} {}", b"", "no JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not UTF-8"),
    "half a character as name": (r'{"\ud800": {}}', b"", "no valid"),
    "deep": ('{"a":' * 50_000, b"", "nested too deeply"),
    "deep list": ('{"a":' + "[" * 50_000, b"", "nested too deeply"),
    "long number": ('{"a":' + "9" * 5000 + "}", b"", "number"),
    "NaN": ('{"a": NaN}', b"", "NaN"),
    "name twice": ('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), bytes(8), "'a' twice"),
    "key twice": ('{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "'dtype' twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata as list": ({"__metadata__": ["a"]}, b"", "__metadata__"),
    "entry as number": ({"ten": 5}, b"", "'ten'"),
    "entry without shape": ({"ten": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "'ten'"),
    "unknown dtype": ({"ten": entry("F31")}, bytes(8), "'F31'"),
    "dtype as list": ({"ten": entry(["F32"])}, bytes(8), "dtype"),
    "shape as text": ({"ten": entry(shape="2")}, bytes(8), "'ten' has the shape"),
    "shape negative": ({"ten": entry(shape=[-2])}, bytes(8), "'ten' has the shape"),
    "shape two negatives": ({"ten": entry(shape=[-2, -1])}, bytes(8), "'ten' has the shape"),
    "shape float": ({"ten": entry(shape=[2.0])}, bytes(8), "'ten' has the shape"),
    "shape bool": ({"ten": entry(shape=[True], offsets=[0, 4])}, bytes(4), "'ten' has the shape"),
    "shape overflows": ({"ten": entry(shape=[HUGE, 4], offsets=[0, 0])}, b"", "no file can hold"),
    "shape wraps round": ({"ten": entry(shape=[2**33, 2**31 + 1], offsets=[0, 2**35])}, b"", "no file can hold"),
    "shape overflows before a zero": ({"ten": entry(shape=[HUGE, HUGE, 0], offsets=[0, 0])}, b"", "no file can hold"),
    "bytes overflow": ({"ten": entry("F64", [2**61], [0, 0])}, b"", "no file can hold"),
    "shape beyond 64 bits": ({"ten": entry(shape=[2**64])}, bytes(8), "'ten' has the shape"),
    "offsets negative": ({"ten": entry(offsets=[-8, 0])}, bytes(8), "'ten' has the data_offsets"),
    "offsets float": ({"ten": entry(offsets=[0.0, 8.0])}, bytes(8), "'ten' has the data_offsets"),
    "offsets bool": ({"ten": entry("U8", [1], [False, True])}, bytes(1), "'ten' has the data_offsets"),
    "offsets backwards": ({"ten": entry(offsets=[8, 0])}, bytes(8), "'ten' has the data_offsets"),
    "three offsets": ({"ten": entry(offsets=[0, 8, 8])}, bytes(8), "'ten' has the data_offsets"),
    "size of another dtype": ({"ten": entry("F16")}, bytes(8), "'ten' has 8 bytes where 4"),
    "out of bounds": ({"a": entry(), "ten": entry(offsets=[2**40, 2**40 + 8])}, bytes(16), "'ten' ends at byte"),
    "cut short": ({"a": entry(), "ten": entry(offsets=[8, 16])}, bytes(15), "'ten' ends at byte 16"),
    "overlap": ({"a": entry(), "ten": entry(offsets=[4, 12])}, bytes(12), "'ten' overlaps tensor 'a'"),
    "same range": ({"a": entry(), "ten": entry()}, bytes(8), "overlaps"),
    "empty one inside another": ({"a": entry(), "ten": entry(shape=[0], offsets=[4, 4])}, bytes(8), "overlaps"),
    "gap": ({"a": entry(), "ten": entry(offsets=[12, 20])}, bytes(20), "4 bytes before tensor 'ten'"),
    "gap at the start": ({"ten": entry(offsets=[4, 12])}, bytes(12), "4 bytes before tensor 'ten'"),
    "surplus": ({"ten": entry()}, bytes(9), "1 bytes after the last"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    header, data, message = HOSTILE[case]
    path = raw(tmp_path / "bad one.safetensors", header, data)
    with pytest.raises(UserError, match=message) as caught:
        read_safetensors(path)
    assert caught.value.code == "RG103"
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"),
        (b"12345678", "no header"),
        ((3).to_bytes(8, "little") + b"{}", "claims 3 bytes but the file has 10"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "more than the 100000000"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "more than the 100000000"),
        (b"PK\x03\x04 and more", "zip archive"),
        (b"\x80\x02}q\x00X\x01\x00", "pickle"),
        (b"<html><head></head></html>", "web page"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_safetensors(tmp_path / "x.safetensors")
    assert caught.value.code == "RG103"


def test_header_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", "{}", length=100_000_001)
    os.truncate(path, 200_000_000)  # sparse: the claim is consistent with the file, and still too large
    with pytest.raises(UserError, match="more than the 100000000"):
        read_safetensors(path)


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    path = raw(tmp_path / "x.safetensors", {"n" * 10_000 + "\x1b[31m": 5})
    with pytest.raises(UserError) as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F8_E4M3FNUZ"])
def test_packed_dtypes(tmp_path: Path, dtype: str) -> None:
    path = raw(tmp_path / "x.safetensors", {"ten": entry(dtype, [8])}, bytes(8))
    with pytest.raises(UserError, match=dtype) as caught:
        read_safetensors(path)
    assert caught.value.code == "RG109"


def test_lfs_stub(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (tmp_path / "x.safetensors").write_text(text)
    with pytest.raises(UserError, match="git lfs pull") as caught:
        read_safetensors(tmp_path / "x.safetensors")
    assert caught.value.code == "RG106"


def test_missing_and_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    for name in ("none.safetensors", "pipe.safetensors", "."):
        with pytest.raises(UserError) as caught:
            read_safetensors(tmp_path / name)
        assert caught.value.code == "RG101"


GOOD = {
    "a": entry(),
    "b": entry("BF16", [2, 3], [8, 20]),
    "c": entry("U8", [], [20, 21]),
    "__metadata__": {"format": "pt"},
}
KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "x"])
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 8, 20, 21])
junk = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=6,
)


@given(
    st.sampled_from([*GOOD, "new"]), st.sampled_from(["dtype", "shape", "data_offsets", None]), junk, st.integers(0, 40)
)
def test_mutated_headers_raise_nothing_but_user_errors(
    tmp_path_factory: Any, name: str, key: str | None, value: Any, size: int
) -> None:
    header = json.loads(json.dumps(GOOD))
    if key is None or not isinstance(header.get(name), dict):
        header[name] = value
    else:
        header[name][key] = value
    _agrees_with_the_format(raw(tmp_path_factory.mktemp("m") / "x.safetensors", header, bytes(size)))


@given(st.data())
def test_mutated_bytes_raise_nothing_but_user_errors(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = raw(tmp_path_factory.mktemp("m") / "x.safetensors", GOOD, bytes(21))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, 100, 9]))])
    _agrees_with_the_format(path)


def _agrees_with_the_format(path: Path) -> None:
    """What regraft accepts the format's own library accepts too, with the same content."""
    try:
        tensors, _ = read_safetensors(path)
    except UserError as error:
        assert error.code in {"RG103", "RG109"}  # noqa: PT017 - most examples do not raise
        return
    loaded = load_file(path)
    assert tensors.keys() == loaded.keys()
    assert all(same(tensors[name].read(), loaded[name]) for name in loaded)


# ---------------------------------------------------------------- files that change, threads, descriptors


def _one(path: Path, numel: int = 4096) -> TensorSource:
    save_file({"a": torch.arange(numel, dtype=torch.float32)}, path)
    return read_safetensors(path)[0]["a"]


def test_file_that_shrinks_is_an_error_and_no_crash(tmp_path: Path) -> None:
    source = _one(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 5000)
    with pytest.raises(UserError, match="ends within tensor 'a'") as caught:
        source.read()
    assert caught.value.code == "RG103"


def test_file_that_is_overwritten_is_noticed(tmp_path: Path) -> None:
    source = _one(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"other")
    os.utime(tmp_path / "x.safetensors", ns=(1, 1))
    with pytest.raises(UserError, match="was changed") as caught:
        source.read(0, 1)
    assert caught.value.code == "RG103"


def test_file_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = descriptors._Pool(1)
    monkeypatch.setattr(descriptors, "POOL", pool)
    source, other = _one(tmp_path / "x.safetensors"), _one(tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").unlink()
    assert other.read(1, 2).tolist() == [1]  # still open
    assert source.read(1, 2).tolist() == [1]  # closes the other one
    with pytest.raises(UserError, match="gone") as caught:
        other.read()
    assert caught.value.code == "RG101"


def test_file_that_is_replaced_while_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "POOL", descriptors._Pool(1))
    source = _one(tmp_path / "x.safetensors")
    _one(tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").rename(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="was changed"):
        source.read()


def test_reads_longer_than_one_call_and_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _one(tmp_path / "x.safetensors")
    real = os.preadv
    monkeypatch.setattr(descriptors, "_ONE_CALL", 1000)
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:777]], at))
    assert torch.equal(source.read(), torch.arange(4096.0))


def test_many_threads_and_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = descriptors._Pool(2)
    monkeypatch.setattr(descriptors, "POOL", pool)
    stored = [torch.randn(3000) for _ in range(6)]
    sources = []
    for i, tensor in enumerate(stored):
        save_file({"a": tensor}, tmp_path / f"{i}.safetensors")
        sources.append(read_safetensors(tmp_path / f"{i}.safetensors")[0]["a"])
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        barrier.wait()
        order = torch.randperm(6 * 50, generator=torch.Generator().manual_seed(seed)).tolist()
        return all(torch.equal(sources[k % 6].read(k, k + 900), stored[k % 6][k : k + 900]) for k in order)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
    assert len(pool) <= 2 + 4  # those in use are never closed
    sources.pop().read()
    assert len(pool) <= 2


def test_descriptors_close_with_their_last_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = descriptors._Pool(8)
    monkeypatch.setattr(descriptors, "POOL", pool)
    source = _one(tmp_path / "x.safetensors")
    assert isinstance(source, FileTensor)
    assert len(pool) == 1
    del source
    assert len(pool) == 0
