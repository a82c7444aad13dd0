"""Deltas in recipes: `base+delta`, and a delta beside its base, merge as the fine-tune that they come from would."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farm_tools import write_tokenizer
from models import save_fine_tune, save_model
from regraft.adapters.extract import Wanted
from regraft.adapters.factors import Truncation
from regraft.adapters.publish import extract_lora
from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.lineage import Lineage
from regraft.deltas.apply import apply, open_delta
from regraft.deltas.extract import extract
from regraft.errors import UserError
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import merge, run
from regraft.recipe.settings import Settings


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, fine-tunes `a` and `b` and their dense deltas, and a `sparse` and a `bits` delta of `a`."""
    folder = tmp_path_factory.mktemp("family")
    base = save_model(folder / "base", "llama")
    for seed, name in enumerate("ab", 1):
        save_fine_tune(folder / name, base, seed)
    for name in ("base", "a", "b"):
        write_tokenizer(folder / name)
    (folder / "a" / "chat_template.jinja").write_text("{{ messages }}")
    origin = open_checkpoint(str(base))
    for tuned, kind in (("a", "dense"), ("b", "dense"), ("a", "sparse"), ("a", "bits")):
        out = folder / (f"d{tuned}" if kind == "dense" else kind)
        extract(open_checkpoint(str(folder / tuned)), origin, out, kind)  # type: ignore[arg-type]
    save_model(folder / "stranger", "llama", seed=7)
    return folder


