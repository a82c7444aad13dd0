"""fine_tune, distil and minilm: what they learn, on real models, in a recipe."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from typer.testing import CliRunner

import regraft
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.progress import Silent
from regraft.recipe.run import run
from regraft.recipe.schema import schema
from regraft.train.batches import batches_for
from regraft.train.methods.distil import distil
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.methods.minilm import minilm
from tiny import output_of, pictures, save_tiny, texts, write_rows

FAST: dict[str, Any] = {"device": "cpu", "per_device_train_batch_size": 8, "logging_steps": 1}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", texts())


def test_fine_tune_learns(data: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    made = fine_tune(folder, data=data, folder=tmp_path / "a", max_steps=20, learning_rate=5e-3, **FAST)
    history = made.diagnostics["training"]["history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    batch = batches_for(made.model, folder, texts()[0]).collate(texts(), [0] * 24)
    before, after = (float(m.eval()(**batch).loss) for m in (regraft.load(folder), made.model))
    assert after < before


def test_half_precision_is_trained_in_full_and_stays_half(data: Path, tmp_path: Path) -> None:
    """A rate at which no weight of bfloat16 would move by itself: the sum of many small steps does not get lost."""
    folder = save_tiny(tmp_path / "gpt2", "gpt2", dtype=torch.bfloat16)
    made = fine_tune(
        folder, data=data, folder=tmp_path / "a", max_steps=20, learning_rate=2e-5, lr_scheduler_type="constant",
        weight_decay=0.0, **FAST,
    )  # fmt: skip
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    before, after = (m.state_dict()["transformer.ln_f.weight"] for m in (regraft.load(folder), made.model))
    # Near 1 the step of bfloat16 is 1/256; a norm moves by 20 * 2e-5 at most, so it must come back unchanged ...
    assert torch.equal(before, after)
    # ... while small weights, whose steps are finer, have moved by the sum.
    name = "transformer.h.0.mlp.c_fc.weight"
    moved = (made.model.state_dict()[name].float() - regraft.load(folder).state_dict()[name].float()).abs()
    assert float(moved.max()) > 2e-4


def test_fine_tune_with_a_new_head(data: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")
    options: dict[str, Any] = {"head": "sequence_classification", "labels": ("even", "odd"), "max_steps": 2} | FAST
    made = fine_tune(folder, data=data, folder=tmp_path / "a", **options)
    assert type(made.model).__name__ == "BertForSequenceClassification"
    assert made.model.config.id2label == {0: "even", 1: "odd"}
    with pytest.raises(UserError, match="needs the names of its classes"):
        fine_tune(folder, data=data, folder=tmp_path / "b", head="sequence_classification", max_steps=1)
    with pytest.raises(UserError, match="labels are for a new head"):
        fine_tune(folder, data=data, folder=tmp_path / "c", labels=("a", "b"), max_steps=1)
    blank = write_rows(tmp_path / "blank.jsonl", [{"text": "w1"}])
    with pytest.raises(UserError, match="has no loss of its own"):
        fine_tune(folder, data=blank, folder=tmp_path / "d", **options)


def test_distil_makes_the_student_agree(tmp_path: Path) -> None:
    teacher, student = save_tiny(tmp_path / "t", "vit"), save_tiny(tmp_path / "s", "vit", seed=1)
    data = write_rows(tmp_path / "data.jsonl", [{"pixel_values": r["pixel_values"]} for r in pictures(32)])
    made = distil(
        student, teacher=teacher, data=data, folder=tmp_path / "a", max_steps=40, learning_rate=5e-3,
        logit_loss="sym_kl", temperature=2.0, feature_weight=0.1, **FAST,
    )  # fmt: skip
    history = made.diagnostics["training"]["history"]
    assert {"logits", "features"} <= history[0].keys()
    assert history[-1]["logits"] < 0.3 * history[0]["logits"]
    target = output_of(regraft.load(teacher), "vit").softmax(-1)
    before, after = (
        float((output_of(m, "vit").softmax(-1) - target).abs().sum()) for m in (regraft.load(student), made.model)
    )
    assert after < 0.5 * before
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used"):
        distil(student, teacher=teacher, data=data, folder=tmp_path / "d", teacher_device="cuda:99")
    there = distil(
        student, teacher=teacher, data=data, folder=tmp_path / "e", max_steps=1, teacher_device="cpu", **FAST
    )
    assert there.diagnostics["training"]["history"][0]["logits"] > 0
    with pytest.raises(UserError, match="there are no labels"):
        distil(student, teacher=teacher, data=data, folder=tmp_path / "b", task_weight=1.0)
    with pytest.raises(UserError, match="all weights of the loss are 0"):
        distil(student, teacher=teacher, data=data, folder=tmp_path / "c", logit_weight=0.0)


def test_minilm_teaches_a_smaller_student(data: Path, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "t", "bert", num_hidden_layers=4, hidden_size=48, intermediate_size=96)
    student = save_tiny(tmp_path / "s", "bert", seed=1)
    for relation in ("v1", "v2"):
        made = minilm(
            student, teacher=teacher, data=data, folder=tmp_path / relation, max_steps=30, learning_rate=3e-3,
            relation=relation, **FAST,
        )  # fmt: skip
        history = made.diagnostics["training"]["history"]
        assert history[-1]["relations"] < 0.7 * history[0]["relations"]
        assert any("fine-tune the student" in warning for warning in made.warnings)
        head = "cls.predictions.transform.dense.weight"
        assert torch.equal(made.model.state_dict()[head], regraft.load(student).state_dict()[head])


def test_a_student_made_of_the_teacher(data: Path, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "t", "bert", num_hidden_layers=4)
    made = minilm(
        teacher, teacher=teacher, data=data, folder=tmp_path / "a", max_steps=2, init="random", num_layers=2,
        hidden_size=16, num_attention_heads=4, relation="v1", **FAST,
    )  # fmt: skip
    config = made.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 16, 32)
    assert made.diagnostics["training"]["history"][0]["relations"] > 0


def test_makers_say_what_they_need(data: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")
    for call, words in (
        (lambda: minilm(folder, data=data, folder=tmp_path / "a"), "minilm needs a teacher"),
        (lambda: fine_tune(folder, folder=tmp_path / "a"), "fine_tune needs data"),
        (lambda: fine_tune(folder, teacher=folder, data=data, folder=tmp_path / "a"), "fine_tune takes no teacher"),
        (lambda: fine_tune(folder, data=data, folder=tmp_path / "a", epochs=1), "no option 'epochs'.*num_train_epochs"),
        (lambda: fine_tune(folder, data=data, folder=tmp_path / "a", max_steps=0), "max_steps is 0"),
    ):
        with pytest.raises(UserError, match=words):
            call()


RECIPE = """
models: {teacher: ./teacher, student: ./student}
steps:
  taught: {train: minilm, model: student, teacher: teacher, data: data.jsonl, max_steps: 2}
  tuned: {train: fine_tune, model: taught, data: data.jsonl, max_steps: 2}
  again: {merge: linear, models: [taught, tuned]}
