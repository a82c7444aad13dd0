"""A folder that appears all at once: whole or absent, and every refusal before anything is created."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from regraft.checkpoint import open_files, output
from regraft.checkpoint.dtypes import dtype_name
from regraft.checkpoint.writer import ModelWriter, TensorSpec
from regraft.errors import UserError, UserWarningMessage


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


def old_model(out: Path) -> Path:
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "old.txt").write_text("old")
    return out


def refused(code: str, *args: Any, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        ModelWriter(*args, **settings)
    assert caught.value.code == code
    return caught.value


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def run() -> None:
        with ModelWriter(tmp_path / "out", specs_of(small())) as w:
            w.write("t0", 0, torch.zeros(100))
            assert w.staging.is_dir()
            raise error

    with pytest.raises(error):
        run()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_publish_leaves_nothing(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(small())):
        pass
    assert list(tmp_path.iterdir()) == []


def test_publish_leaves_nothing_but_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", small())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_constructor_creates_nothing(tmp_path: Path) -> None:
    ModelWriter(tmp_path / "out", specs_of(small()))
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = old_model(tmp_path / "out")
    save(out, small(), force=True)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_to_the_output_stays_a_link(tmp_path: Path) -> None:
    old_model(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", small(), force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()


def test_a_failed_swap_restores_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = old_model(tmp_path / "out")
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self.name.endswith("-partial"):
            raise OSError(errno.EBUSY, "busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(UserError) as caught:
        save(out, small(), force=True)
    assert caught.value.code == "RG405"
    assert (out / "old.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(small(1))) as w:
        w.write("t0", 0, torch.zeros(100))
        old_model(tmp_path / "out")
        with pytest.raises(UserError) as caught:
            w.publish()
    assert caught.value.code == "RG401"
    assert (tmp_path / "out" / "old.txt").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from regraft.checkpoint.writer import ModelWriter, TensorSpec
moment, out = sys.argv[1], Path(sys.argv[2])
rename = Path.rename
def dying(self, target):
    if moment == "before" and self.name.endswith("-partial"): os.kill(os.getpid(), signal.SIGKILL)
    result = rename(self, target)
    if moment == "after" and self.name.endswith("-partial"): os.kill(os.getpid(), signal.SIGKILL)
    return result
Path.rename = dying
with ModelWriter(out, [TensorSpec("x", (1000,), "F32")], force=True) as w:
    w.write("x", 0, torch.ones(500))
    if moment == "writing": os.kill(os.getpid(), signal.SIGKILL)
    w.write("x", 500, torch.ones(500))
    w.publish()
"""


