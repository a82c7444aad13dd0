"""Pickled weights: read in slices, aliases found, no code run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.checkpoint.pickle_file import read_pickle
from regraft.checkpoint.tensor import TensorSource
from regraft.errors import UserError


def saved(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_was_saved(tmp_path: Path, zipped: bool) -> None:
    state = OrderedDict(
        w=torch.randn(4, 6),
        half=torch.randn(3, 5).to(torch.bfloat16),
        turned=torch.randn(5, 7).t(),
        every_second=torch.arange(20)[::2],
        part=torch.randn(10, 4)[3:7, 1:3],
        scalar=torch.tensor(2.5),
        none=torch.empty(0, 3),
        step=torch.nn.Parameter(torch.ones(2)),
    )
    sources = read_pickle(saved(tmp_path / "pytorch_model.bin", state, zipped))
    assert list(sources) == list(state)
    for name, tensor in state.items():
        source = sources[name]
        assert isinstance(source, TensorSource)
        assert (source.name, source.shape, source.dtype) == (name, tuple(tensor.shape), tensor.dtype)
        flat = tensor.detach().reshape(-1)
        assert torch.equal(source.read(), flat)
        for start in range(flat.numel() + 1):
            for stop in range(start, flat.numel() + 2):
                assert torch.equal(source.read(start, stop), flat[start:stop])


def test_slices_are_the_readers_own(tmp_path: Path) -> None:
    source = read_pickle(saved(tmp_path / "x.bin", {"a": torch.zeros(4)}))["a"]
    values = source.read()
    values += 1
    assert source.read().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("zipped", [True, False])
def test_shared_storage_becomes_one_source(tmp_path: Path, zipped: bool) -> None:
    shared = torch.randn(4, 4)
    state = {
        "embedding": shared,
        "other": torch.randn(4, 4),
        "head": shared,
        "head.turned": shared.t(),
        "rows": shared[:2],
        "equal but apart": shared.clone(),
        "empty": torch.empty(0),
        "empty too": torch.empty(0),
    }
    sources = read_pickle(saved(tmp_path / "x.bin", state, zipped))
    assert sources["head"] is sources["embedding"]
    assert sources["head"].name == "embedding"
    assert [name for name, source in sources.items() if source.name != name] == ["head"]
    assert torch.equal(sources["rows"].read(), shared[:2].reshape(-1))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_training_checkpoints(tmp_path: Path, key: str) -> None:
    content = {"epoch": 3, key: {"w": torch.ones(2)}, "optimizer": {"state": {}, "lr": 0.1}}
    assert list(read_pickle(saved(tmp_path / "x.pt", content))) == ["w"]


class Canary:
    """A pickle that runs a command when it is loaded by an unpickler that lets it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.path}'",))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "nested"])
def test_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "pytorch_model.bin"
    evil: Any = {"w": torch.ones(2), "x": Canary(canary)}
    if form == "bare":
        path.write_bytes(pickle.dumps(evil["x"], protocol=2))
    else:
        saved(path, {"state_dict": evil} if form == "nested" else evil, form != "legacy")
    with pytest.raises(UserError, match="never run") as caught:
        read_pickle(path)
    assert caught.value.code == "RG107"
    assert "system" in str(caught.value)
    assert str(path) in str(caught.value)
    assert not canary.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False) if form != "bare" else pickle.loads(path.read_bytes())
    assert canary.exists()  # the canary does sing where somebody lets it


def test_whole_modules_and_scripts(tmp_path: Path) -> None:
    saved(tmp_path / "module.pt", torch.nn.Linear(2, 2))
    # A TorchScript archive is told by the record constants.pkl; torch.jit itself is deprecated.
    with zipfile.ZipFile(saved(tmp_path / "script.pt", {"w": torch.ones(2)}), "a") as archive:
        archive.writestr("script/constants.pkl", pickle.dumps(()))
    for name, word in (("module.pt", "torch.nn.modules.linear.Linear"), ("script.pt", "TorchScript")):
        with pytest.raises(UserError, match=word) as caught:
            read_pickle(tmp_path / name)
        assert caught.value.code == "RG107"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "no tensors"),
        ({"w": torch.ones(2), "epoch": 3}, "'epoch' is a int"),
        ({1: torch.ones(2)}, "1 is a Tensor"),
        ({"model": {"w": 1.0}}, "'model' is a dict"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_pickle(saved(tmp_path / "x.bin", content))
    assert caught.value.code == "RG107"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.ones(2, dtype=torch.complex128),
        lambda: torch.ones(2, device="meta"),
    ],
    ids=["sparse", "quantised", "complex128", "meta"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_unsupported_tensors(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(UserError, match="'odd'") as caught:
        read_pickle(saved(tmp_path / "x.bin", {"odd": make()}))
    assert caught.value.code == "RG109"


def test_damaged_files(tmp_path: Path) -> None:
    whole = saved(tmp_path / "x.bin", {"w": torch.randn(50, 50)}).read_bytes()
    for content in (b"", b"hello, this is text", b"\x80", whole[: len(whole) // 2], whole[:-30], b"PK\x03\x04"):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_pickle(tmp_path / "x.bin")
        assert caught.value.code == "RG111"


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "x.bin", {"w": torch.zeros(1000), "noise": torch.randn(9000)})  # a map would show noise as w
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as source,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(UserError, match="archive is compressed") as caught:
        read_pickle(tmp_path / "y.bin")
    assert caught.value.code == "RG111"


def test_stub_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n")
    with pytest.raises(UserError) as caught:
        read_pickle(tmp_path / "x.bin")
    assert caught.value.code == "RG106"
    with pytest.raises(UserError) as caught:
        read_pickle(tmp_path / "none.bin")
    assert caught.value.code == "RG101"


def test_file_that_shrinks_or_vanishes(tmp_path: Path) -> None:
    source = read_pickle(saved(tmp_path / "x.bin", {"a": torch.zeros(10_000)}))["a"]
    assert source.read(9_000).numel() == 1000
    os.truncate(tmp_path / "x.bin", 4096)
    with pytest.raises(UserError, match="changed") as caught:
        source.read(9_000)
    assert caught.value.code == "RG103"
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError) as caught:
        source.read(9_000)
    assert caught.value.code == "RG101"


@given(
    st.booleans(), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), st.floats(0, 1)
)
def test_mutated_pickles_raise_nothing_but_user_errors(
    tmp_path_factory: Any, zipped: bool, changes: list[tuple[float, int]], keep: float
) -> None:
    path = saved(tmp_path_factory.mktemp("m") / "x.bin", {"w": torch.ones(3, 2), "v": torch.ones(4)}, zipped)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    path.write_bytes(content[: len(content) if keep > 0.3 else int(keep * len(content))])
    try:
        sources = read_pickle(path)
    except UserError as error:
        assert error.code in {"RG107", "RG109", "RG111"}  # noqa: PT017 - some examples load
    else:
        assert all(source.read().numel() <= 6 for source in sources.values())
