"""The journal of an unfinished run: what is believed of it, and what is not."""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.checkpoint import journal
from regraft.checkpoint.journal import Journal

IDENTITY = {"key": "abc", "shards": [[1, 2]]}
NAMES = frozenset({"a", "b", "c", "ü\n"})


def written(path: Path, *names: str) -> Journal:
    """A closed journal with these tensors."""
    made = Journal.create(path, IDENTITY)
    for i, name in enumerate(names):
        made.add(name, {"n": i})
    made.close()
    return made


def believed(path: Path, identity: Any = IDENTITY) -> list[str] | None:
    """The names that a later run would take as finished, None if it would begin anew."""
    found = Journal.adopt(path, identity, NAMES)
    if found is None:
        return None
    found.close()
    return list(found.finished)


def test_what_is_added_comes_back(tmp_path: Path) -> None:
    facts = {"sum": 0.1 + 0.2, "tiny": 5e-324, "inf": float("-inf"), "text": "ü\n\r", "list": [1, None, True]}
    made = Journal.create(tmp_path / "j", IDENTITY)
    made.add("ü\n", facts)
    made.add("a", {})
    made.close()
    found = Journal.adopt(tmp_path / "j", IDENTITY, NAMES)
    assert found is not None
    assert found.finished == {"ü\n": facts, "a": {}}
    found.add("b", {})
    found.close()
    assert found.count == 3
    assert believed(tmp_path / "j") == ["ü\n", "a", "b"]


@given(st.floats(allow_nan=False))
def test_floats_are_exact(value: float) -> None:
    assert json.loads(json.dumps(value)) == value


def test_another_identity_is_not_believed(tmp_path: Path) -> None:
    written(tmp_path / "j", "a")
    assert believed(tmp_path / "j", {**IDENTITY, "key": "abd"}) is None
    assert believed(tmp_path / "j", {"key": "abc"}) is None
    assert believed(tmp_path / "j") == ["a"]


def test_nothing_is_believed_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert journal.boot_id() == journal.boot_id() != ""
    written(tmp_path / "j", "a")
    monkeypatch.setattr(journal, "boot_id", lambda: "another start of the machine")
    assert believed(tmp_path / "j") is None


def test_a_torn_last_line_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written(path, "a", "b")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    second = whole.index(b"\n", first) + 1
    for end in range(second, len(whole)):
        path.write_bytes(whole[:end])
        assert believed(path) == ["a"]
        assert path.read_bytes() == whole[:second]  # so that what is appended begins a line
    for end in range(first):
        path.write_bytes(whole[:end])
        assert believed(path) is None


def test_a_damaged_line_ends_what_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written(path, "a", "b", "c")
    lines = path.read_bytes().splitlines(keepends=True)
    for i, line in enumerate(lines):
        for at in range(len(line)):
            damaged = bytearray(line)
            damaged[at] ^= 1
            path.write_bytes(b"".join([*lines[:i], bytes(damaged), *lines[i + 1 :]]))
            assert believed(path) == (["a", "b", "c"][: i - 1] if i else None)


@pytest.mark.parametrize("value", [["unknown", {}], ["a"], {"a": {}}, "a", ["a", {}, 1], [["a"], {}], ["b", 1]])
def test_a_line_that_says_something_else_ends_what_is_believed(tmp_path: Path, value: Any) -> None:
    written(tmp_path / "j", "a")
    text = json.dumps(value).encode()
    with (tmp_path / "j").open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    assert believed(tmp_path / "j") == ["a"]


def test_no_journal_and_no_file(tmp_path: Path) -> None:
    assert believed(tmp_path / "none") is None
    (tmp_path / "empty").touch()
    assert believed(tmp_path / "empty") is None
    written(tmp_path / "j", "a")
    (tmp_path / "link").symlink_to("j")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        believed(tmp_path / "link")
    with pytest.raises(FileExistsError):
        Journal.create(tmp_path / "j", IDENTITY)


def test_lines_of_many_threads_are_whole(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(200)]
    made = Journal.create(tmp_path / "j", IDENTITY)
    threads = [
        threading.Thread(target=lambda part=part: [made.add(n, {"n": n * 50}) for n in part])
        for part in (names[i::4] for i in range(4))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    found = Journal.adopt(tmp_path / "j", IDENTITY, names)
    assert found is not None
    found.close()
    assert dict(found.finished) == {n: {"n": n * 50} for n in names}


def test_a_line_that_the_disk_took_in_part_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Journal.create(tmp_path / "j", IDENTITY)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        made.add("a", {})
    monkeypatch.undo()
    made.close()
    assert believed(tmp_path / "j") == []


def test_a_closed_journal_takes_nothing(tmp_path: Path) -> None:
    made = written(tmp_path / "j")
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        made.add("a", {})


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "j", "a")
    monkeypatch.setattr(journal, "_LIMIT", 10)
    assert believed(tmp_path / "j") is None
