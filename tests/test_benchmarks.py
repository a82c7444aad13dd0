"""The benchmark, in seconds and with a stand-in for mergekit: its models load, its results are what was run."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from regraft.recipe import load_recipe
from regraft.recipe.run import merge
from regraft.recipe.settings import Settings

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _path() -> Any:
    """Its modules find one another as they do when it is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


# Copies the base, as a merge tool that is called in the same way.
STAND_IN = """#!{python}
import shutil, sys
assert sys.argv[1:3] == ["--quiet", "recipe.yaml"], sys.argv
shutil.copytree("models/base", sys.argv[3])
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """(folder of the models, what was printed, the JSON) of a small comparison."""
    folder, environment = tmp_path_factory.mktemp("speed"), tmp_path_factory.mktemp("bin")
    (environment / "mergekit-0.1.5.dist-info").mkdir()
    (environment / "mergekit-0.1.5.dist-info" / "METADATA").write_text("Name: mergekit\nVersion: 0.1.5\n")
    python, peer = environment / "python", environment / "mergekit-yaml"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={environment} exec {sys.executable} "$@"\n')
    peer.write_text(STAND_IN.format(python=sys.executable))
    for script in (python, peer):
        script.chmod(0o755)
    arguments = ["--params", "200k", "--models", "1", "--rules", "linear,slerp", "--pairs", "1", "--predict"]
    arguments += ["--mergekit", str(peer), "--markdown", "--work", str(folder), "--keep"]
    run = subprocess.run(
        [sys.executable, str(FOLDER / "merge_speed.py"), *arguments, "--out", str(folder / "results.json")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run.stdout, json.loads((folder / "results.json").read_text())


def test_the_file_holds_every_run(done: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, results = done
    row, skipped = results["rows"]
    assert row["rule"] == "linear"
    assert (skipped["rule"], skipped["skipped"]) == ("slerp", "it needs 2 fine-tunes or more")
    assert row["bytes_read"] == sum(p.stat().st_size for p in folder.rglob("models/*/model.safetensors"))
    (ours,), (peer,) = row["regraft"], row["peer"]
    for run in (ours, peer):
        assert run["status"] == 0
        assert run["wall"] > 0.01
        assert run["cpu"] > 0.01
        assert 2 * row["parameters"] < run["bytes_written"] < 2 * row["parameters"] + 10_000
    assert peer["wall"] < ours["wall"]
    assert row["predicted"]["memory_bytes"] > 0
    if sys.platform == "linux":
        assert peer["private"] < 50e6 < ours["private"] < ours["resident"] < 4e9
    assert [len(r["wall"]) for r in results["references"]] == [1, 1, 1]


def test_the_tables_show_it(done: tuple[Path, str, dict[str, Any]]) -> None:
    _, printed, results = done
    (ours,), (peer,) = results["rows"][0]["regraft"], results["rows"][0]["peer"]
    assert re.search(rf"^linear +{ours['wall']:.2f} +{peer['wall']:.2f} ", printed, re.MULTILINE)
    assert f"| linear | {ours['wall']:.2f} | {peer['wall']:.2f} | {peer['wall'] / ours['wall']:.1f} |" in printed
    assert "`slerp` was skipped: it needs 2 fine-tunes or more." in printed
    assert results["machine"]["cpu"] in printed
    assert "mergekit 0.1.5 with python" in printed


def test_results_name_no_folder_and_no_machine(done: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, results = done
    text = json.dumps(results)
    for private in (str(folder), str(Path.home()), str(FOLDER), sys.prefix, platform.node()):
        assert private not in text


def test_the_models_load_and_differ_as_fine_tunes_do(done: tuple[Path, str, dict[str, Any]]) -> None:
    (models,) = done[0].glob("*/models")
    base, tuned = (transformers.AutoModelForCausalLM.from_pretrained(models / name) for name in ("base", "tuned-1"))
    assert base.dtype == torch.bfloat16
    unchanged = 0
    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        change = (after.float() - before.float()).std() / before.float().std()
        unchanged += int(change == 0 and before.dim() > 1)
        assert change == 0 or (before.dim() > 1 and 0.008 < change < 0.013), name
        assert abs(before.float().std() - 0.02) < 0.006, name
    assert unchanged == 1
    assert len(transformers.AutoTokenizer.from_pretrained(models / "base")) == base.config.vocab_size


def test_models_are_made_once_and_with_the_same_bytes(tmp_path: Path) -> None:
    synthetic = module("synthetic")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shape = synthetic.shape_of(2e5)
    first, other = (synthetic.make_checkpoints(tmp_path / name, shape, 1, "fp16") for name in "ab")
    bytes_of = [[path.read_bytes() for path in made.weights()] for made in (first, other)]
    assert bytes_of[0] == bytes_of[1]
    assert bytes_of[0][0] != bytes_of[0][1]
    times = [path.stat().st_mtime_ns for path in first.weights()]
    again = synthetic.make_checkpoints(tmp_path / "a", shape, 1, "fp16")
    assert [path.stat().st_mtime_ns for path in again.weights()] == times
    again.weights()[0].with_name("config.json").unlink()  # whatever happens inside, the stamp is what is believed
    (first.folder / synthetic.STAMP).unlink()
    made_again = synthetic.make_checkpoints(tmp_path / "a", shape, 1, "fp16")
    assert made_again.weights()[0].with_name("config.json").exists()


def test_shapes_have_the_size_that_is_asked_for() -> None:
    synthetic = module("synthetic")
    assert synthetic.shape_of(1.1e9) == synthetic.TINY_LLAMA
    assert synthetic.TINY_LLAMA.parameters == 1_100_048_384
    for wanted in (1e8, 5e8, 2e9, 4e9, 6e9, 1.3e10):
        shape = synthetic.shape_of(wanted)
        assert abs(shape.parameters / wanted - 1) < 0.06
        assert shape.num_attention_heads % shape.num_key_value_heads == 0
    assert [synthetic.parse_parameters(t) for t in ("1.1b", "350M", "200000")] == [1.1e9, 3.5e8, 2e5]
    for bad in ("", "b", "-1b", "1.1t", "7"):
        with pytest.raises(ValueError, match="number of parameters"):
            synthetic.parse_parameters(bad)


@pytest.mark.parametrize("models", [1, 3])
def test_every_recipe_is_one_that_regraft_reads(models: int, tmp_path: Path) -> None:
    recipes = module("recipes")
    from regraft.methods import methods

    registered = {m.name for m in methods("merge")}
    names = ("base", *(f"tuned-{i + 1}" for i in range(models)))
    for rule in recipes.RULES:
        if rule in registered and models >= recipes.CASES[rule].at_least:
            path = tmp_path / f"{rule}.yaml"
            path.write_text(recipes.recipe_for(rule, names, "bf16").text)
            (step,) = load_recipe(path).steps
            assert step.method == rule  # type: ignore[union-attr]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and told in this way on Linux")
def test_memory_is_measured_and_limited(tmp_path: Path) -> None:
    processes = module("processes")
    code = "import sys,time; kept = bytearray(int(sys.argv[1])); time.sleep(0.3)"

    def run(size: int, limit: int | None) -> Any:
        argv = [sys.executable, "-c", code, str(size)]
        return processes.measure(argv, cwd=tmp_path, log=tmp_path / "log", env=os.environ, limit_data=limit)

    small, large = run(1, 100_000_000), run(150_000_000, None)
    assert (small.status, large.status) == (0, 0)
    # A bytearray of zeros is address space, of which little is resident.
    assert 145e6 < large.data - small.data < 170e6
    assert run(150_000_000, 100_000_000).status == 1
    assert "MemoryError" in (tmp_path / "log").read_text()


def test_a_process_that_does_not_end_is_ended(tmp_path: Path) -> None:
    processes = module("processes")
    child = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    argv = [sys.executable, "-c", child]
    found = processes.measure(argv, cwd=tmp_path, log=tmp_path / "log", env=os.environ, timeout=0.5)
    assert found.status == -9
    assert 0.5 < found.wall < 20


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told in this way on Linux")
def test_private_memory_counts_children_and_no_files(tmp_path: Path) -> None:
    processes = module("processes")
    (tmp_path / "file").write_bytes(b"x" * 40_000_000)
    child = "import time; kept = b'x' * 60_000_000; time.sleep(0.5)"
    parent = (
        "import mmap, subprocess, sys\n"
        "file = open('file')\n"
        "m = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(m[i] for i in range(0, len(m), 4096))\n"
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    argv = [sys.executable, "-c", parent]
    found = processes.measure(argv, cwd=tmp_path, log=tmp_path / "log", env=os.environ)
    assert found.status == 0, (tmp_path / "log").read_text()
    assert 60e6 < found.private < 95e6
    assert found.resident > 100e6
    assert found.wall > 0.5


def test_results_are_read_back_without_torch(tmp_path: Path) -> None:
    """The page says so if there are none; what there is comes in a fixed order."""
    tables = module("tables")
    (tmp_path / "parity.json").write_text('{"cells": []}')
    assert "No results" in tables.pages(tmp_path)
    machine = {"cpu": "A processor", "cores": 2, "memory_bytes": 2**33, "disk": "ext4", "system": "Linux"}
    machine |= {"regraft": {"regraft": "1", "torch": "2"}, "mergekit": {"mergekit": "0", "torch": "2"}}
    settings = {"parameters": 1e9, "checkpoints": 4, "dtype": "bf16", "pairs": 3, "command": "python"}
    common = {"schema": 1, "date": "2026-01-01", "machine": machine, "settings": settings, "references": []}
    run = {"status": 0, "cpu": 1, "private": 5e8, "resident": 6e8, "data": 7e8}
    row = {"rule": "ties", "against": "mergekit", "parameters": 1e9, "bytes_read": 8e9, "bytes_written": 2e9}
    row |= {"regraft": [run | {"wall": w, "private": w * 1e8} for w in (2.0, 4.0, 2.5)]}
    row |= {"peer": [run | {"wall": w} for w in (30, 31, 32)]}
    compare = common | {"mode": "compare", "rows": [row, {"rule": "della", "skipped": "not there"}]}
    limited = row | {"limit_bytes": 1e9, "checkpoints": 3, "bytes_each": 2e9}
    killed = limited | {"regraft": [run | {"wall": 1.0, "status": -9}]}
    limit = common | {"mode": "limit", "rows": [limited, killed]}
    (tmp_path / "a.json").write_text(json.dumps(limit))
    (tmp_path / "b.json").write_text(json.dumps(compare))
    text = tables.pages(tmp_path)
    assert "| ties | 2.50 (2.00–4.00) | 31.00 (30.00–32.00) | 12.8 (7.8–15.0) | 1.00" in text
    assert "| 400 | 500 | 8.00 | 2.00 |" in text
    assert "`della` was skipped: not there." in text
    assert "| 1000 | passed |" in text
    assert "| 1000 | failed (-9) | failed (-9) |" in text
    assert text.index("### Speed of ties: 1 B parameters") < text.index("### Limited memory")
    for rows in ([row] * 4, [{"rule": "della", "skipped": "not there"}]):
        (tmp_path / "b.json").write_text(json.dumps(compare | {"rows": rows}))
        assert "### Speed: 1 B parameters" in tables.pages(tmp_path)
    switched = compare | {"settings": settings | {"command": "python x.py --regraft-args=--no-sync --pairs 1"}}
    assert tables.title(switched).endswith(", `--no-sync`")


def test_a_rule_beside_another_one_of_regraft_is_named() -> None:
    tables = module("tables")
    run = {"status": 0, "wall": 2.0, "cpu": 2.0, "private": 1e8}
    row = {"rule": "pcb", "against": "ties", "regraft": [run], "peer": [run | {"wall": 1.0}]}
    assert tables.cells(tables.COMPARISON, row)[:4] == ["pcb / ties", "2.00", "1.00", "0.5"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rules", "tise"], "no recipe for tise"),
        (["--mergekit", "nowhere/mergekit-yaml"], "there is no nowhere"),
        (["--scaling", "0.1b", "--limit-memory", "1GB"], "not allowed with"),
        (["--limit-memory", "much"], "--limit-memory"),
        (["--params", "tiny"], "number of parameters"),
        (["--pairs", "0"], "1 or more"),
        (["--mergekit", __file__], "cannot be told"),
    ],
)
def test_bad_calls_end_in_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = module("merge_speed").main(["--work", str(tmp_path), *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


# mergekit's environment: makes of each recipe what regraft makes of it, but for one entry of one tensor.
PARITY_STAND_IN = """#!/bin/sh
exec {python} -c '
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from regraft.recipe import load_recipe
from regraft.recipe.run import merge
for line in sys.stdin:
    job = json.loads(line)
    merge(load_recipe(job["recipe"]), Path(job["out"]))
    if "slerp" in job["out"]:
        file = Path(job["out"]) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"][3] += 0.5
        save_file(tensors, file)
    print("told " + json.dumps("it broke" if "passthrough" in job["out"] else ""), flush=True)
