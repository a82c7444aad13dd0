"""A merge that was stopped, or that the system failed, goes on where it stopped; real processes where it matters."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fuzz.kills import differences
from models import save_fine_tune, save_model
from regraft.checkpoint import descriptors
from regraft.checkpoint.output import staging_of
from regraft.checkpoint.writer import ModelWriter
from regraft.errors import UserError
from regraft.recipe import execute, parse_recipe
from regraft.recipe.run import merge
from regraft.recipe.settings import Settings

TEXT = (
    "models: {base: ./base, a: ./a, b: ./b}\n"
    "steps:\n  x: {merge: ties, base: base, models: [a, b], trim_scope: tensor}\n"
)
ONE = Settings(workers=1, shard_bytes=30_000)
TENSORS = 21


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and under `whole` what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("family")
    save_model(folder / "base", "llama")
    save_fine_tune(folder / "a", folder / "base", 1)
    save_fine_tune(folder / "b", folder / "base", 2)
    (folder / "recipe.yaml").write_text(TEXT)
    made(folder, folder / "whole" / "out")
    return folder


def made(folder: Path, out: Path, settings: Settings = ONE, text: str = TEXT, told: list[str] | None = None) -> Path:
    out.parent.mkdir(exist_ok=True)
    return merge(parse_recipe(text, path=folder / "recipe.yaml"), out, settings, Told([] if told is None else told))


class Told:
    """Keeps what a run tells."""

    def __init__(self, lines: list[str]) -> None:
        self.message = lines.append

    def step(self, name: str) -> None: ...
    def advance(self, done: int, total: int) -> None: ...


def after(monkeypatch: pytest.MonkeyPatch, count: int, act: Callable[[], None]) -> list[str]:
    """Do something once the `count`-th tensor of a run is finished; the list holds the names of finished tensors."""
    finish, names = ModelWriter.finish, []

    def watched(self: ModelWriter, name: str, facts: Any) -> None:
        finish(self, name, facts)
        names.append(name)
        if len(names) == count:
            act()

    monkeypatch.setattr(ModelWriter, "finish", watched)
    return names


def interrupt() -> None:
    raise KeyboardInterrupt


def stopped(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, count: int = 8, **how: Any) -> None:
    with monkeypatch.context() as patch:
        after(patch, count, interrupt)
        with pytest.raises(KeyboardInterrupt, match=f"^{count} of {TENSORS} tensors are kept"):
            made(folder, out, **how)
    assert not out.exists()
    assert staging_of(out).is_dir()


def copied(family: Path, to: Path) -> Path:
    """Models of a test's own."""
    for name in ("base", "a", "b"):
        shutil.copytree(family / name, to / name)
    return to


