"""Syncing in the background: enough at a time, never in the way, and no failure of the disk gets lost."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from regraft.checkpoint import flush
from regraft.checkpoint.flush import EVERY, Flusher

SYNC = "fdatasync" if hasattr(os, "fdatasync") else "fsync"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "x").write_bytes(b"x")
    return tmp_path / "x"


def wait_for(condition: threading.Event) -> None:
    assert condition.wait(10)


def test_a_file_is_synced_once_enough_was_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    monkeypatch.setattr(os, SYNC, lambda descriptor: synced.set())
    flusher = Flusher()
    flusher.wrote(file, EVERY - 1)
    assert not synced.wait(0.05)
    flusher.wrote(file, 1)
    wait_for(synced)
    flusher.close()


def test_writers_do_not_wait_for_the_disk(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release, calls = threading.Event(), threading.Event(), []

    def slow(descriptor: int) -> None:
        calls.append(descriptor)
        entered.set()
        wait_for(release)

    monkeypatch.setattr(os, SYNC, slow)
    flusher = Flusher()
    flusher.wrote(file, EVERY)
    wait_for(entered)
    for _ in range(10):
        flusher.wrote(file, EVERY)  # would not come back if it waited
    closing = threading.Thread(target=flusher.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    release.set()
    closing.join(10)
    assert len(calls) == 1  # what came meanwhile is left to the sync before publishing


def test_a_failed_sync_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = threading.Event()

    def fail(descriptor: int) -> None:
        entered.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, SYNC, fail)
    flusher = Flusher()
    flusher.wrote(file, EVERY)
    wait_for(entered)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        flusher.close()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        flusher.wrote(file, 1)


def test_file_systems_that_cannot_sync_are_no_failure(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = threading.Event()

    def unsupported(descriptor: int) -> None:
        entered.set()
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, SYNC, unsupported)
    flusher = Flusher()
    flusher.wrote(file, EVERY)
    wait_for(entered)
    flusher.close()


def test_real_files_are_synced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "EVERY", 1)
    real, seen = getattr(os, SYNC), threading.Event()

    def watched(descriptor: int) -> None:
        real(descriptor)
        seen.set()

    monkeypatch.setattr(os, SYNC, watched)
    flusher = Flusher()
    flusher.wrote(file, 1)
    wait_for(seen)
    flusher.close()
    flusher.close()
