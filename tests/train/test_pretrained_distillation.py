"""Pre-trained distillation: its stages and arms, what it checks before it trains, recipes and commands."""

from __future__ import annotations

import json
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
from regraft.train.methods.pretrained_distillation import distance, pretrained_distillation
from regraft.train.student import SizeOptions, student_of, with_classes
from tiny import add_tokenizer, save_tiny, texts, write_rows

FAST: dict[str, Any] = {"device": "cpu", "per_device_train_batch_size": 8, "logging_steps": 1, "max_steps": 2}


def classifier(folder: Path, labels: dict[int, str], seed: int = 0, vocabulary: int = 96) -> Path:
    torch.manual_seed(seed)
    config = hf.BertConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        id2label=labels, label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    whole = hf.BertForSequenceClassification(config)
    with torch.no_grad():
        whole.classifier.weight *= 20
    whole.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", "bert")
    classifier(tmp_path / "teacher", {0: "even", 1: "odd"})
    plain = [{"text": row["text"]} for row in texts(32)]
    write_rows(tmp_path / "corpus.jsonl", plain[:12])
    write_rows(tmp_path / "transfer.jsonl", plain[8:])
    write_rows(tmp_path / "labelled.jsonl", [{**row, "label": ("even", "odd")[row["label"]]} for row in texts(8)])
    write_rows(tmp_path / "test.jsonl", [{"text": "w1 w3 w5 w7 w9"}])
    return tmp_path


def arm(place: Path, name: str, **options: Any) -> Any:
    return pretrained_distillation(
        place / "base", teacher=place / "teacher", data=place / "transfer.jsonl", folder=place / name,
        **FAST | {"num_layers": 1} | options,
    )  # fmt: skip