'
"""


def test_the_comparison_with_mergekit_sees_what_differs(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PARITY_STAND_IN.format(python=sys.executable), encoding="utf-8")
    python.chmod(0o755)
    parity = module("mergekit_parity")
    cells = list(parity.compare(tmp_path / "work", python, ["linear", "slerp", "passthrough"], ["llama"]))
    assert len(cells) == 3 * 2 * 5 * 2  # dtypes, ways of writing, arithmetic
    for cell in cells:
        expected = {"linear": (0, ""), "slerp": (1, ""), "passthrough": (0, "mergekit: it broke")}[cell.rule]
        assert (cell.apart, cell.refused) == expected, cell
        assert cell.worst > 30 if cell.rule == "slerp" else cell.worst == 0
        if cell.refused or cell.arithmetic == "float64":
            assert cell.off is cell.peer_off is None
        else:  # the stand-in errs in float64 as well, so the difference is not its rounding
            assert cell.peer_off < 3
            assert cell.off > 30 if cell.rule == "slerp" else cell.off == cell.peer_off
    results = {"cells": [vars(c) for c in cells], "machine": {"mergekit": {"mergekit": "9"}}, "date": "2026-01-01"}
    shown = module("parity_table").markdown(results)
    assert "| `linear` | 0 / 0 |" in shown
    assert "| `passthrough` | refused / refused |" in shown
    said = "in 10 of 30 recipes all entries agree to one unit, in 10 some do not, 10 stop one of the tools."
    for arithmetic in ("float32", "float64"):
        assert f"Both computing in {arithmetic}: {said}" in shown
    assert "- `slerp`, float32: 5 of " in shown
    assert " entries differ by more than a unit; regraft is up to " in shown


def test_entries_that_share_the_score_of_a_threshold_are_told_from_others() -> None:
    at_threshold = module("parity_entries").at_threshold
    rows = torch.tensor([[3.0, 1, 2, 2, 2, 5], [1, 7, 7, 4, 9, 6]])
    apart = torch.tensor([False, True, True, True, False, True])
    # 2 in the first row, 7 in the second; nothing shares its score with the last entry.
    assert at_threshold(apart, rows, 1).tolist() == [False, True, True, True, False, False]
    rows[1, 4] = 6  # now another does: a second score of that row
    assert int(at_threshold(apart, rows, 1).sum()) == 3
    assert at_threshold(apart, rows, 2).tolist() == [False, True, True, True, False, True]
    assert not at_threshold(apart, torch.arange(6.0).view(1, 6), 2).any()  # nothing is shared


def test_what_follows_from_a_tie_is_told_from_what_does_not() -> None:
    entries = module("parity_entries")
    # Scores (distances of the changes) are 5, 2, 2, 1: of the two that tie, the second tool keeps only the first.
    base = torch.zeros(4, dtype=torch.float64)
    models = torch.stack([base, base + torch.tensor([4.0, 3, 1, 1]), base + torch.tensor([-1.0, 1, 3, 2])])
    tied = torch.tensor([False, True, True, False])
    # Weights by what was kept, 16 + 9 + 1 to 1 + 1 + 9, or 16 + 9 to 1 + 1.
    all_kept = torch.tensor([4, (26 * 3 + 11 * 1) / 37, (26 * 1 + 11 * 3) / 37, 0], dtype=torch.float64)
    one_kept = torch.tensor([4, (25 * 3 + 2 * 1) / 27, 0, 0], dtype=torch.float64)
    assert entries.follows(all_kept, one_kept, models, tied).all()
    wrong = one_kept + torch.tensor([0, 1e-3, 0, 0])
    assert entries.follows(all_kept, wrong, models, tied).tolist() == [True, False, True, True]
    below = one_kept + torch.tensor([0, 0, 0, 1.5])  # an entry below the threshold is no choice among the tied
    assert not entries.follows(all_kept, below, models, tied)[3]


def test_the_comparison_of_draws_sees_another_distribution(tmp_path: Path) -> None:
    """mergekit is stood in for by other draws, and by a density of 0.32 in place of 0.3."""
    draws, table = module("parity_random"), module("parity_table")

    def other_seed(recipe: Path, out: Path) -> str:
        merge(load_recipe(recipe), out, Settings(seed=9))
        return ""

    def other_density(recipe: Path, out: Path) -> str:
        if "True" in out.name:
            return "it broke"
        other = recipe.with_name("other.yaml")
        other.write_text(recipe.read_text(encoding="utf-8").replace("density: 0.3", "density: 0.32"), encoding="utf-8")
        return other_seed(other, out)

    results = {"cells": [], "random": list(draws.compare(tmp_path / "like", other_seed, ["della"]))}
    assert all(table.furthest(row) < table.LIMIT for row in results["random"])
    assert "No distributions differ: means over 1,048,576 entries" in table.markdown(results)
    results = {"cells": [], "random": list(draws.compare(tmp_path / "unlike", other_density, ["della_linear"]))}
    shown = table.markdown(results)
    assert "1 of 1 distributions differ" in shown
    assert "- `della_linear`: mergekit: it broke" in shown
