"""Runs: each seed kept at once, a killed run goes on, figures of two states of the code are never mixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regraft.claims.find import claims, state_of
from regraft.claims.results import Results, results_of
from regraft.claims.run import perform, run_claims
from regraft.claims.zoo import NotGoodEnoughError
from regraft.errors import UserError


def ran(folder: Path) -> list[str]:
    """What the tiny claims were run with."""
    log = folder / "ran.txt"
    return log.read_text().splitlines() if log.exists() else []


def test_figures_verdict_and_surroundings_are_written(tiny: Path, tmp_path: Path) -> None:
    (result, _) = run_claims(claims(tiny), range(5), tmp_path / "results", jobs=1)
    stored = json.loads((tmp_path / "results" / "01.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(result.to_dict()))
    assert stored["verdict"] == "held"
    assert stored["checks"][0]["effects"] == pytest.approx([0.1, 0.105, 0.11, 0.115, 0.12])
    assert stored["checks"][1]["verdict"] == "not held"  # does not decide
    assert list(stored["seeds"]) == ["0", "1", "2", "3", "4"]
    one = stored["seeds"]["3"]
    assert one["figures"] == {"ours": 0.83, "theirs": 0.715}
    assert one["seconds"] >= 0
    assert {"torch", "regraft", "python"} <= set(one["versions"])
    assert one["commit"] is None  # the folder is in no repository
    assert str(tmp_path) not in json.dumps(stored)


def test_several_processes_find_the_same(tiny: Path, tmp_path: Path) -> None:
    one = run_claims(claims(tiny, ["1"]), range(3), tmp_path / "one", jobs=1)
    two = run_claims(claims(tiny, ["1"]), range(3), tmp_path / "two", jobs=2)
    assert one[0].figures == two[0].figures


def test_a_run_that_failed_goes_on_where_it_was(tiny: Path, tmp_path: Path) -> None:
    stop = tiny / "stop_at"
    stop.write_text("2")
    with pytest.raises(RuntimeError, match="power cut"):
        run_claims(claims(tiny, ["1"]), range(4), tmp_path / "results", jobs=1)
    assert list(json.loads((tmp_path / "results" / "01.json").read_text())["seeds"]) == ["0", "1"]
    stop.unlink()
    (result,) = run_claims(claims(tiny, ["1"]), range(4), tmp_path / "results", jobs=1)
    assert list(result.seeds) == ["0", "1", "2", "3"]
    assert ran(tiny) == ["0 laptop", "1 laptop", "2 laptop", "2 laptop", "3 laptop"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_model_that_is_not_good_enough_stops_nothing_else(tiny: Path, tmp_path: Path, jobs: int) -> None:
    path = tiny / "01_tiny.py"
    bad = "    if seed == 1:\n        raise NotGoodEnoughError('too bad')\n    return {"
    text = path.read_text().replace("    return {", bad)
    path.write_text(
        text.replace("from regraft.methods", "from regraft.claims.zoo import NotGoodEnoughError\nfrom regraft.methods")
    )
    said: list[str] = []
    with pytest.raises(NotGoodEnoughError, match="too bad"):
        run_claims(claims(tiny), range(3), tmp_path / "results", jobs=jobs, say=said.append)
    for name, seeds in (("01", ["0", "2"]), ("02", ["0", "1", "2"])):
        assert list(json.loads((tmp_path / "results" / f"{name}.json").read_text())["seeds"]) == seeds
    assert any(line.startswith("claim 01, seed 1: not run, because too bad") for line in said)


def test_a_killed_command_leaves_whole_results(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "01_tiny.py"
    path.write_text(path.read_text().replace("    return {", "    import time; time.sleep(0.2)\n    return {"))
    command = [sys.executable, "-m", "regraft", "claims", "run", "1", "--seeds", "1000", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = tiny / "results" / "01.json"
    deadline = time.monotonic() + 120
    while not results.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(json.loads(results.read_text())["seeds"])
    assert done >= 1
    (result,) = run_claims(claims(tiny, ["1"]), range(done + 1), tiny / "results", jobs=1)
    assert len(result.seeds) in (done + 1, done + 2)  # the seed that was under way may have been finished


def test_results_of_another_state_of_the_code_are_not_mixed_in(tiny: Path, tmp_path: Path) -> None:
    run_claims(claims(tiny, ["1"]), range(2), tmp_path / "results", jobs=1)
    path = tiny / "01_tiny.py"
    path.write_text(path.read_text() + "# changed\n")
    said: list[str] = []
    found = claims(tiny, ["1"])
    assert results_of(found[0], tmp_path / "results", "laptop").seeds == {}
    shown = results_of(found[0], tmp_path / "results", "laptop", any_code=True)
    assert shown.earlier_code
    assert list(shown.seeds) == ["0", "1"]
    (result,) = run_claims(found, range(1), tmp_path / "results", jobs=1, say=said.append)
    assert list(result.seeds) == ["0"]
    assert any("another state of its code" in line for line in said)


def test_the_state_of_the_code_includes_what_it_imports(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    folder.mkdir()
    (tmp_path / "examples" / "digits").mkdir(parents=True)
    example = tmp_path / "examples" / "digits" / "skills.py"
    example.write_text("x = 1\n")
    (folder / "deep.py").write_text("from claims.shared import example\nexample('digits', 'skills')\n")
    (folder / "shared.py").write_text("y = 1\n")
    claim = folder / "01_one.py"
    claim.write_text("from claims import deep\n")
    states = {state_of(claim)}
    for path in (example, folder / "deep.py", folder / "shared.py", claim):
        path.write_text(path.read_text() + "z = 2\n")
        states.add(state_of(claim))
    assert len(states) == 5
    (folder / "other.py").write_text("not imported")
    assert state_of(claim) in states


def test_what_a_claim_says_of_itself_is_no_part_of_its_code(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    claim = tmp_path / "claims" / "01_one.py"
    states = []
    for said in ("", '"""Not run yet."""\n', '"""Held,\nin two lines."""\n'):
        claim.write_text(said + "x = 1\n")
        states.append(state_of(claim))
    assert len(set(states)) == 1
    claim.write_text('"""Held."""\nx = 2\n')
    assert state_of(claim) != states[0]


def test_smoke_is_not_judged_and_does_not_touch_results(tiny: Path, tmp_path: Path) -> None:
    (result,) = run_claims(claims(tiny, ["1"]), range(3), tmp_path / "results", scale="smoke", jobs=1)
    assert result.verdict == "not judged"
    assert result.findings == []
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["01.smoke.json"]


def test_figures_that_are_no_numbers_are_refused(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "01_tiny.py"
    path.write_text(path.read_text().replace("0.8 + 0.01 * seed", "float('nan')"))
    with pytest.raises(RuntimeError, match="ours is no finite number"):
        run_claims(claims(tiny, ["1"]), range(1), tmp_path / "results", jobs=1)
    assert not (tmp_path / "results" / "01.json").exists()


def test_threads_of_the_process_are_as_before(tiny: Path) -> None:
    import torch

    from regraft.claims.run import Task

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        perform(Task(claims(tiny, ["1"])[0].path, 0, "smoke"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("content", ["{", "[]", '{"seeds": []}', '{"seeds": {"0": {"figures": {"a": "b"}}}}'])
def test_results_that_cannot_be_used_are_named(tiny: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "01.json").write_text(content)
    with pytest.raises(UserError, match=r"01\.json") as error:
        results_of(claims(tiny, ["1"])[0], tmp_path, "laptop")
    assert error.value.code == "RG904"
    assert "remove it" in str(error.value)


def test_results_that_cannot_be_written_are_an_error(tiny: Path, tmp_path: Path) -> None:
    found = claims(tiny, ["1"])[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as error:
        Results(found.claim, tmp_path / "file" / "01.json", "laptop", "").add(0, {"figures": {}})
    assert error.value.code == "RG405"