def test_all_stages(place: Path) -> None:
    made = arm(
        place, "a", corpus=place / "corpus.jsonl", labelled=place / "labelled.jsonl", held_out=place / "test.jsonl",
        hidden_size=16, num_attention_heads=2, pretrain_max_steps=4, pretrain_learning_rate=1e-3,
        fine_tune_num_train_epochs=3.0, fine_tune_learning_rate=2e-4, lr_scheduler_type="constant",
    )  # fmt: skip
    assert type(made.model).__name__ == "BertForSequenceClassification"
    assert made.model.config.id2label == {0: "even", 1: "odd"}
    assert (made.model.config.num_hidden_layers, made.model.config.hidden_size) == (1, 16)
    stages = made.diagnostics["training"]["stages"]
    assert [(s["name"], s["steps"], s["rows"]) for s in stages] == [
        ("pretrain", 4, 12), ("distil", 2, 24), ("fine_tune", 3, 8)
    ]  # fmt: skip
    history = made.diagnostics["training"]["history"]
    assert [sorted({"own", "logits"} & entry.keys()) for entry in history] == [["own"]] * 4 + [["logits"]] * 2 + [
        ["own"]
    ] * 3
    rates = [entry["learning_rate"] for entry in history]
    assert (rates[0], rates[4], rates[6]) == pytest.approx((1e-3, 3e-4, 2e-4), rel=0.01)
    assert set(made.diagnostics["transfer"]) == {"unknown_words", "divergence"}
    said = made.diagnostics["teacher"]
    rows = [row["text"] for row in texts(32)[8:]]
    batch = hf.AutoTokenizer.from_pretrained(place / "base")(rows, padding=True, return_tensors="pt")
    with torch.no_grad():
        p = regraft.load(place / "teacher")(**batch).logits.double().softmax(-1).numpy()
    assert said["classes"] == {"even": int((p[:, 0] > p[:, 1]).sum()), "odd": int((p[:, 0] < p[:, 1]).sum())}
    assert said["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=1e-4)
    one_sided = [w for w in made.warnings if "takes all of the first 24 texts" in w]
    assert bool(one_sided) == (0 in said["classes"].values())
    assert len(made.warnings) == len(one_sided)


@pytest.mark.parametrize(
    ("stages", "trained"),
    [
        (None, ["pretrain", "distil", "fine_tune"]),
        (("fine_tune",), ["fine_tune"]),
        (("pretrain", "fine_tune"), ["pretrain", "fine_tune"]),
        (("distil",), ["distil"]),
        (("pretrain", "distil"), ["pretrain", "distil"]),
    ],
)
def test_the_arms_of_the_paper(stages: Any, trained: list[str], place: Path) -> None:
    given = {} if stages is None else {"stages": stages}
    made = arm(place, "a", corpus=place / "corpus.jsonl", labelled=place / "labelled.jsonl", **given)
    assert [stage["name"] for stage in made.diagnostics["training"]["stages"]] == trained
    unread = [name for name, stage in (("corpus", "pretrain"), ("labelled", "fine_tune")) if stage not in trained]
    assert [w.split()[0] for w in made.warnings if "no stage for it" in w] == unread


def test_without_a_corpus_the_texts_of_the_data_are_read_twice(place: Path) -> None:
    made = arm(place, "a")
    assert [(s["name"], s["rows"]) for s in made.diagnostics["training"]["stages"]] == [
        ("pretrain", 24),
        ("distil", 24),
    ]


def test_what_is_pre_trained_goes_on_under_the_new_head(place: Path) -> None:
    """A distillation that moves nothing leaves the body that pre-training made."""
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    made = arm(place, "a", pretrain_learning_rate=1e-2, pretrain_max_steps=5, **still)
    random = arm(place, "b", stages=("distil",), **still)
    one, two = made.model.base_model.state_dict(), random.model.base_model.state_dict()
    moved = [float((one[name] - two[name]).abs().max()) for name in one if name.endswith("dense.weight")]
    assert max(moved) > 1e-2
    name = "pooler.dense.weight"  # nothing that pre-training has
    assert torch.allclose(one[name], two[name], atol=1e-9)


def test_the_loss_is_cross_entropy_with_the_teacher_s_probabilities(place: Path) -> None:
    made = arm(place, "a", stages=("distil",), shuffle=False, temperature=1.0)
    tokenizer = hf.AutoTokenizer.from_pretrained(place / "base")
    rows = [row["text"] for row in texts(32)[8:16]]
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    student = with_classes(
        student_of(regraft.load(place / "base"), SizeOptions(init="random", num_layers=1), 0), ["even", "odd"], 0
    )
    with torch.no_grad():
        q = student.eval()(**batch).logits.double().softmax(-1).numpy()
        p = regraft.load(place / "teacher")(**batch).logits.double().softmax(-1).numpy()
    expected = -(p * np.log(q)).sum(1).mean()
    assert made.diagnostics["training"]["history"][0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_with_other_tokens_and_another_order_of_labels(place: Path) -> None:
    other = classifier(place / "other", {0: "odd", 1: "even"}, vocabulary=120)
    tokenizer = hf.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    made = pretrained_distillation(
        place / "base", teacher=other, data=place / "transfer.jsonl", folder=place / "a", stages=("distil",),
        labels=("even", "odd"), num_layers=1, **FAST,
    )  # fmt: skip
    assert made.model.config.id2label == {0: "even", 1: "odd"}


def test_parts_of_a_model_as_a_start(place: Path) -> None:
    deep = regraft.load(save_tiny(place / "deep", "bert", num_hidden_layers=4))
    state = deep.state_dict()
    layer = "bert.encoder.layer.{}.output.dense.weight"
    bottom = student_of(deep, SizeOptions(init="bottom", num_layers=2), 0).state_dict()
    assert torch.equal(bottom[layer.format(1)], state[layer.format(1)])
    embedded = student_of(deep, SizeOptions(init="embeddings", num_layers=1), 0).state_dict()
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(embedded[word], state[word])
    assert not torch.equal(embedded[layer.format(0)], state[layer.format(0)])
    with pytest.raises(ValueError, match="init: bottom needs num_layers"):
        SizeOptions(init="bottom")
    with pytest.raises(ValueError, match="hidden_size has no place with init: embeddings"):
        SizeOptions(init="embeddings", hidden_size=8)
    with pytest.raises(UserError, match="5 layers of a model that has 4"):
        student_of(deep, SizeOptions(init="bottom", num_layers=5), 0)
    resnet = hf.ResNetForImageClassification(
        hf.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    )
    again = student_of(resnet, SizeOptions(init="random"), 1)  # no table knows its layers, and none is needed
    assert not torch.equal(again.classifier[1].weight, resnet.classifier[1].weight)


def test_how_far_transfer_texts_are() -> None:
    assert distance(["a", "b"], ["b", "a", "a", "b"]) == {"unknown_words": 0.0, "divergence": pytest.approx(0.0)}
    assert distance(["a"], ["b"]) == {"unknown_words": 1.0, "divergence": pytest.approx(1.0)}
    found = distance(["a", "a", "b", "c"], ["a", "b"])
    assert found["unknown_words"] == 0.25
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.5, 0.5, 0.0])
    m = (p + q) / 2
    kl_q = (q[:2] * np.log2(q[:2] / m[:2])).sum()
    assert found["divergence"] == pytest.approx(((p * np.log2(p / m)).sum() + kl_q) / 2)
    assert distance([], ["a"]) == {"unknown_words": 0.0, "divergence": 1.0}


