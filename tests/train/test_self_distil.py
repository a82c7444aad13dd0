"""Self-distillation for further pre-training: which run begins where, what it minimises, and that it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import regraft
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.objectives.self_distil import representation_loss
from regraft.recipe import parse_recipe
from regraft.recipe.progress import Silent
from regraft.recipe.run import run
from regraft.train.batches import batches_for
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.methods.self_distil import self_distil
from tiny import begin_with_cls, pictures, save_masked, save_tiny, texts, write_rows

FAST: dict[str, Any] = {
    "device": "cpu", "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 2e-3, "max_steps": 5,
    "save_steps": 2,
}  # fmt: skip


def base(folder: Path, family: str) -> Path:
    """A model with its pre-training head, and dropout where the family has it."""
    if family == "bert":
        return begin_with_cls(save_tiny(folder, "bert", hidden_dropout_prob=0.1))
    return save_tiny(folder, family) if family == "gpt2" else save_masked(folder, family)


def data(path: Path, family: str) -> Path:
    rows = texts() if family in ("bert", "gpt2") else [{"pixel_values": r["pixel_values"]} for r in pictures()]
    return write_rows(path, rows)


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "vit_mae", "swin"])
def test_the_stages(family: str, tmp_path: Path) -> None:
    """The teacher is what fine_tune makes, the student begins at the model; named or not, the teacher is the same."""
    folder, rows = base(tmp_path / "base", family), data(tmp_path / "data.jsonl", family)
    told: list[tuple[int, int, float]] = []

    def tell(step: int, steps: int, figures: Mapping[str, float]) -> None:
        told.append((step, steps, figures["seconds_left"]))

    made = self_distil(folder, data=rows, folder=tmp_path / "a", tell=tell, **FAST)
    assert [(step, steps) for step, steps, _ in told] == [(i, 10) for i in range(1, 11)]
    assert told[-1][2] == 0 < told[4][2]
    training = made.diagnostics["training"]
    assert training["steps"] == 10
    assert [entry["step"] for entry in training["history"]] == list(range(1, 11))
    assert ["representation" in entry for entry in training["history"]] == [False] * 5 + [True] * 5
    # The same teacher, made by another method with the same options, saved, and named.
    more = {"lr_scheduler_type": "linear", "adam_beta2": 0.95, "max_grad_norm": 0.0}
    further = fine_tune(folder, data=rows, folder=tmp_path / "b", **FAST, **more).model
    further.save_pretrained(tmp_path / "further")
    if family in ("bert", "gpt2"):
        hf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "further")
    named = self_distil(folder, teacher=tmp_path / "further", data=rows, folder=tmp_path / "c", **FAST)
    assert same(named.model, made.model)
    assert named.diagnostics["training"]["steps"] == 5
    drift = made.diagnostics["drift"]
    assert list(drift) == ["further pre-training", "round 1"]
    assert drift["further pre-training"] == pytest.approx(named.diagnostics["drift"]["teacher"], rel=1e-5)
    began = dict(regraft.load(folder).base_model.named_parameters())
    squares = [((p - began[n]) ** 2).sum().detach() for n, p in made.model.base_model.named_parameters()]
    assert drift["round 1"]["distance"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("family", ["vit", "vit_mae", "gpt2"])
def test_the_first_loss_is_the_distance_of_model_and_teacher(family: str, tmp_path: Path) -> None:
    """Computed again from saved models, with all examples in one batch; models without dropout."""
    folder, rows = base(tmp_path / "base", family), data(tmp_path / "data.jsonl", family)
    options = FAST | {"per_device_train_batch_size": 24, "max_steps": 2}
    teacher = fine_tune(folder, data=rows, folder=tmp_path / "a", **options).model
    teacher.save_pretrained(tmp_path / "teacher")
    if family == "gpt2":
        hf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "teacher")
    made = self_distil(folder, teacher=tmp_path / "teacher", data=rows, folder=tmp_path / "b", **options)
    student = regraft.load(folder)
    values = [json.loads(line) for line in rows.read_text().splitlines()]
    batch = batches_for(student, folder, values[0], labels=False).collate(values, list(range(24)))
    if family == "vit_mae":
        batch["noise"] = torch.arange(16).expand(24, 16) / 16
        student.config.mask_ratio = teacher.config.mask_ratio = 0.0
    with torch.no_grad():
        one, two = (m.eval().base_model(**batch).last_hidden_state for m in (student, teacher))
    target = "mean" if family == "gpt2" else "cls"
    mask = batch["attention_mask"].bool() if family == "gpt2" else None
    expected = float(representation_loss(one, two, target, "sum", mask))
    first = made.diagnostics["training"]["history"][0]
    assert first["representation"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    assert first["loss"] == pytest.approx(first["own"] + first["representation"], rel=1e-4)


def test_rounds_begin_at_the_model(tmp_path: Path) -> None:
    """Two rounds are one round whose teacher is what one round gives."""
    folder, rows = base(tmp_path / "base", "vit_mae"), data(tmp_path / "data.jsonl", "vit_mae")
    two = self_distil(folder, data=rows, folder=tmp_path / "a", rounds=2, **FAST)
    one = self_distil(folder, data=rows, folder=tmp_path / "b", **FAST).model
    one.save_pretrained(tmp_path / "one")
    again = self_distil(folder, teacher=tmp_path / "one", data=rows, folder=tmp_path / "c", **FAST).model
    assert same(two.model, again)
    assert not same(two.model, one)
    assert list(two.diagnostics["drift"]) == ["further pre-training", "round 1", "round 2"]


def test_the_term_pulls_towards_the_teacher(tmp_path: Path) -> None:
    folder, rows = base(tmp_path / "base", "vit_mae"), data(tmp_path / "data.jsonl", "vit_mae")
    options = FAST | {"max_steps": 40, "learning_rate": 5e-3}
    found = {}
    for weight in (1e-6, 1.0):
        made = self_distil(folder, data=rows, folder=tmp_path / str(weight), distil_weight=weight, **options)
        found[weight] = made.diagnostics["training"]["history"][-1]["representation"]
        other = self_distil(
            folder,
            data=rows,
            folder=tmp_path / f"{weight}-mean",
            distil_weight=weight * 32,
            reduction="mean",
            **options,
        )
        for name, value in made.model.state_dict().items():
            assert torch.allclose(value, other.model.state_dict()[name], atol=1e-3), name
    assert found[1.0] < 0.5 * found[1e-6]


class Killed(Exception):
    pass


def kill_at(step: int) -> Callable[[int, int, Mapping[str, float]], None]:
    def tell(done: int, steps: int, figures: Mapping[str, float]) -> None:
        if done == step:
            raise Killed

    return tell


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("family", ["bert", "vit_mae"])
def test_a_killed_run_ends_as_one_that_was_not(family: str, cached: bool, tmp_path: Path) -> None:
    """Killed in the first run of the loop, in the second, and in the third."""
    folder, rows = base(tmp_path / "base", family), data(tmp_path / "data.jsonl", family)
    options = FAST | {"rounds": 2, "cache_teacher": cached}
    expected = self_distil(folder, data=rows, folder=tmp_path / "a", **options)
    for step in (4, 8, 13):
        with pytest.raises(Killed):
            self_distil(folder, data=rows, folder=tmp_path / "b", tell=kill_at(step), **options)
    steps: list[int] = []
    made = self_distil(folder, data=rows, folder=tmp_path / "b", tell=lambda s, n, f: steps.append(s), **options)
    assert steps == [13, 14, 15]
    assert same(made.model, expected.model)
    losses = [[h["loss"] for h in m.diagnostics["training"]["history"]] for m in (made, expected)]
    assert losses[0] == losses[1]


def test_a_cached_teacher_teaches_the_same(tmp_path: Path) -> None:
    for family, target in (("vit_mae", "tokens"), ("bert", "tokens"), ("bert", "cls")):
        place = tmp_path / f"{family}-{target}"
        folder, rows = base(place / "base", family), data(place / "data.jsonl", family)
        one, two = (
            self_distil(folder, data=rows, folder=place / str(c), cache_teacher=c, target=target, **FAST).model
            for c in (False, True)
        )
        assert (place / "True" / "features-1" / "features.bin").stat().st_size > 0
        for name, value in one.state_dict().items():
            assert torch.allclose(value, two.state_dict()[name], atol=1e-5), name


def test_what_represents_an_input(tmp_path: Path) -> None:
    plain, first = save_tiny(tmp_path / "plain", "bert"), base(tmp_path / "first", "bert")
    rows = data(tmp_path / "data.jsonl", "bert")

    def made(folder: Path, target: str) -> Any:
        return self_distil(folder, data=rows, folder=tmp_path / f"{folder.name}-{target}", target=target, **FAST).model

    assert same(made(first, "auto"), made(first, "cls"))
    assert not same(made(first, "auto"), made(first, "mean"))
    assert same(made(plain, "auto"), made(plain, "mean"))
    with pytest.raises(UserError, match=r"this bert's texts do not begin with one.*use target: mean"):
        made(plain, "cls")
    swin = base(tmp_path / "swin", "swin")
    pixels = data(tmp_path / "images.jsonl", "swin")
    with pytest.raises(UserError, match="this swin's images have no such token"):
        self_distil(swin, data=pixels, folder=tmp_path / "s", target="cls", **FAST)


def test_what_cannot_be_done_is_said_first(tmp_path: Path) -> None:
    rows, pixels = data(tmp_path / "data.jsonl", "bert"), data(tmp_path / "images.jsonl", "vit")
    bert, vit = base(tmp_path / "bert", "bert"), save_tiny(tmp_path / "vit", "vit")
    deep = begin_with_cls(save_tiny(tmp_path / "deep", "bert", num_hidden_layers=3))
    gpt2 = base(tmp_path / "gpt2", "gpt2")
    for model, teacher, source, expected in (
        (vit, None, pixels, "a ViTForImageClassification has no loss that needs no labels"),
        (bert, bert, rows, "model and teacher have the same weights"),
        (bert, deep, rows, "only one of student and teacher has encoder.layer.2"),
        (bert, gpt2, rows, "the model is a bert and the teacher a gpt2"),
        (bert, None, None, "self_distil needs data"),
    ):
        with pytest.raises(UserError, match=expected):
            self_distil(model, teacher=teacher, data=source, folder=tmp_path / "a", **FAST)
    for wrong, expected in (
        ({"rounds": 0}, "rounds is 0"), ({"distil_weight": 0}, "distil_weight is 0"), ({"mask_ratio": 1}, "mask_ratio"),
        ({"init": "random"}, "no option 'init'"), ({"mask_ratio": 0.5}, "guesses no patches of images"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            self_distil(bert, data=rows, folder=tmp_path / "b", **FAST | wrong)


RECIPE = """
models: {base: ./base}
steps:
  further: {train: fine_tune, model: base, data: images.jsonl, max_steps: 3, mask_ratio: 0.75, norm_pix_loss: true}
  adapted:
    train: self_distil
    model: base
    teacher: further
    data: images.jsonl
    max_steps: 3
    norm_pix_loss: true
    save_steps: 1
  whole: {train: self_distil, model: base, data: images.jsonl, max_steps: 2, rounds: 2, save_steps: 1}
  classifier:
    train: fine_tune
    model: adapted
    data: labelled.jsonl
    head: image_classification
    labels: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    max_steps: 2
  score: {evaluate: accuracy, models: [classifier], data: labelled.jsonl}
