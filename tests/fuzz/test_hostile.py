"""Some damaged inputs in every run of the tests; `python tests/fuzz/hostile.py --inputs 20000` is the long mode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import seeds
from fuzz.targets import TARGETS
from fuzz.world import Input, World
from regraft.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("world") / "world", seconds=20)
    with found.entered():
        yield found


def test_a_fixed_number_of_inputs() -> None:
    """In a process of its own, whose end by a signal is a failure too."""
    command = [sys.executable, str(Path(__file__).with_name("hostile.py")), "--inputs", "160", "--seconds", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^160 inputs in .* 0 failures$", done.stdout, re.MULTILINE), done.stdout
    assert re.findall(r"^(\w+): 20 inputs, [1-9]", done.stdout, re.MULTILINE) == list(TARGETS)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(TARGETS)), rng=st.randoms(use_true_random=False))
def test_inputs_that_hypothesis_chooses_and_shrinks(world: World, name: str, rng: Random) -> None:
    failures, _ = world.judge(lambda world: TARGETS[name](rng, world))
    assert not failures, "\n".join(f"{failure.what}\n{failure.trace}" for failure in failures)


@pytest.mark.parametrize("kind", ["model", "adapter", "recipe"])
def test_what_is_not_damaged_works(world: World, kind: str) -> None:
    places = {name: str(world.seed(name)) for name in ("base", "a", "b")}
    refs = {"model": [places["a"]], "adapter": [f"{places['a']}+{world.seed('adapter')}"], "recipe": []}[kind]
    text = seeds.MERGEKIT.format(**places) if kind == "recipe" else ""
    failures, answers = world.judge(lambda world: Input(refs, text, run=True, deep=True))
    assert not failures, failures
    assert set(answers) == {"worked"}


def test_the_watch_sees_what_it_is_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fuzzer that cannot fail finds nothing: each kind of misbehaviour is told."""

    def seen(misbehave: object, seconds: float = 20) -> str:
        monkeypatch.setattr("fuzz.world.open_checkpoint", misbehave)
        monkeypatch.setattr(world, "seconds", seconds)
        failures, _ = world.judge(lambda world: Input(["x"]))
        return " ".join(failure.what for failure in failures)

    def two_lines(*args: object, **options: object) -> None:
        error = UserError("RG101", "what")
        error.args = ("two\nlines",)
        raise error

    marker = world.root / "cwd" / "marker"
    assert "KeyError: 'x'" in seen(lambda *a, **o: {}["x"])
    assert "SystemExit" in seen(lambda *a, **o: sys.exit(1))
    assert "Hang" in seen(lambda *a, **o: time.sleep(20), 0.2)
    assert "no sentence" in seen(two_lines)
    assert "os.system" in seen(lambda *a, **o: os.system("true"))
    assert "of memory at the peak" in seen(lambda *a, **o: b"x" * 10**9)
    told = seen(lambda *a, **o: marker.write_text("x"))
    assert "opened for writing" in told
    assert "changed outside the output" in told
    assert str(marker) in seen(lambda *a, **o: marker.unlink())
