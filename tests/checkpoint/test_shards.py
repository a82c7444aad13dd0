"""The layout of shards: aligned, without gaps, named and indexed as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from regraft.checkpoint.dtypes import DTYPES, dtype_name, item_size
from regraft.checkpoint.shards import INDEX_NAME, layout
from regraft.checkpoint.writer import ModelWriter, TensorSpec, size_on_disk


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


def test_one_shard_has_no_index_and_says_pt(tmp_path: Path) -> None:
    save(tmp_path / "out", small())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_index_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    tensors = small(3) | {"big": torch.zeros(1000)} | {"after": torch.zeros(10)}
    save(tmp_path / "out", tensors, shard_bytes=800)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted([f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)] + [INDEX_NAME])
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    assert [k for k, v in index["weight_map"].items() if v == index["weight_map"]["big"]] == ["big"]
    assert same(load(tmp_path / "out"), tensors)


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=12
    ),
    st.integers(1, 300),
)
def test_layout_is_aligned_and_without_gaps(tensors: list[tuple[str, list[int]]], shard_bytes: int) -> None:
    specs = [TensorSpec(f"é{i}", tuple(shape), dtype) for i, (dtype, shape) in enumerate(tensors)]
    by_name = {spec.name: spec for spec in specs}
    shards = layout(specs, shard_bytes)
    assert sorted(name for shard in shards for name in shard.offsets) == sorted(by_name)
    for shard in shards:
        end = len(shard.header)
        assert end % 8 == 0
        assert int.from_bytes(shard.header[:8], "little") == end - 8
        for name, offset in shard.offsets.items():
            assert offset == end
            assert offset % item_size(by_name[name].dtype) == 0
            end += by_name[name].nbytes
        assert end == shard.size
        assert (
            end - len(shard.header) <= shard_bytes
            or len(shard.offsets) == 1
            or not any(by_name[n].nbytes for n in list(shard.offsets)[1:])
        )


def test_size_on_disk_is_exact(tmp_path: Path) -> None:
    save(tmp_path / "out", small())
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) == size_on_disk(specs_of(small()))


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [TensorSpec("a", (1,), "F32")] * 2,
        [TensorSpec("__metadata__", (1,), "F32")],
        [TensorSpec("a", (-1,), "F32")],
        [TensorSpec("a", (1,), "C128")],
    ],
)
def test_impossible_specs(tmp_path: Path, specs: list[TensorSpec]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        ModelWriter(tmp_path / "out", specs)
