"""gpt4image: what it learns on real models, that nothing of it stays in them, and that it goes on where it was."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import regraft
from described import described, save_classifier, save_encoder
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.objectives.descriptions import Descriptions, with_descriptions
from regraft.objectives.own_loss import OwnLoss
from regraft.recipe import parse_recipe
from regraft.recipe.progress import Silent
from regraft.recipe.run import run
from regraft.train import heads
from regraft.train.batches import batches_for
from regraft.train.loop import train
from regraft.train.methods.gpt4image import gpt4image
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions
from regraft.train.text_embeddings import embed_texts
from regraft.train.text_encoder import TextEncoder
from tiny import write_rows

FAST: dict[str, Any] = {"device": "cpu", "per_device_train_batch_size": 8, "logging_steps": 1}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "described.jsonl", described())


@pytest.mark.parametrize(
    ("family", "encoder"),
    [("vit", "bert"), ("resnet", "clip"), ("swin", "clip_projected"), ("deit", "t5"), ("resnet", "bert")],
)
def test_it_learns_and_leaves_an_ordinary_classifier(family: str, encoder: str, data: Path, tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "model", family)
    made = gpt4image(
        model, teacher=save_encoder(tmp_path / "text", encoder), data=data, folder=tmp_path / "a",
        max_steps=40, learning_rate=5e-3, centre=True, **FAST,
    )  # fmt: skip
    history = made.diagnostics["training"]["history"]
    assert history[-1]["own"] < history[0]["own"]
    assert history[-1]["descriptions"] < 0.9 * history[0]["descriptions"]
    assert history[0]["loss"] == pytest.approx(history[0]["own"] + 0.3 * history[0]["descriptions"], rel=1e-5)
    facts = made.diagnostics["descriptions"]
    assert (facts["texts"], facts["missing"], facts["distinct"]) == (24, 0, 24)
    assert facts["temperature"] == (0.2 if family == "resnet" else 0.05)
    assert made.model.state_dict().keys() == regraft.load(model).state_dict().keys()
    made.model.save_pretrained(tmp_path / "saved")
    loaded, report = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = {"pixel_values": torch.rand(2, 1, 8, 8)}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**pixels).logits, made.model(**pixels).logits)


@pytest.mark.parametrize("options", [{"alignment": "ctr"}, {"alignment": "byol"}, {"projector": "linear"}])
def test_its_other_losses_and_projector(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    made = gpt4image(
        save_classifier(tmp_path / "model", "vit"), teacher=save_encoder(tmp_path / "text", "bert"), data=data,
        folder=tmp_path / "a", max_steps=30, learning_rate=5e-3, centre=True, text_weight=2.0, **options, **FAST,
    )  # fmt: skip
    history = made.diagnostics["training"]["history"]
    assert history[-1]["descriptions"] < 0.9 * history[0]["descriptions"]
    assert ("temperature" in made.diagnostics["descriptions"]) == (options.get("alignment") != "byol")


@pytest.mark.parametrize(("family", "options"), [("vit", {"init": "random", "hidden_size": 16}), ("resnet", {})])
def test_a_new_head_on_a_model_that_has_another(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    rows = [row | {"label": "ab"[row["label"] % 2]} for row in described()]
    folder = save_classifier(tmp_path / "model", family)
    made = gpt4image(
        folder, teacher=save_encoder(tmp_path / "text", "bert"),
        data=write_rows(tmp_path / "named.jsonl", rows), folder=tmp_path / "a", max_steps=2, learning_rate=1e-6,
        head="image_classification", labels=("a", "b"), **options, **FAST,
    )  # fmt: skip
    assert made.model.config.id2label == {0: "a", 1: "b"}
    assert made.model(pixel_values=torch.rand(1, 1, 8, 8)).logits.shape == (1, 2)
    if not options:  # the body is that of the model
        name = next(name for name, _ in made.model.named_parameters())
        assert torch.allclose(made.model.state_dict()[name], regraft.load(folder).state_dict()[name], atol=1e-4)


def test_a_description_that_is_missing_and_remarks(tmp_path: Path) -> None:
    rows = described()
    rows[1] = {k: v for k, v in rows[1].items() if k != "text"}
    rows[2]["text"], rows[3]["text"] = None, "w1 w2 w3 w4 w5"
    made = gpt4image(
        save_classifier(tmp_path / "model", "vit"), teacher=save_encoder(tmp_path / "text", "clip"),
        data=write_rows(tmp_path / "data.jsonl", rows), folder=tmp_path / "a", max_steps=2, max_length=4, **FAST,
    )  # fmt: skip
    assert made.diagnostics["descriptions"]["missing"] == 2
    assert made.diagnostics["descriptions"]["cut"] == 1
    assert any("2 of 24 images have no description" in one for one in made.warnings)
    assert any("4.5% of the descriptions were cut" in one for one in made.warnings)
    said = [row | {"text": f"w1 w2 w3 w4 w5 w6 w7 w{8 + i % 2}"} for i, row in enumerate(rows)]
    alike = gpt4image(
        tmp_path / "model", teacher=tmp_path / "text", data=write_rows(tmp_path / "alike.jsonl", said),
        pooling="mean", folder=tmp_path / "b", max_steps=1, **FAST,
    )  # fmt: skip
    assert alike.diagnostics["descriptions"]["mean_cosine"] > 0.9
    assert any("hardly tells the descriptions apart" in one for one in alike.warnings)


def test_a_stream_and_mapped_data_are_read_alike(data: Path, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(described()).to_parquet(tmp_path / "described.parquet")
    model, text = save_classifier(tmp_path / "model", "vit"), save_encoder(tmp_path / "text", "bert")
    ways: list[tuple[Path, dict[str, Any]]] = [
        (data, {"shuffle": False}),
        (data, {"stream": True}),
        (tmp_path / "described.parquet", {"shuffle": False}),
    ]
    states = []
    for number, (path, options) in enumerate(ways):
        folder = tmp_path / str(number)
        made = gpt4image(model, teacher=text, data=path, folder=folder, max_steps=3, **options, **FAST)
        states.append(made.model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(states[0][name], state[name]) for name in state)


class Impatient(Silent):
    """Presses Ctrl-C after the third step."""

    def advance(self, done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(family: str, data: Path, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", family, **({"hidden_dropout_prob": 0.1} if family == "vit" else {}))
    save_encoder(tmp_path / "text", "bert")
    step = "{train: gpt4image, model: m, teacher: t, data: described.jsonl, max_steps: 7, ema: 0.5"
    step += ", per_device_train_batch_size: 8, learning_rate: 0.01}"
    text = f"models: {{m: ./model, t: ./text}}\nsteps: {{a: {step}}}\n"
    recipe = parse_recipe(text, path=tmp_path / "recipe.yaml")
    with pytest.raises(KeyboardInterrupt, match="step 3 of 7 is kept"):
        run(recipe, tmp_path / "out", progress=Impatient())
    (kept,) = (tmp_path / "out" / "artefacts").glob("*.work/checkpoint-3")
    assert (kept / heads.FILE).is_file()
    assert regraft.load(kept).state_dict().keys() == regraft.load(tmp_path / "model").state_dict().keys()
    run(recipe, tmp_path / "out")
    run(recipe, tmp_path / "other")
    one, two, start = (regraft.load(tmp_path / out).state_dict() for out in ("out/a", "other/a", "model"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], start[name]) for name in one)
    assert not list((tmp_path / "out" / "a").glob("*heads*"))
    lineage = json.loads((tmp_path / "out" / "a" / "regraft.json").read_text())
    assert [i["role"] for i in lineage["inputs"]] == ["model", "teacher"]
    assert lineage["diagnostics"]["descriptions"]["pooling"] == "mean"


def test_in_python_the_model_comes_back_without_its_projector(data: Path, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model", "vit")
    whole, rows = regraft.load(folder), described()
    embeddings = embed_texts(
        TextEncoder(save_encoder(tmp_path / "text", "bert"), device="cpu"), [r["text"] for r in rows]
    )
    collate = with_descriptions(batches_for(whole, folder, rows[0]).collate, embeddings)
    objective = Sum(collate, [(1.0, OwnLoss()), (0.3, Descriptions(embeddings.dimension))])
    options = TrainOptions(max_steps=2, per_device_train_batch_size=8, logging_steps=1)
    train(whole, objective, rows, options, folder=tmp_path / "checkpoints", device="cpu")
    assert whole.state_dict().keys() == regraft.load(folder).state_dict().keys()
    broken = [row | {"label": 99} for row in rows]
    with pytest.raises(UserError, match="no label 99"):
        train(whole, objective, broken, options, folder=tmp_path / "other", device="cpu")
    assert whole.state_dict().keys() == regraft.load(folder).state_dict().keys()


def test_as_a_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_classifier(Path("model"), "resnet")
    save_encoder(Path("text"), "clip")
    line = ["train", "gpt4image", "model", "out", "--teacher", "text", "--data", "described.jsonl"]
    line += ["--set", "max_steps=2", "--set", "per_device_train_batch_size=8", "--set", "text_weight=0.5"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.stderr
    assert "2 steps" in result.stdout
    assert "ResNetForImageClassification" in Path("out/config.json").read_text()
    hf.ResNetForImageClassification.from_pretrained("out")


def test_what_does_not_go_together_is_refused(data: Path, tmp_path: Path) -> None:
    model, text = save_classifier(tmp_path / "model", "vit"), save_encoder(tmp_path / "text", "bert")
    bare = tmp_path / "bare"
    hf.ViTModel(hf.ViTConfig.from_pretrained(model)).save_pretrained(bare)
    blank = write_rows(tmp_path / "blank.jsonl", [{k: r[k] for k in ("pixel_values", "text")} for r in described()])
    plain = write_rows(tmp_path / "plain.jsonl", [{k: r[k] for k in ("pixel_values", "label")} for r in described()])
    odd = write_rows(tmp_path / "odd.jsonl", described(17))
    numbers = write_rows(tmp_path / "numbers.jsonl", [r | {"text": 3} for r in described()])
    one = {"per_device_train_batch_size": 1}
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (model, blank, {}, "the data has no labels in the column 'label'"),
        (bare, data, {}, "a ViTModel is no image classifier"),
        (text, data, {}, "a BertForMaskedLM is no image classifier"),
        (model, plain, {}, "no example has a text"),
        (model, numbers, {}, "the description is int, not text"),
        (model, data, one, "a batch of one image has nothing to tell it apart from"),
        (model, odd, {"drop_last": False}, "the last batch of an epoch would hold one of the 17 images"),
        (model, data, {"text_pair": "other"}, "text_pair has no place"),
        (model, data, {"projector": "linear", "projector_norm": "batch"}, "has no hidden layer to normalise"),
        (model, data, {"alignment": "byol", "temperature": 0.1}, "temperature has no place with alignment: byol"),
        (model, data, {"pooling": "own"}, "has no text embedding of its own"),
        (model, data, {"text_weight": 0}, "text_weight is 0"),
        (model, data, {"per_device_train_batch_size": 64}, "24 examples do not fill a batch of 64"),
    ]
    for number, (start, rows, options, words) in enumerate(cases):
        with pytest.raises(UserError, match=words):
            gpt4image(start, teacher=text, data=rows, folder=tmp_path / f"w{number}", max_steps=1, **FAST | options)
    with pytest.raises(UserError, match="gpt4image needs a teacher"):
        gpt4image(model, data=data, folder=tmp_path / "w")
    with pytest.raises(UserError, match="a vit model reads no texts"):
        gpt4image(model, teacher=model, data=data, folder=tmp_path / "w", **FAST)
    gpt4image(model, teacher=text, data=data, folder=tmp_path / "w", max_steps=1, alignment="byol", **FAST | one)