"""


class KilledInTheSecondRun(Silent):
    def advance(self, done: int, total: int) -> None:
        if (done, total) == (3, 6):
            raise Killed


def test_in_a_recipe_and_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base(Path("base"), "vit_mae")
    data(Path("images.jsonl"), "vit_mae")
    write_rows(Path("labelled.jsonl"), pictures())
    recipe = parse_recipe(RECIPE, path=tmp_path / "recipe.yaml")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", progress=KilledInTheSecondRun())
    assert list((tmp_path / "killed" / "artefacts").glob("*.work/further/checkpoint-2"))
    run(recipe, tmp_path / "killed")
    result = run(recipe, tmp_path / "out")
    for name in ("adapted", "whole", "classifier"):
        one, two = (regraft.load(tmp_path / out / name) for out in ("killed", "out"))
        assert same(one, two)
    assert not list((tmp_path / "killed" / "artefacts").glob("*.work"))
    classifier = regraft.load(tmp_path / "out" / "classifier")
    assert type(classifier).__name__ == "ViTForImageClassification"
    adapted = regraft.load(tmp_path / "out" / "adapted")
    assert adapted.config.norm_pix_loss
    distances = [
        (p - dict(adapted.vit.named_parameters())[n]).abs().max() for n, p in classifier.vit.named_parameters()
    ]
    assert max(map(float, distances)) < 0.01  # two steps from the adapted encoder, not from random weights
    assert len(result.evaluations) == 1
    lineage = json.loads(Path("out/whole/regraft.json").read_text())
    assert list(lineage["diagnostics"]["drift"]) == ["further pre-training", "round 1", "round 2"]
    assert "Self-Distillation for Further Pre-training" in Path("out/whole/README.md").read_text()
    line = "train self_distil base new --data images.jsonl --set max_steps=2 --set mask_ratio=0.5"
    result2 = CliRunner().invoke(app, line.split())
    assert result2.exit_code == 0, result2.stderr
    assert "4 steps" in result2.stdout
    assert "of its norm" in result2.stderr + result2.stdout
    assert regraft.load("new").config.mask_ratio == 0.5
