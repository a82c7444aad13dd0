"""Going on where an unfinished run stopped: what is taken over, what is not, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from regraft.checkpoint import journal, writer
from regraft.checkpoint.output import clear_leftovers, reserved, staging_of
from regraft.checkpoint.writer import ModelWriter, TensorSpec
from regraft.errors import UserError

SPECS = [TensorSpec(name, (100, 10), "F32") for name in ("t0", "t1", "t2", "t3")]
SAME = {"key": "abc", "names": [["a", "x/a"]]}


def values(name: str) -> torch.Tensor:
    return torch.arange(1000, dtype=torch.float32) + 1000 * int(name[1:])


def opened(out: Path, **settings: Any) -> ModelWriter:
    return ModelWriter(out, SPECS, **{"shard_bytes": 5000, "depends_on": SAME, **settings})


def put(w: ModelWriter, *names: str) -> None:
    for name in names:
        w.write(name, 0, values(name))
        w.finish(name, {"was": name})


def stop(out: Path, error: BaseException, *names: str, **settings: Any) -> BaseException:
    """A run that finishes these tensors and is then ended by the exception; what comes out of it."""
    with pytest.raises(BaseException) as caught, opened(out, **settings) as w:  # noqa: PT011, PT012
        (w.staging / "config.json").write_text("{}")
        put(w, *names)
        raise error
    return caught.value


def complete(out: Path, *, expect: set[str], **settings: Any) -> None:
    """A run that takes over exactly `expect`, computes the rest, and publishes what it should."""
    with opened(out, **settings) as w:
        assert set(w.finished) == expect
        assert all(w.finished[name] == {"was": name} for name in expect)
        assert set(w.missing()) == {s.name for s in SPECS} - expect
        assert not (w.staging / "config.json").exists()
        put(w, *(s.name for s in SPECS if s.name not in expect))
        w.publish()
    assert load(out) == {s.name: values(s.name).tolist() for s in SPECS}
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def load(out: Path) -> dict[str, list[float]]:
    return {k: v.flatten().tolist() for file in out.glob("*.safetensors") for k, v in load_file(file).items()}


def read_error(number: int) -> UserError:
    """As sources raise it when the system fails."""
    error = UserError("RG103", "t2 cannot be read", where="file", fix="check the disk")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


PASSING: dict[str, Callable[[], BaseException]] = {
    "Ctrl-C": KeyboardInterrupt,
    "a read that failed": lambda: read_error(errno.EIO),
    "a source that was away": lambda: read_error(errno.ENOENT),
    "a name that was taken": lambda: UserError("RG401", "the output folder is not empty", fix="name another"),
}


@pytest.mark.parametrize("what", list(PASSING))
def test_the_same_run_goes_on_after(what: str, tmp_path: Path) -> None:
    error = stop(tmp_path / "out", PASSING[what](), "t0", "t2")
    assert f"2 of 4 tensors are kept in {staging_of(tmp_path / 'out')}, and the same command goes on" in str(error)
    assert type(error) is type(PASSING[what]())
    assert not (tmp_path / "out").exists()
    complete(tmp_path / "out", expect={"t0", "t2"})


LASTING: dict[str, Callable[[], BaseException]] = {
    "values that are not finite": lambda: UserError("RG206", "t2 holds 1 NaN"),
    "a source that was changed": lambda: UserError("RG103", "the file was changed"),
    "a full disk": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "an error of ours": lambda: RuntimeError("unforeseen"),
}


@pytest.mark.parametrize("what", list(LASTING))
def test_nothing_is_left_after(what: str, tmp_path: Path) -> None:
    error = stop(tmp_path / "out", LASTING[what](), "t0", "t2")
    assert "kept" not in str(error)
    assert list(tmp_path.iterdir()) == []
    complete(tmp_path / "out", expect=set())


def test_nothing_is_kept_without_a_finished_tensor_or_without_facts(tmp_path: Path) -> None:
    stop(tmp_path / "out", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    stop(tmp_path / "out", KeyboardInterrupt(), "t0", depends_on=None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_stop_many_times(tmp_path: Path) -> None:
    for done in range(1, 5):
        with pytest.raises(KeyboardInterrupt, match=f"{done} of 4 "), opened(tmp_path / "out") as w:  # noqa: PT012
            assert list(w.finished) == [f"t{i}" for i in range(done - 1)]
            put(w, f"t{done - 1}")
            raise KeyboardInterrupt
    complete(tmp_path / "out", expect={"t0", "t1", "t2", "t3"})


@pytest.mark.parametrize(
    "settings",
    [
        {"depends_on": {**SAME, "key": "abd"}},
        {"shard_bytes": 9000},
        {"depends_on": None},
    ],
)
def test_another_run_begins_anew(settings: dict[str, Any], tmp_path: Path) -> None:
    stop(tmp_path / "out", KeyboardInterrupt(), "t0")
    complete(tmp_path / "out", expect=set(), **settings)


def test_other_tensors_begin_anew(tmp_path: Path) -> None:
    stop(tmp_path / "out", KeyboardInterrupt(), "t0")
    specs = [TensorSpec("t0", (100, 10), "F32"), TensorSpec("t1", (10, 300), "F32")]
    with ModelWriter(tmp_path / "out", specs, shard_bytes=5000, depends_on=SAME) as w:
        assert w.finished == {}


def replace_shard(staging: Path) -> None:
    shard = staging / "model-00001-of-00004.safetensors"
    shutil.copyfile(shard, staging / "copy")
    (staging / "copy").rename(shard)


def edit(staging: Path, at: int, name: str = "model-00002-of-00004.safetensors") -> None:
    with (staging / name).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def copy_all(staging: Path) -> None:
    shutil.copytree(staging, staging.with_name("copy"))
    shutil.rmtree(staging)
    staging.with_name("copy").rename(staging)


def to_link(staging: Path) -> None:
    shard = staging / "model-00001-of-00004.safetensors"
    shard.rename(staging.parent / "elsewhere.safetensors")
    shard.symlink_to("../elsewhere.safetensors")


ODD: dict[str, Callable[[Path], Any]] = {
    "a shard is missing": lambda s: (s / "model-00003-of-00004.safetensors").unlink(),
    "a shard is too short": lambda s: os.truncate(s / "model-00003-of-00004.safetensors", 3000),
    "a shard is too long": lambda s: os.truncate(s / "model-00003-of-00004.safetensors", 30000),
    "a shard is another file": replace_shard,
    "a shard is a folder": lambda s: (
        (s / "model-00003-of-00004.safetensors").unlink(),
        (s / "model-00003-of-00004.safetensors").mkdir(),
    ),
    "a header is damaged": lambda s: edit(s, 20),
    "the identity is damaged": lambda s: edit(s, 40, ".regraft-journal"),
    "the journal is missing": lambda s: (s / ".regraft-journal").unlink(),
    "the journal is a folder": lambda s: ((s / ".regraft-journal").unlink(), (s / ".regraft-journal").mkdir()),
    "the folder is a copy": copy_all,
    "the folder is a file": lambda s: (shutil.rmtree(s), s.write_text("x")),
    "the folder is a link": lambda s: (shutil.rmtree(s), s.symlink_to("nowhere")),
}


@pytest.mark.parametrize("what", list(ODD))
def test_what_is_odd_is_not_gone_on_with(what: str, tmp_path: Path) -> None:
    stop(tmp_path / "out", KeyboardInterrupt(), "t0", "t1")
    ODD[what](staging_of(tmp_path / "out"))
    complete(tmp_path / "out", expect=set())


def test_a_shard_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    stop(tmp_path / "out", KeyboardInterrupt(), "t0", "t1")
    to_link(staging_of(tmp_path / "out"))
    before = (tmp_path / "elsewhere.safetensors").read_bytes()
    with opened(tmp_path / "out") as w:
        assert w.finished == {}
        put(w, "t0", "t1", "t2", "t3")
        w.publish()
    assert (tmp_path / "elsewhere.safetensors").read_bytes() == before


def test_nothing_is_resumed_after_a_restart_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(tmp_path / "out", KeyboardInterrupt(), "t0")
    monkeypatch.setattr(journal, "boot_id", lambda: "another start of the machine")
    complete(tmp_path / "out", expect=set())


def test_nothing_is_resumed_where_the_system_tells_no_boot_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(tmp_path / "out", KeyboardInterrupt(), "t0")
    monkeypatch.setattr(writer, "boot_id", lambda: "")
    complete(tmp_path / "out", expect=set())
    shutil.rmtree(tmp_path / "out")
    stop(tmp_path / "out", KeyboardInterrupt(), "t0")
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_written_can_be_finished(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as w:
        w.write("t0", 0, values("t0")[:999])
        with pytest.raises(RuntimeError, match="1 elements were never written"):
            w.finish("t0", {})
        w.write("t0", 999, values("t0")[999:])
        w.finish("t0", {})
    with pytest.raises(RuntimeError, match="not open"):
        w.finish("t0", {})


def test_a_full_disk_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="took no more") as caught, opened(tmp_path / "out") as w:  # noqa: PT012
        put(w, "t0", "t1")
        monkeypatch.setattr(os, "pwrite", full)
        put(w, "t2")
    assert caught.value.code == "RG402"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync", "write"])
def test_what_a_failing_disk_holds_is_not_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(UserError, match="disk failed") as caught, opened(tmp_path / "out") as w:  # noqa: PT012
        put(w, "t0", "t1", "t2")
        monkeypatch.setattr(os, call, fail)
        put(w, "t3")
        w.publish()
    monkeypatch.undo()
    assert caught.value.code == "RG405"
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_appeared_meanwhile_costs_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not empty.*4 of 4 tensors are kept"), opened(tmp_path / "out") as w:  # noqa: PT012
        put(w, "t0", "t1", "t2", "t3")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")
        w.publish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.json"]
    complete(tmp_path / "out", expect={"t0", "t1", "t2", "t3"}, force=True)


def test_interrupted_while_the_output_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is gone by then, so there is nothing to go on with, and an old model is put back."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith("-partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught, opened(out, force=True) as w:  # noqa: PT012
        put(w, "t0", "t1", "t2", "t3")
        w.publish()
    assert str(caught.value) == ""
    monkeypatch.undo()
    assert (out / "config.json").read_text() == "old"
    complete(out, expect=set(), force=True)


def test_room_that_an_unfinished_run_holds_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(tmp_path / "out", KeyboardInterrupt(), "t0")
    held = reserved(tmp_path / "out")
    assert held >= 16000
    assert reserved(tmp_path / "other") == 0
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0\.001 MB are free"):
        opened(tmp_path / "other")
    complete(tmp_path / "out", expect={"t0"})


def test_leftovers_are_cleared_unless_a_run_goes_on(tmp_path: Path) -> None:
    clear_leftovers(tmp_path / "none")
    with opened(tmp_path / "out") as w:
        put(w, "t0", "t1", "t2", "t3")
        w.publish()
    for name in ("partial", "old"):
        (tmp_path / f".out.regraft-{name}").mkdir()
    (tmp_path / ".out.regraft-lock").touch()
    clear_leftovers(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with opened(tmp_path / "out", force=True) as w:
        put(w, "t0")
        clear_leftovers(tmp_path / "out")
        assert w.staging.is_dir()
        put(w, "t1", "t2", "t3")
        w.publish()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_resume
with test_resume.opened(Path(sys.argv[1])) as w:
    test_resume.put(w, "t0", "t1")
    w.write("t2", 0, test_resume.values("t2")[:500])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_same_run_goes_on_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out"
    here = str(Path(__file__).parent)
    child = subprocess.run([sys.executable, "-c", KILLED, str(out), here], timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    complete(out, expect={"t0", "t1"})
