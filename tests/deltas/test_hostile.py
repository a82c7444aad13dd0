"""Whatever stands in a delta's files, opening it and reading it ends with a sentence or a tensor."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from regraft.checkpoint import numel, open_checkpoint
from regraft.deltas.extract import extract
from regraft.errors import UserError

NASTY = [None, True, -1, 0, 2**70, 1e308, "", "x" * 5000, "../../etc/passwd", "\x1b[31m", "\ud800", [], {}, [[]], "F16"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of the tensors three will do."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(inner)[:3] if path == ("tensors",) else list(inner):
        yield from places(one, (*path, key))


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Deltas by kind."""
    folder = tmp_path_factory.mktemp("made")
    base, tuned = (open_checkpoint(str(llama / name)) for name in ("base", "tuned"))
    for kind in ("dense", "sparse", "bits"):
        extract(tuned, base, folder / kind, kind)  # type: ignore[arg-type]
    return {kind: folder / kind for kind in ("dense", "sparse", "bits")}


def read_all(base: Path, delta: Path) -> None:
    """Open and read; only sentences may come of it."""
    with suppress(UserError):
        checkpoint = open_checkpoint(f"{base}+{delta}", force=True)
        for source in checkpoint.tensors.values():
            assert source.read().shape == (numel(source),)
    with pytest.raises(UserError):
        open_checkpoint(str(delta))


@given(data=st.data())
def test_records(data: st.DataObject, made: dict[str, Path], llama: Path, tmp_path_factory: Any) -> None:
    kind = data.draw(st.sampled_from(["dense", "sparse", "bits"]))
    folder = shutil.copytree(made[kind], tmp_path_factory.mktemp("hostile") / "delta")
    record = json.loads((folder / "delta.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, last = data.draw(st.sampled_from(sorted(places(record), key=str)))
        target = record
        for key in outer:
            target = target[key]
        target[last] = copy.deepcopy(data.draw(st.sampled_from(NASTY)))
    (folder / "delta.json").write_text(json.dumps(record))
    read_all(llama / "base", folder)


@given(data=st.data())
def test_parts(data: st.DataObject, made: dict[str, Path], llama: Path, tmp_path_factory: Any) -> None:
    """Parts that are missing, of other lengths, dtypes and contents."""
    kind = data.draw(st.sampled_from(["dense", "sparse", "bits"]))
    folder = shutil.copytree(made[kind], tmp_path_factory.mktemp("hostile") / "delta")
    parts = load_file(folder / "model.safetensors")
    names = [name for name in sorted(parts) if "model.norm" in name or "q_proj" in name]
    name = data.draw(st.sampled_from(names))
    how = data.draw(st.sampled_from(["gone", "short", "long", "other dtype", "ones", "flat"]))
    tensor = parts.pop(name)
    flat = tensor.flatten()
    changed = {
        "short": flat[:-1],
        "long": flat.repeat(2),
        "other dtype": tensor.to(tensor.dtype).long(),
        "ones": (tensor * 0 + 255).to(tensor.dtype),
        "flat": flat,
    }
    parts |= {name: changed[how].contiguous()} if how != "gone" else {}
    save_file(parts, folder / "model.safetensors")
    read_all(llama / "base", folder)


@pytest.mark.parametrize("size", [0, 1, 7, 100])
@pytest.mark.parametrize("file", ["delta.json", "model.safetensors"])
def test_files_that_were_cut_short(file: str, size: int, made: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made["sparse"], tmp_path / "delta")
    (folder / file).write_bytes((folder / file).read_bytes()[:size])
    with pytest.raises(UserError):
        open_checkpoint(f"{llama / 'base'}+{folder}")