@pytest.mark.parametrize("rule", ["ties, base: base", "ties, base: base, trim_scope: tensor", "linear"])
def test_all_files_are_those_of_an_undisturbed_run(
    rule: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT.replace("ties, base: base, models: [a, b], trim_scope: tensor", f"{rule}, models: [a, b]")
    whole = made(family, tmp_path / "whole" / "out", text=text)
    out = tmp_path / "out"
    stopped(monkeypatch, family, out, 5, text=text)
    names, told = after(monkeypatch, 0, interrupt), []
    made(family, out, text=text, told=told)
    assert len(names) == TENSORS - 5
    assert f"x: 5 of {TENSORS} tensors are there from a run that did not end" in told
    assert differences(out, whole) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


SAME: dict[str, dict[str, Any]] = {
    "more workers": {"settings": Settings(workers=3, shard_bytes=30_000)},
    "another chunk": {"settings": Settings(workers=1, chunk=1 << 16, shard_bytes=30_000)},
    "licences accepted": {"settings": Settings(workers=1, accept_licenses=True, shard_bytes=30_000)},
}
OTHER: dict[str, dict[str, Any]] = {
    "another option": {"text": TEXT.replace("trim_scope: tensor", "trim_scope: tensor, density: 0.5")},
    "other names": {"text": TEXT.replace(" a: ./a", " c: ./a").replace("[a, b]", "[c, b]")},
    "other shards": {"settings": Settings(workers=1, shard_bytes=60_000)},
    "values that are not finite allowed": {"settings": Settings(workers=1, shard_bytes=30_000, allow_nan=True)},
}


@pytest.mark.parametrize("what", [*SAME, *OTHER])
def test_only_the_same_merge_goes_on(what: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = (SAME | OTHER)[what]
    whole = made(family, tmp_path / "whole" / "out", **how)
    stopped(monkeypatch, family, tmp_path / "out")
    names = after(monkeypatch, 0, interrupt)
    made(family, tmp_path / "out", **how)
    assert len(names) == (TENSORS - 8 if what in SAME else TENSORS)
    assert differences(tmp_path / "out", whole) == []


def exchange(path: Path) -> None:
    """Another file with the same values, size and time."""
    status = path.stat()
    shutil.copyfile(path, path.with_suffix(".new"))
    os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_suffix(".new").rename(path)


def rewrite(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("change", [exchange, rewrite])
def test_a_source_that_changed_since_is_read_anew(
    change: Callable[[Path], None], family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(family, tmp_path / "models")
    stopped(monkeypatch, folder, tmp_path / "out")
    change(folder / "b" / "model.safetensors")
    names = after(monkeypatch, 0, interrupt)
    made(folder, tmp_path / "out")
    assert len(names) == TENSORS
    assert differences(tmp_path / "out", made(folder, tmp_path / "whole" / "out")) == []


def failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)


def test_a_read_that_fails_costs_nothing(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        after(patch, 6, lambda: failing(patch, errno.EIO))
        with pytest.raises(
            UserError, match=rf"cannot be read: {os.strerror(errno.EIO)} \(.*check the disk.*6 of {TENSORS} tensors"
        ) as caught:
            made(family, tmp_path / "out")
    assert caught.value.code == "RG103"
    assert not (tmp_path / "out").exists()
    made(family, tmp_path / "out")
    assert differences(tmp_path / "out", family / "whole" / "out") == []


def test_a_source_that_vanishes_costs_nothing_if_it_comes_back(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(family, tmp_path / "models")
    file = folder / "b" / "model.safetensors"

    def vanish() -> None:
        file.rename(tmp_path / "away")
        with descriptors.POOL._lock:  # as if many other files had been read meanwhile
            for key in list(descriptors.POOL._open):
                os.close(descriptors.POOL._open.pop(key))

    with monkeypatch.context() as patch:
        after(patch, 6, vanish)
        with pytest.raises(UserError, match=r"the file is gone .*b/model\.safetensors.*6 of") as caught:
            made(folder, tmp_path / "out")
    assert caught.value.code == "RG101"
    with pytest.raises(UserError):
        made(folder, tmp_path / "out")
    (tmp_path / "away").rename(file)
    names = after(monkeypatch, 0, interrupt)
    made(folder, tmp_path / "out")
    assert len(names) == TENSORS - 6
    assert differences(tmp_path / "out", family / "whole" / "out") == []


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_a_sidecar_that_cannot_be_read_is_one_sentence(
    number: int, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(UserError, match=r"cannot be read: .*base/generation_config\.json.*run again") as caught:
            made(family, tmp_path / "out")
    assert caught.value.code == "RG101"
    assert list(tmp_path.iterdir()) == []


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-50, os.SEEK_END)
        file.write(b"x" * 4)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (overwrite, "was changed while regraft was reading it"),
    "touched": (lambda p: os.utime(p), "was changed while regraft was reading it"),
    "truncated": (lambda p: os.truncate(p, 40_000), "ends within|was changed"),
}


@pytest.mark.parametrize("what", list(CHANGES))
@pytest.mark.parametrize("count", [0, 6])
def test_a_source_that_changes_between_plan_and_end_ends_the_run(
    what: str, count: int, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(family, tmp_path / "models")
    change, says = CHANGES[what]
    file = folder / "b" / "model.safetensors"
    with monkeypatch.context() as patch:
        if count:
            after(patch, count, lambda: change(file))
        else:
            begin = execute.begin
            patch.setattr(execute, "begin", lambda *a: (begin(*a), change(file))[0])
        with pytest.raises(UserError, match=says) as caught:
            made(folder, tmp_path / "out")
    assert caught.value.code == "RG103"
    assert "kept" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["models"]
    if what != "truncated":
        made(folder, tmp_path / "out")


def test_bad_values_leave_nothing(family: Path, tmp_path: Path) -> None:
    folder = copied(family, tmp_path / "models")
    tensors = load_file(folder / "b" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "b" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 NaN") as caught:
        made(folder, tmp_path / "out")
    assert caught.value.code == "RG206"
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


# Runs the command line. "slowly" says "finished" after each tensor and then waits a little, "held" for a line.
DRIVER = """
import sys, time
from regraft.checkpoint.writer import ModelWriter
from regraft.cli.main import process
pace, finish = sys.argv.pop(1), ModelWriter.finish
def watched(self, name, facts):
    finish(self, name, facts)
    print("finished", flush=True)
    if pace == "held":
        sys.stdin.readline()
    time.sleep(0.1)
if pace != "at once":
    ModelWriter.finish = watched
process()
"""


def started(family: Path, out: Path, pace: str = "slowly", *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, pace, "merge", str(family / "recipe.yaml"), str(out)]
    switches = ["--workers", "1", "--shard-size", "30KB", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *switches], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_goes_on(number: signal.Signals, family: Path, tmp_path: Path) -> None:
    process = started(family, tmp_path / "out")
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "finished\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number, said
    assert said.count("\n") == 1
    assert "and the same command goes on from there" in said
    assert [p.name for p in tmp_path.iterdir()] == [staging_of(tmp_path / "out").name]
    told: list[str] = []
    made(family, tmp_path / "out", told=told)
    assert "tensors are there from a run that did not end" in told[0]
    assert differences(tmp_path / "out", family / "whole" / "out") == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_commands_race_for_one_output(family: Path, tmp_path: Path) -> None:
    first = started(family, tmp_path / "out", "held")
    assert first.stdout is not None
    assert first.stdout.readline() == "finished\n"
    second = started(family, tmp_path / "out", "at once")
    _, said = second.communicate(timeout=120)
    assert second.returncode == 2
    assert said.startswith("RG401: another run is writing this output")
    assert said.count("\n") == 1
    _, said = first.communicate(timeout=120)  # the end of its input is what it waits for
    assert first.returncode == 0, said
    assert differences(tmp_path / "out", family / "whole" / "out") == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_limit_on_file_sizes_is_a_full_disk(family: Path, tmp_path: Path) -> None:
    """What a process may write at most is the nearest to a full disk that needs no rights."""
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n{DRIVER}"
    command = [sys.executable, "-c", script, "at once", "merge", str(family / "recipe.yaml"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("RG402: the disk took no more")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", place], check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("count", [0, 6])
def test_a_disk_that_fills_up_leaves_nothing(
    count: int, family: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill() -> None:
        with (small_disk / "other").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free)

    with monkeypatch.context() as patch:
        if count:
            after(patch, count, fill)
        else:
            begin = ModelWriter.__enter__
            patch.setattr(ModelWriter, "__enter__", lambda self: (fill(), begin(self))[1])
        with pytest.raises(UserError, match="the disk took no more") as caught:
            made(family, small_disk / "out")
    assert caught.value.code == "RG402"
    assert [p.name for p in small_disk.iterdir()] == ["other"]
    with (small_disk / "other").open("r+b") as file:  # now also what the run has given back
        os.posix_fallocate(file.fileno(), 0, (small_disk / "other").stat().st_size + shutil.disk_usage(small_disk).free)
    with pytest.raises(UserError, match="are free"):
        made(family, small_disk / "out")
    (small_disk / "other").unlink()
    made(family, small_disk / "out")
    assert differences(small_disk / "out", family / "whole" / "out") == []


def test_threads_end_with_a_stopped_run(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    stopped(monkeypatch, family, tmp_path / "out")
    assert threading.active_count() == before
