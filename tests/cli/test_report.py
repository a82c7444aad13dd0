"""`regraft report` and `regraft compare`: pages and bundles of runs and models, from end to end."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from farm_tools import write_card
from models import save_fine_tune
from regraft.checkpoint.lineage import FILE_NAME, InputRecord, Lineage, Output
from regraft.report.folder import read_run
from regraft.report.run import write_report

TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a sweep and scores, of models in folders whose names have to be escaped."""
    from models import save_model
    from regraft.recipe.load import load_recipe
    from regraft.recipe.run import run

    root = tmp_path_factory.mktemp("private place")
    base = save_model(root / "base", "llama", num_hidden_layers=5)
    save_fine_tune(root / "<script>alert(1)<", base, 1)
    save_fine_tune(root / "b", base, 2)
    (root / "recipe.yaml").write_text(
        f"# uses {TOKEN}\n"
        f'models: {{base: "{root}/base", odd: "{root}/<script>alert(1)<", b: "{root}/b"}}\n'
        "steps:\n"
        "  merged:\n"
        "    merge: task_arithmetic\n"
        "    base: base\n"
        "    models: [odd, b]\n"
        "    sweep: {lambda: [0.25, 0.5, 1.0]}\n"
        "  top: {merge: linear, models: ['merged@lambda=0.5', b]}\n",
        encoding="utf-8",
    )
    out = root / "run"
    run(load_recipe(root / "recipe.yaml"), out)
    scores = [
        {"step": "test", "metric": "accuracy", "model": model, "data": f"{root}/test.jsonl",
         "score": {"value": value, "n": 50, "interval": [value - 0.11, value + 0.11]}}
        for model, value in (("base", 0.5), ("merged@lambda=0.25", 0.6), ("merged@lambda=0.5", 0.8), ("top", 0.7))
    ]  # fmt: skip
    (out / "scores.json").write_text(json.dumps(scores))
    (out / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": i, "loss": 1 / i} for i in (1, 2)]}))
    return out


def test_a_run_has_a_page_with_everything(cli, run_folder: Path, tmp_path: Path) -> None:
    done = cli("report", run_folder, "-o", tmp_path / "page.html", "--title", "A title", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["models"] == ["merged@lambda=0.25", "merged@lambda=0.5", "merged@lambda=1.0", "top"]
    assert told["evaluations"] == 4
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert titles == [
        "Scores", "Scores: overall", "Sweep of lambda", "Training", "Training: loss", "Lineage",
        "How each model was made", "Every model", "Cost", "Cost: seconds per model",
        "Cosines of task vectors", "Change by layer", "Sign conflicts by layer", "Recipe",
    ]  # fmt: skip
    assert "<h1>A title</h1>" in page
    sentence = "test: of 4 models merged@lambda=0.5 is best by accuracy, 80.0 % (95 % interval 69.0 % to 91.0 %)"
    assert sentence in page
    assert "of those that were there before, base, 50.0 %" in page
    assert "The intervals of 2 other models overlap with its own" in page
    assert len(re.findall(r'class="node ', page)) == 3 + 4
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert page.count("<script") == 1


def test_the_page_lies_in_the_run_unless_told(cli, run_folder: Path) -> None:
    done = cli("report", run_folder)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"{run_folder}/report.html: ")
    assert (run_folder / "report.html").is_file()
    (run_folder / "report.html").unlink()


def test_a_single_model_and_lost_links_have_pages_too(cli, run_folder: Path, tmp_path: Path) -> None:
    done = cli("report", run_folder / "top", "-o", tmp_path / "top.html", "--json")
    assert json.loads(done.stdout)["models"] == ["top"]
    (tmp_path / "copy").mkdir()
    shutil.copytree(run_folder / "artefacts", tmp_path / "copy" / "artefacts")
    done = cli("report", tmp_path / "copy", "-o", tmp_path / "copy.html", "--json")
    assert len(json.loads(done.stdout)["models"]) == 4
    (tmp_path / "copy" / "gone").symlink_to("artefacts/nothing")
    assert "gone leads to a model that is not there any more" in cli("report", tmp_path / "copy").stderr


def test_a_bundle_holds_what_is_needed_and_nothing_private(cli, run_folder: Path, tmp_path: Path) -> None:
    bundles = [tmp_path / name / "bundle.zip" for name in ("one", "two")]
    for bundle in bundles:
        bundle.parent.mkdir()
        done = cli("report", run_folder, "-o", tmp_path / "page.html", "--bundle", bundle)
        assert done.exit_code == 0, done.stderr
    assert bundles[0].read_bytes() == bundles[1].read_bytes()
    with zipfile.ZipFile(bundles[0]) as archive:
        files = {name.removeprefix("bundle/"): archive.read(name).decode() for name in archive.namelist()}
    assert {"README.md", "report.html", "recipe.yaml", "lock.json", "scores.json", "logs/run.json"} <= set(files)
    assert "models/merged@lambda=0.5/regraft.json" in files
    assert "models/top/README.md" in files
    for name, text in files.items():
        assert str(run_folder.parent) not in text, name
        assert "private place" not in text, name
        assert TOKEN not in text, name
    assert "[removed]" in files["recipe.yaml"]
    lock = json.loads(files["lock.json"])
    assert lock["inputs"]["base"]["ref"] == "base"
    assert len(lock["inputs"]["base"]["digest"]) == 64
    assert lock["steps"]["top"]["inputs"] == ["merged@lambda=0.5", "b"]
    assert lock["software"][0]["torch"]
    assert "<script>alert" not in files["report.html"]


def test_fifty_steps_and_twenty_models_stay_below_a_megabyte(tmp_path: Path) -> None:
    models = [f"model-{i:02d}-with-an-ordinary-name" for i in range(20)]
    cosine = [[0.1234567 + (i == j) for j in range(20)] for i in range(20)]
    layers = [
        {"stack": "", "layer": i, "norms": [0.1 * k + i for k in range(20)], "base_norm": 9.0, "sign_conflict": 0.4}
        for i in range(32)
    ]
    for i in range(50):
        folder = tmp_path / "run" / f"step{i}"
        folder.mkdir(parents=True)
        inputs = [InputRecord(name=m, ref=f"org/{m}", digest="d" * 64) for m in models]
        inputs.append(InputRecord(name="base", ref="org/base", role="base", digest="e" * 64))
        Lineage(
            step=f"step{i}@lambda={i / 50}", method="ties", inputs=inputs, key=f"{i:064d}", wall_seconds=1.0 + i,
            peak_memory_bytes=10**9, output=Output(tensors=9, parameters=9, bytes=9, dtype="float32"),
            diagnostics={"models": models, "cosine": cosine, "layers": layers}, warnings=["something to say"],
        ).write(folder)  # fmt: skip
    groups = {name: {"value": 0.5, "n": 3} for name in "abcde"}
    scores = [
        {"step": "test", "metric": "accuracy", "model": name, "data": "t.jsonl",
         "score": {"value": 0.5, "n": 9, "interval": [0.4, 0.6], "per_group": groups}}
        for name in ["base", *models, *(f"step{i}@lambda={i / 50}" for i in range(50))]
    ]  # fmt: skip
    (tmp_path / "run" / "scores.json").write_text(json.dumps(scores))
    page = write_report(read_run(tmp_path / "run"), tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    assert text.count('class="node ') == 71
    assert text.count("and 45 more: something to say") == 1  # a remark on all of them is made once
    assert page.stat().st_size < 1_000_000


def test_a_folder_without_anything_is_an_error(cli, tmp_path: Path) -> None:
    for folder, what in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path, "holds no model that regraft made"),
    ):
        done = cli("report", folder)
        assert done.exit_code == 2
        assert done.stderr.startswith("RG603: ")
        assert what in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[{}]", "an entry lacks its step"),
        ('[{"step": "s", "metric": "m", "model": "x", "data": "d", "score": {}}]', "value"),
    ],
)
def test_scores_that_are_malformed_are_an_error(cli, tmp_path: Path, content: str, what: str) -> None:
    (tmp_path / "scores.json").write_text(content)
    done = cli("report", tmp_path)
    assert done.exit_code == 2
    assert done.stderr.startswith("RG105: ")
    assert what in done.stderr