def test_what_it_refuses_before_it_trains(place: Path) -> None:
    nameless = classifier(place / "nameless", {0: "LABEL_0", 1: "LABEL_1"})
    write_rows(place / "bare.jsonl", [{"text": "w1 w2"}])
    write_rows(place / "inside.jsonl", [{"text": texts(32)[20]["text"].upper()}])
    vit = save_tiny(place / "vit", "vit")
    calls: list[tuple[dict[str, Any], str]] = [
        ({"stages": ("fine_tune",)}, "the stage fine_tune needs labelled data"),
        ({"stages": ("distil", "pretrain")}, "the stages are pretrain, distil, fine_tune, in this order"),
        ({"teacher": place / "base"}, "the teacher is a BertForMaskedLM, not a classifier"),
        ({"teacher": nameless}, "the teacher's classes have no names.*2 of them"),
        ({"labels": ("yes", "no")}, "labels are yes, no and the teacher's even, odd"),
        ({"labelled": place / "bare.jsonl"}, "labelled has no column 'label'"),
        ({"held_out": place / "inside.jsonl"}, r"a held-out row is trained on .*transfer.jsonl, row 13"),
        ({"held_out": place / "test.jsonl", "stream": True}, "all rows of data, which a stream does not have"),
        ({"model": place / "teacher", "init": "weights"}, "no language model's loss to be pre-trained with"),
        ({"model": vit, "init": "weights"}, "there is no column 'image'"),
        ({"hidden_size": 5, "num_attention_heads": 2}, "a width of 5 cannot be split into 2 heads"),
    ]
    for change, words in calls:
        given = {"model": place / "base", "teacher": place / "teacher", "data": place / "transfer.jsonl"} | change
        with pytest.raises(UserError, match=words):
            pretrained_distillation(given.pop("model"), folder=place / "work", **FAST, **given)
        assert not list(place.glob("work/*/checkpoint-*"))
    made = pretrained_distillation(
        place / "base", teacher=nameless, data=place / "transfer.jsonl", folder=place / "w", labels=("yes", "no"),
        stages=("distil",), num_layers=1, **FAST,
    )  # fmt: skip
    assert made.model.config.id2label == {0: "yes", 1: "no"}


RECIPE = """
models: {base: ./base, teacher: ./teacher}
steps:
  small:
    train: pretrained_distillation
    model: base
    teacher: teacher
    data: transfer.jsonl
    corpus: corpus.jsonl
    labelled: labelled.jsonl
    num_layers: 1
    max_steps: 2
  scores: {evaluate: accuracy, models: [small], data: labelled.jsonl}
"""


def test_in_a_recipe_and_as_a_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("recipe.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "-o", "out"])
    assert result.exit_code == 0, result.stderr
    lineage = json.loads(Path("out/small/regraft.json").read_text())
    assert [s["name"] for s in lineage["diagnostics"]["training"]["stages"]] == ["pretrain", "distil", "fine_tune"]
    assert json.loads(Path("out/small/config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    line = ["train", "pretrained_distillation", "base", "new", "--teacher", "teacher", "--data", "transfer.jsonl"]
    line += ["--set", "stages=[distil]", "--set", "num_layers=1", "--set", "max_steps=2"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.stderr
    assert "2 steps" in result.stdout