@pytest.mark.parametrize(("moment", "left"), [("writing", "old"), ("before", ""), ("after", "new")])
def test_a_killed_run_leaves_no_half_model_and_the_next_run_succeeds(tmp_path: Path, moment: str, left: str) -> None:
    out = old_model(tmp_path / "out")
    child = subprocess.run([sys.executable, "-c", KILLED, moment, str(out)], timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    # Under the valid name there is the old model, nothing, or the whole new one.
    if left == "old":
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "old.txt"]
    elif left == "new":
        assert same(load(out), {"x": torch.ones(1000)})
    else:
        assert not out.exists()
        # Without --force the next run finds the old model again and keeps it.
        with pytest.raises(UserError) as caught:
            save(out, small())
        assert caught.value.code == "RG401"
        assert (out / "old.txt").is_file()
    save(out, small(), force=True)
    assert same(load(out), small())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_runs_into_one_output(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", specs_of(small(1))) as first:
        second = ModelWriter(tmp_path / "out", specs_of(small(1)))
        with pytest.raises(UserError, match="another run is writing") as caught, second:
            pass
        assert caught.value.code == "RG401"
        first.write("t0", 0, torch.zeros(100))
        first.publish()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_of_many_racing_runs_one_wins_and_none_is_mixed(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def race(value: int) -> None:
        try:
            save(tmp_path / "out", {"x": torch.full((5000,), float(value))})
            outcomes.append(f"wrote {value}")
        except UserError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wins = [o for o in outcomes if o.startswith("wrote")]
    assert len(wins) == 1
    assert outcomes.count("RG401") == 7
    assert torch.equal(load(tmp_path / "out")["x"], torch.full((5000,), float(wins[0].split()[1])))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_not_empty(tmp_path: Path) -> None:
    error = refused("RG401", old_model(tmp_path / "out"), specs_of(small()))
    assert "--force" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("file", "says"), [("thesis.tex", "holds no model"), (".git", "git repository")])
def test_force_replaces_nothing_but_models(tmp_path: Path, file: str, says: str) -> None:
    out = tmp_path / "out"
    if file == ".git":
        old_model(out)
    out.mkdir(exist_ok=True)
    (out / file).write_text("precious")
    assert says in str(refused("RG401", out, specs_of(small()), force=True))


def test_output_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    assert "is a file" in str(refused("RG401", tmp_path / "out", specs_of(small()), force=True))


def test_parent_missing(tmp_path: Path) -> None:
    assert f"mkdir -p '{tmp_path / 'a'}'" in str(refused("RG405", tmp_path / "a" / "out", specs_of(small())))


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    refused("RG405", tmp_path / "a" / "out", specs_of(small()))


def test_parent_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    assert "read-only" in str(refused("RG405", tmp_path / "out", specs_of(small())))
    tmp_path.chmod(0o755)


def test_the_working_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("RG405", Path(), specs_of(small()))
    refused("RG405", Path("/"), specs_of(small()), force=True)


def test_name_too_long(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        save(tmp_path / ("x" * 250), small())
    assert caught.value.code == "RG405"
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_the_caller_writes_a_sidecar(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, ModelWriter(tmp_path / "out", specs_of(small())):
        full()
    assert caught.value.code == "RG402"


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(output.fcntl, "flock", unsupported)
    with pytest.warns(UserWarningMessage, match="no locks"):
        save(tmp_path / "out", small())


def test_an_old_model_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = old_model(tmp_path / "out")
    remove: Callable[[Path], None] = output.remove

    def stuck(path: Path) -> None:
        if path.name.endswith("-old"):
            raise OSError(errno.EACCES, "denied")
        remove(path)

    monkeypatch.setattr(output, "remove", stuck)
    with pytest.warns(UserWarningMessage, match=r"\.out\.regraft-old"):
        save(out, small(), force=True)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(out, small(2), force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("sync", [True, False])
def test_without_sync_nothing_waits_for_the_disk(tmp_path: Path, sync: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files go through the cache then; what is replaced goes away only for an output that is on the disk."""
    waited: list[str] = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name, None)
        if real is not None:
            monkeypatch.setattr(os, name, lambda fd, name=name, real=real: (waited.append(name), real(fd))[1])
    monkeypatch.setattr(open_files, "WORTHWHILE", 0)
    tensors = {"t0": torch.arange(3 << 20, dtype=torch.float32)}
    flags: list[int] = []
    opened = os.open

    def noted(path: Any, flag: int, *rest: Any, **more: Any) -> int:
        flags.append(flag)
        return opened(path, flag, *rest, **more)

    monkeypatch.setattr(os, "open", noted)
    with ModelWriter(tmp_path / "out", specs_of(tensors), sync=sync, depends_on={"run": 1}) as w:
        w.write("t0", 0, tensors["t0"])
        w.finish("t0", {})
        w.publish()
    assert bool(waited) == sync
    assert any(flag & getattr(os, "O_DIRECT", 0) for flag in flags) == (sync and hasattr(os, "O_DIRECT"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["t0"], tensors["t0"])
    waited.clear()
    with ModelWriter(tmp_path / "out", specs_of(tensors), sync=sync, force=True) as w:
        w.write("t0", 0, tensors["t0"] + 1)
        w.publish()
    assert waited
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["t0"], tensors["t0"] + 1)