def test_a_bundle_that_cannot_be_written_is_an_error(cli, run_folder: Path, tmp_path: Path) -> None:
    done = cli("report", run_folder, "-o", tmp_path / "page.html", "--bundle", tmp_path / "none" / "b.zip")
    assert done.exit_code == 2
    assert done.stderr.startswith("RG405: the bundle cannot be written")


def test_models_are_compared_on_a_page(cli, family: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = cli("compare", family / "a", family / "b", "--base", family / "base", "-o", page)
    assert done.exit_code == 0, done.stderr
    assert "What can combine them" in done.stdout
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert titles[:9] == [
        "What can combine them", "Lineage", "How near their weights are", "Pair by pair", "What changed in the base",
        "Cosines of task vectors", "Sign conflicts", "Change by layer", "Sign conflicts by layer",
    ]  # fmt: skip
    assert "Mean |change| by part: a" in titles
    found = json.loads(cli("inspect", family / "a", "-o", tmp_path / "one.html", "--json").stdout)
    assert found["report"] == str(tmp_path / "one.html")
    assert (tmp_path / "one.html").is_file()


def test_the_base_is_found_where_all_others_name_it(cli, family: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        shutil.copytree(family / name, tmp_path / name)
    for name in ("a", "b"):
        write_card(tmp_path / name, f"base_model: {tmp_path}/base")
    folders = [tmp_path / name for name in ("a", "base", "b")]
    found = json.loads(cli("compare", *folders, "--json").stdout)
    assert found["deltas"]["base"] == str(tmp_path / "base")
    assert found["comparison"]["models"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    (tmp_path / "b" / "README.md").unlink()  # one that says nothing, and it is not guessed
    done = cli("compare", *folders, "--json")
    assert "deltas" not in json.loads(done.stdout)
    assert "no base is named by --base or by the models' files" in done.stderr


def test_the_record_of_a_merge_names_its_base(cli, family: Path, recipe: Path, tmp_path: Path) -> None:
    assert cli("merge", recipe, tmp_path / "merged").exit_code == 0
    found = json.loads(cli("compare", family / "base", tmp_path / "merged", "--json").stdout)
    assert found["deltas"]["base"] == str(family / "base")
    (tmp_path / "merged" / FILE_NAME).write_text("{}")  # a damaged record tells nothing
    assert "deltas" not in json.loads(cli("compare", family / "base", tmp_path / "merged", "--json").stdout)


def test_one_model_is_nothing_to_compare(cli, family: Path) -> None:
    done = cli("compare", family / "a")
    assert done.exit_code == 2
    assert done.stderr.startswith("RG305: there is nothing to compare with")


def test_the_curve_in_the_record_of_a_trained_model_is_drawn(tmp_path: Path) -> None:
    history = [{"step": float(i), "loss": 1 / i} for i in (1, 2, 3)]
    lineage = Lineage(kind="train", method="plain", step="tuned", key="k", settings={"epochs": 3})
    lineage.diagnostics = {"training": {"steps": 3, "history": history}}
    (tmp_path / "tuned").mkdir()
    lineage.write(tmp_path / "tuned")
    run = read_run(tmp_path)
    assert [log.name for log in run.logs] == ["tuned"]
    page = write_report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Training: loss" in page
    assert "plain · epochs 3" in page


def test_a_run_writes_the_page_that_report_writes(cli, recipe: Path, tmp_path: Path) -> None:
    assert cli("run", recipe, "-o", tmp_path / "run").exit_code == 0
    first = (tmp_path / "run" / "report.html").read_bytes()
    done = cli("report", tmp_path / "run", "-o", tmp_path / "page.html", "--title", recipe.stem)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "page.html").read_bytes() == first
