"""SSLD on small models: what it learns and chooses, in Python, in a recipe and as a command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import regraft
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import run
from regraft.train.methods.ssld import ssld
from tiny import add_tokenizer, output_of, pictures, save_tiny, texts, write_rows

FAST: dict[str, Any] = {"device": "cpu", "per_device_train_batch_size": 8, "logging_steps": 1}
NAMES = [f"digit {i}" for i in range(10)]


def named(folder: Path, names: list[str], seed: int = 0, **changes: Any) -> Path:
    """A classifier of images with names for its classes; its teacher's head is not all but blind."""
    labels = dict(enumerate(names))
    save_tiny(folder, "vit", seed, scale=4.0, num_labels=len(names), id2label=labels,
              label2id={n: i for i, n in labels.items()}, **changes)  # fmt: skip
    whole = regraft.load(folder)
    with torch.no_grad():
        whole.classifier.weight *= 20
    whole.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A teacher and a student, data with wrong labels, a pool with copies, and held-out rows."""
    named(tmp_path / "teacher", NAMES)
    named(tmp_path / "student", NAMES, seed=1)
    rows = pictures(60)
    write_rows(tmp_path / "data.jsonl", [{**row, "label": "wrong"} for row in rows[:16]])
    write_rows(tmp_path / "pool.jsonl", [*rows[10:56], *rows[20:24]])
    write_rows(tmp_path / "test.jsonl", rows[50:])
    return tmp_path


def disagreement(folder: Path, student: Any) -> float:
    target = output_of(regraft.load(folder), "vit").softmax(-1)
    return float((output_of(student, "vit").softmax(-1) - target).abs().sum())


def test_the_student_learns_what_the_teacher_says_and_no_label_is_read(place: Path) -> None:
    made = ssld(
        place / "student", teacher=place / "teacher", data=place / "data.jsonl", unlabelled=place / "pool.jsonl",
        held_out=place / "test.jsonl", per_class=5, folder=place / "work", max_steps=48, learning_rate=5e-3,
        finish_num_train_epochs=2.0, **FAST,
    )  # fmt: skip
    chosen = made.diagnostics["selection"]
    # 50 rows: 6 are in the data, 4 stand twice, 6 are held out.
    assert (chosen["pool"], chosen["copies"], chosen["held_out"]) == (50, 10, 6)
    assert chosen["chosen"] == sum(chosen["per_class"].values()) == len(made.files["selection.jsonl"].splitlines())
    assert max(chosen["per_class"].values()) <= 5
    assert list(chosen["per_class"]) == NAMES
    long, short = made.diagnostics["training"]["stages"]
    assert (long["name"], long["steps"], long["rows"]) == ("long", 48, 16 + chosen["chosen"])
    assert (short["name"], short["steps"], short["rows"]) == ("short", 4, 16)
    history = made.diagnostics["training"]["history"]
    assert history[47]["logits"] < 0.3 * history[0]["logits"]
    assert history[48]["learning_rate"] <= 5e-5
    assert disagreement(place / "teacher", made.model) < 0.5 * disagreement(
        place / "teacher", regraft.load(place / "student")
    )
    empty = [name for name, count in chosen["per_class"].items() if not count]
    assert any("found no unlabelled row" in w for w in made.warnings) == bool(empty)


def test_the_first_loss_is_the_symmetric_divergence(place: Path) -> None:
    made = ssld(
        place / "student", teacher=place / "teacher", data=place / "data.jsonl", folder=place / "work", max_steps=1,
        shuffle=False, **FAST,
    )  # fmt: skip
    rows = pictures(60)[:8]
    pixels = torch.tensor(np.array([row["pixel_values"] for row in rows]), dtype=torch.float32)
    with torch.no_grad():
        p, q = (
            regraft.load(place / n)(pixel_values=pixels).logits.double().softmax(-1).numpy()
            for n in ("teacher", "student")
        )
    expected = 0.5 * ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)).mean()
    assert made.diagnostics["training"]["history"][0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert made.warnings == ["without unlabelled data the student learned from the inputs of data alone"]
    assert [stage["name"] for stage in made.diagnostics["training"]["stages"]] == ["long"]


def test_classes_are_matched_by_name(place: Path) -> None:
    """A teacher whose outputs stand in another order teaches the same."""
    turned = named(place / "turned", NAMES[::-1])
    whole, other = regraft.load(place / "teacher"), regraft.load(turned)
    other.load_state_dict(whole.state_dict())
    with torch.no_grad():
        other.classifier.weight.copy_(whole.classifier.weight.flip(0))
        other.classifier.bias.copy_(whole.classifier.bias.flip(0))
    other.save_pretrained(turned)
    made = [
        ssld(place / "student", teacher=t, data=place / "data.jsonl", folder=place / f"w-{t.name}", max_steps=3, **FAST)
        for t in (place / "teacher", turned)
    ]
    losses = [[entry["loss"] for entry in m.diagnostics["training"]["history"]] for m in made]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert torch.allclose(output_of(made[0].model, "vit"), output_of(made[1].model, "vit"), atol=0.01)


def test_a_new_head_gets_the_labels_of_the_teacher(place: Path) -> None:
    made = ssld(
        place / "student", teacher=place / "teacher", data=place / "data.jsonl", folder=place / "work", max_steps=1,
        init="random", num_layers=1, hidden_size=16, head="image_classification", crop=0.5, flip=True, noise=0.1,
        **FAST,
    )  # fmt: skip
    assert list(made.model.config.id2label.values()) == NAMES
    assert (made.model.config.num_hidden_layers, made.model.config.hidden_size) == (1, 16)


def test_texts_and_another_tokenizer(tmp_path: Path) -> None:
    """The teacher reads the same texts in its own tokens."""
    labels: dict[str, Any] = {"num_labels": 2, "id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
    for name, size in (("teacher", 96), ("student", 120)):
        torch.manual_seed(size)
        config = hf.BertConfig(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **labels
        )
        hf.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        add_tokenizer(tmp_path / name)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "student")
    tokenizer.add_tokens(["w1w", "w2w"])
    tokenizer.save_pretrained(tmp_path / "student")
    data = write_rows(tmp_path / "data.jsonl", [{"text": row["text"]} for row in texts(12)])
    pool = write_rows(tmp_path / "pool.jsonl", [{"text": row["text"] + " w39"} for row in texts(12)])
    made = ssld(
        tmp_path / "student", teacher=tmp_path / "teacher", data=data, unlabelled=pool, folder=tmp_path / "work",
        max_steps=12, **FAST,
    )  # fmt: skip
    assert made.diagnostics["selection"]["chosen"] == 12
    assert [stage["steps"] for stage in made.diagnostics["training"]["stages"]] == [12, 1]
    with pytest.raises(UserError, match="crop, flip and noise are for images"):
        ssld(tmp_path / "student", teacher=tmp_path / "teacher", data=data, folder=tmp_path / "w", flip=True, **FAST)


def test_labels_that_are_given_name_a_nameless_teacher(place: Path) -> None:
    save_tiny(place / "nameless", "vit")
    labels = tuple(f"kind {i}" for i in range(regraft.load(place / "nameless").config.num_labels))
    call: dict[str, Any] = {"data": place / "data.jsonl", "folder": place / "work", "max_steps": 1, **FAST}
    made = ssld(
        place / "student", teacher=place / "nameless", unlabelled=place / "pool.jsonl",
        head="image_classification", labels=labels, **call,
    )  # fmt: skip
    assert tuple(made.model.config.id2label.values()) == labels
    assert tuple(made.diagnostics["selection"]["per_class"]) == labels
    with pytest.raises(UserError, match=f"tells 2 classes apart and the teacher {len(labels)}"):
        ssld(place / "student", teacher=place / "nameless", head="image_classification", labels=("a", "b"), **call)


def test_what_it_refuses(place: Path) -> None:
    other = named(place / "other", [*NAMES[:9], "letter"])
    few = named(place / "few", NAMES[:3])
    nameless = save_tiny(place / "nameless", "vit")
    bert = save_tiny(place / "bert", "bert")
    big = write_rows(place / "big.jsonl", pictures(4, size=16))
    copies = write_rows(place / "copies.jsonl", pictures(60)[:4])
    calls: list[tuple[dict[str, Any], str]] = [
        ({"teacher": other}, "the student has a class 'digit 9', and the teacher has none"),
        ({"teacher": few}, "tells 10 classes apart and the teacher 3"),
        ({"teacher": bert}, "the teacher is a BertForMaskedLM, not a classifier"),
        ({"model": bert}, "the student is a BertForMaskedLM|there is no column"),
        ({"teacher": nameless, "head": "image_classification"}, "have no names that a new head could take"),
        ({"stream": True, "max_steps": 1}, "which a stream cannot be"),
        ({"cache_teacher": True, "noise": 0.1}, "keeping it is of no use"),
        ({"held_out": place / "test.jsonl"}, "compared with unlabelled data, and there is none"),
        ({"teacher_batch_norm": "batch"}, "the teacher has no batch norms"),
        ({"unlabelled": big}, r"array of 1 x 16 x 16 and others are of 1 x 8 x 8 .*big.jsonl, row 1"),
        ({"unlabelled": copies}, "nothing is left of the 4 unlabelled rows"),
        ({"label_smoothing": 0.1}, "ssld has no option 'label_smoothing'"),
        ({"per_class": 0}, "per_class is 0"),
    ]
    for change, words in calls:
        given = {"model": place / "student", "teacher": place / "teacher", "data": place / "data.jsonl"} | change
        with pytest.raises(UserError, match=words):
            ssld(given.pop("model"), folder=place / "work", **FAST, **given)
    with pytest.raises(UserError, match="ssld needs a teacher"):
        ssld(place / "student", data=place / "data.jsonl", folder=place / "work")


RECIPE = """
models: {teacher: ./teacher, student: ./student}
steps:
  small:
    train: ssld
    model: student
    teacher: teacher
    data: data.jsonl
    unlabelled: pool.jsonl
    held_out: test.jsonl
    per_class: 3
    max_steps: 3