"""


class Impatient(Silent):
    """Presses Ctrl-C after the second step."""

    def advance(self, done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_recipe_that_was_stopped_goes_on(data: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "student", "bert", hidden_dropout_prob=0.1)
    text = "models: {s: ./student}\nsteps: {a: {train: fine_tune, model: s, data: data.jsonl, max_steps: 4}}\n"
    recipe = parse_recipe(text, path=tmp_path / "recipe.yaml")
    with pytest.raises(KeyboardInterrupt, match="step 2 of 4 is kept"):
        run(recipe, tmp_path / "out", progress=Impatient())
    assert not (tmp_path / "out" / "a").exists()
    assert list((tmp_path / "out" / "artefacts").glob("*.work/checkpoint-2"))
    run(recipe, tmp_path / "out")
    run(recipe, tmp_path / "other")
    one, two = (regraft.load(tmp_path / out / "a").state_dict() for out in ("out", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list((tmp_path / "out" / "artefacts").glob("*.work"))


def test_the_schema_knows_the_steps() -> None:
    check = jsonschema.Draft202012Validator(schema())
    check.validate(yaml.safe_load(RECIPE))
    step = {"compress": "pela", "model": "base", "data": "d.jsonl", "ratio": 2, "include": ["ffn"], "svd": "exact"}
    check.validate({"models": {"base": "./b"}, "steps": {"a": step}})
    for change in ({"ratio": 0.5}, {"teacher": "base"}, {"svd": "quick"}, {"data": None}, {"model": 3}):
        with pytest.raises(jsonschema.ValidationError):
            check.validate({"models": {"base": "./b"}, "steps": {"a": step | change}})


def test_recipes_that_are_wrong_are_refused_at_their_line(tmp_path: Path) -> None:
    for step, words in (
        ("{compress: pela, model: base}", "line 1, step a.*add data"),
        ("{compress: pela, data: d.jsonl}", "compress: pela needs a model"),
        ("{train: minilm, model: base, data: d.jsonl}", "train: minilm needs a teacher"),
        ("{compress: pela, model: base, data: d.jsonl, ration: 2}", "no key 'ration'.*did you mean 'ratio'"),
        ("{compress: pela, model: base, data: d.jsonl, ratio: 0.5}", "ratio is 0.5: input should be greater than 1"),
        ("{compress: pela, model: base, data: d.jsonl, include: [atention]}", "did you mean 'attention'"),
        ("{compress: pela, model: nobody, data: d.jsonl}", "nothing is called 'nobody'"),
        ("{compress: pela, model: base, data: nothing.jsonl}", "no data at 'nothing.jsonl'"),
    ):
        save = tmp_path / "b"
        if not save.exists():
            save_tiny(save, "bert")
        with pytest.raises(UserError, match=words):
            make_plan(parse_recipe(f"{{models: {{base: ./b}}, steps: {{a: {step}}}}}", path=tmp_path / "recipe.yaml"))


def test_in_a_recipe_and_as_a_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("teacher"), "bert")
    save_tiny(Path("student"), "bert", seed=1)
    Path("recipe.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["plan", "recipe.yaml"])
    assert result.exit_code == 0, result.stderr
    assert "taught: minilm" in result.stdout
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "-o", "out"])
    assert result.exit_code == 0, result.stderr
    lineage = json.loads(Path("out/taught/regraft.json").read_text())
    assert [i["role"] for i in lineage["inputs"]] == ["model", "teacher"]
    assert lineage["kind"] == "train"
    merged, *parts = (regraft.load(Path("out") / name).state_dict() for name in ("again", "taught", "tuned"))
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.allclose(merged[name], (parts[0][name] + parts[1][name]) / 2, atol=1e-7)
    assert "minilm" in Path("out/report.html").read_text()
    line = ["train", "minilm", "student", "new", "--teacher", "teacher", "--data", "data.jsonl", "--set", "max_steps=1"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.stderr
    assert "1 steps" in result.stdout
    result = CliRunner().invoke(app, ["merge", "recipe.yaml", "other"])
    assert result.exit_code == 2
    assert "merge only merges" in result.stderr