def made(family: Path, text: str, out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    merge(parse_recipe(text, path=family / "recipe.yaml"), out, Settings(**settings))
    return load_file(out / "model.safetensors")


def refused(family: Path, text: str, out: Path, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        merge(parse_recipe(text, path=family / "recipe.yaml"), out, Settings(**settings))
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize("kind", ["da", "sparse", "bits"])
def test_an_opened_delta_is_the_applied_one(kind: str, family: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(f"{family}/base+{family}/{kind}")
    apply(open_delta(family / kind), open_checkpoint(str(family / "base")), tmp_path / "out")
    assert opened.full_digest() == open_checkpoint(str(tmp_path / "out")).full_digest()
    assert (opened.full_digest() == open_checkpoint(str(family / "a")).full_digest()) is (kind == "da")
    assert opened.files["chat_template.jinja"].read_text() == "{{ messages }}"
    assert opened.files["tokenizer.json"].parent == family / "base"


MERGES = {
    "base+delta": "models: {base: ./base, a: ./base+./da, b: ./base+./db}\nsteps: {x: {STEP}}",
    "a delta beside its base": "models: {base: ./base, a: ./da, b: ./db}\nsteps: {x: {STEP}}",
    "written out": "steps: {x: {merge: ties, base: ./base, models: [./da, ./base+./db], density: 0.5}}",
    "one of each": "models: {base: ./base, a: ./a, b: ./db}\nsteps: {x: {STEP}}",
    "mergekit": "merge_method: ties\nbase_model: ./base\nparameters: {density: 0.5, weight: 1}\n"
    "models: [{model: ./da}, {model: ./base+./db}]",
}  # fmt: skip


@pytest.mark.parametrize("how", list(MERGES))
def test_deltas_merge_as_their_fine_tunes(how: str, family: Path, tmp_path: Path) -> None:
    text = MERGES[how].replace("STEP", "merge: ties, base: base, models: [a, b], density: 0.5")
    found = made(family, text, tmp_path / "out")
    whole = made(family, text.replace("./base+", "").replace("./d", "./"), tmp_path / "whole")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    inputs = Lineage.read(tmp_path / "out").inputs
    digests = {name: hashlib.sha256((family / name / "delta.json").read_bytes()).hexdigest() for name in ("da", "db")}
    assert [record.deltas for record in inputs if record.deltas] == [
        [digest] for name, digest in digests.items() if f"./{name}" in text
    ]


def test_slices_take_deltas(family: Path, tmp_path: Path) -> None:
    text = (
        "steps: {x: {merge: task_arithmetic, base: ./base, slices: "
        "[{models: [{model: ./da, layers: [0, 1]}]}, {models: [{model: ./db, layers: [1, 2]}]}]}}"
    )
    found = made(family, text, tmp_path / "out")
    for name, other in (("layers.0", "a"), ("layers.1", "b")):
        wanted = load_file(family / other / "model.safetensors")
        for key in (key for key in wanted if name in key):
            torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-7)


def test_another_base_is_refused_and_measured_if_allowed(family: Path, tmp_path: Path) -> None:
    text = "models: {base: ./stranger, a: ./da}\nsteps: {x: {merge: task_arithmetic, base: base, models: [a]}}"
    error = refused(family, text, tmp_path / "out")
    assert error.code == "RG211"
    assert "made from (base); to it, it is as far as an unrelated model" in str(error)
    made(family, text, tmp_path / "out", force=True)
    assert "as far as an unrelated model" in Lineage.read(tmp_path / "out").warnings[0]
    plan = make_plan(parse_recipe(text, path=family / "recipe.yaml"), Settings(force=True))
    assert any("as far as an unrelated model" in warning for warning in plan.warnings)


def test_a_base_that_differs_beside_the_samples_is_refused_when_work_starts(family: Path, tmp_path: Path) -> None:
    """Norms are not among the values that a delta carries: the digest tells."""
    other = shutil.copytree(family / "base", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    text = f"steps: {{x: {{merge: task_arithmetic, base: {other}, models: [{family}/da]}}}}"
    make_plan(parse_recipe(text))
    error = refused(family, text, tmp_path / "out")
    assert error.code == "RG211"
    assert "although all values sampled are equal" in str(error)
    made(family, text, tmp_path / "out", force=True)
    assert "although all values sampled are equal" in Lineage.read(tmp_path / "out").warnings[0]


@pytest.mark.parametrize(
    ("code", "text", "sentence"),
    [
        ("RG113", "steps: {x: {merge: linear, models: [./a, ./da]}}", "write BASE\\+.*/da, or name it beside its base"),
        ("RG113", "steps: {x: {merge: task_arithmetic, base: ./da, models: [./a]}}", "is a delta, not a model"),
        (
            "RG309",
            "steps: {y: {merge: linear, models: [./a, ./b]}, x: {merge: ties, base: y, models: [./da]}}",
            "./da is a delta, and cannot be put on what the step y makes",
        ),
        (
            "RG309",
            "steps: {y: {merge: linear, models: [./a, ./b]}, x: {merge: ties, base: ./base, models: [y+./da]}}",
            "on the result of the step y",
        ),
        ("RG211", "steps: {x: {merge: linear, models: [./base+./da+./db]}}", "is not the base"),
    ],
)
def test_deltas_that_have_no_base(code: str, text: str, sentence: str, family: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        made(family, text, tmp_path / "out")
    assert caught.value.code == code


def test_a_file_of_a_delta_is_no_model(family: Path) -> None:
    with pytest.raises(UserError, match="this folder is a delta") as caught:
        open_checkpoint(str(family / "da" / "model.safetensors"))
    assert caught.value.code == "RG113"


def test_the_key_is_of_the_delta(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family, tmp_path / "family")
    text = "steps: {x: {merge: task_arithmetic, base: ./base, models: [./da]}}"
    recipe = parse_recipe(text, path=tmp_path / "family" / "recipe.yaml")
    before = make_plan(recipe).merges[0].key
    assert make_plan(recipe).merges[0].key == before
    record = json.loads((tmp_path / "family" / "da" / "delta.json").read_text())
    (tmp_path / "family" / "da" / "delta.json").write_text(json.dumps(record | {"relative_error": 0.5}))
    assert make_plan(recipe).merges[0].key != before


def test_the_output_is_not_the_delta(family: Path, tmp_path: Path) -> None:
    delta = shutil.copytree(family / "da", tmp_path / "da")
    text = f"steps: {{x: {{merge: linear, models: [{family}/base+{delta}]}}}}"
    with pytest.raises(UserError, match="the output is the folder of") as caught:
        merge(parse_recipe(text), delta, Settings(force=True))
    assert caught.value.code == "RG401"
    assert (delta / "delta.json").exists()


def test_models_with_deltas_and_adapters_are_evaluated(family: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"w{i}" for i in range(start, start + 20))} for start in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (
        f"models: {{a: {family}/a, d: {family}/base+{family}/da, l: {family}/base+{tmp_path}/lora}}\n"
        "steps: {s: {evaluate: perplexity, models: [a, d, l], data: texts.jsonl}}"
    )
    tuned, base = (open_checkpoint(str(family / name)) for name in ("a", "base"))
    extract_lora(tuned, base, tmp_path / "lora", Wanted(Truncation(rank=64), save=["all"], embeddings=True))
    recipe = parse_recipe(text, path=tmp_path / "recipe.yaml")
    plan = make_plan(recipe)
    written = plan.to_dict()["steps"][0]["written"]
    assert written.keys() == {"d", "l"}
    assert sum(written.values()) == plan.disk_bytes > 0
    first, second, third = (one.score["value"] for one in run(recipe, tmp_path / "out").evaluations)
    assert first == second == pytest.approx(third, rel=1e-4)
    made_folders = sorted((tmp_path / "out" / "artefacts").glob("*/model.safetensors"))
    before = [path.stat().st_mtime_ns for path in made_folders]
    assert len(before) == 2
    run(recipe, tmp_path / "out")  # nothing is written again
    assert [path.stat().st_mtime_ns for path in made_folders] == before
    text = text.replace(f"{family}/base+", "")
    with pytest.raises(UserError, match="this folder is a delta") as caught:
        make_plan(parse_recipe(text, path=tmp_path / "recipe.yaml"))
    assert caught.value.code == "RG113"


@pytest.mark.parametrize("kind", ["da", "bits"])
def test_deltas_become_an_adapter(kind: str, family: Path, tmp_path: Path) -> None:
    step = f"merge: task_arithmetic, base: ./base, models: [./{kind}], weight: 0.5, output: lora, rank: 32"
    text = f"steps: {{x: {{{step}}}}}"
    with pytest.raises(UserError, match="is no sum of the adapters' factors") as caught:
        made(family, text.replace(", rank: 32", ""), tmp_path / "lora")
    assert caught.value.code == "RG309"
    merge(parse_recipe(text, path=family / "recipe.yaml"), tmp_path / "lora")
    whole = made(family, text.replace(", output: lora, rank: 32", ""), tmp_path / "whole")
    applied = open_checkpoint(f"{family}/base+{tmp_path}/lora")
    for name, value in whole.items():
        torch.testing.assert_close(applied.source(name).read(), value.flatten(), rtol=1e-5, atol=1e-5)
