"""A few kills in every run of the tests; `python tests/fuzz/kills.py --kills 200` is the long mode."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.kills import COMMANDS, RULES


@pytest.mark.parametrize("cases", [RULES, COMMANDS], ids=["merges", "deltas and adapters"])
def test_what_was_killed_is_finished_by_the_same_command(cases: dict[str, str]) -> None:
    """In a process of its own: forks of one that has threads may hang."""
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", "6", "--seed", "1"]
    command += ["--cases", ",".join(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) kills in (\d+) cases: 0 invalid outputs, (\d+) of (\d+) identical", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) >= 6
    assert found[2] == found[3] == found[4]