"""


def test_in_a_recipe_and_as_a_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("recipe.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "-o", "out"])
    assert result.exit_code == 0, result.stderr
    manifest = [json.loads(line) for line in Path("out/small/selection.jsonl").read_text().splitlines()]
    assert manifest
    assert set(manifest[0]) == {"row", "class", "confidence"}
    lineage = json.loads(Path("out/small/regraft.json").read_text())
    assert lineage["settings"] == {"data": "data.jsonl", "unlabelled": "pool.jsonl", "held_out": "test.jsonl"}
    assert lineage["diagnostics"]["selection"]["chosen"] == len(manifest)
    line = ["train", "ssld", "student", "new", "--teacher", "teacher", "--data", "data.jsonl"]
    line += ["--set", "unlabelled=pool.jsonl", "--set", "held_out=test.jsonl", "--set", "per_class=3"]
    result = CliRunner().invoke(app, [*line, "--set", "max_steps=3"])
    assert result.exit_code == 0, result.stderr
    assert "4 steps" in result.stdout
    assert Path("new/selection.jsonl").read_bytes() == Path("out/small/selection.jsonl").read_bytes()


def test_other_unlabelled_data_is_another_result(place: Path) -> None:
    recipe = parse_recipe(RECIPE, path=place / "recipe.yaml")
    keys = [make_plan(recipe).steps[0].key]
    pool = place / "pool.jsonl"
    pool.write_text("".join(pool.read_text().splitlines(keepends=True)[:-1]))
    keys.append(make_plan(recipe).steps[0].key)
    assert keys[0] != keys[1]
    first = run(recipe, place / "out")
    again = run(recipe, place / "out")
    assert first.artefacts["small"].resolve() == again.artefacts["small"].resolve()
    shutil.move(pool, place / "elsewhere.jsonl")
    with pytest.raises(UserError, match=r"no data at 'pool.jsonl'"):
        make_plan(recipe)
