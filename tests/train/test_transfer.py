"""transfer: what a student takes over from another architecture, and keeps; resuming; everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import regraft
from models import model, save_model
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.objectives.own_loss import OwnLoss
from regraft.train.batches import batches_for
from regraft.train.complement import FlipOptions, complement
from regraft.train.loop import train
from regraft.train.methods.distil import distil
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.methods.transfer import transfer
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions
from tiny import add_tokenizer, pictures, save_tiny, texts, write_rows

NAMES = [f"class {i}" for i in range(6)]
FAST: dict[str, Any] = {"device": "cpu", "logging_steps": 1}
BLANK = np.zeros((3, 8, 8)).tolist()
SGD: dict[str, Any] = {"learning_rate": 0.05, "per_device_train_batch_size": 32, "num_train_epochs": 10}


def labels(names: list[str] = NAMES) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def save_resnet(folder: Path, seed: int = 0, names: list[str] = NAMES, **changes: Any) -> Path:
    sizes = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    torch.manual_seed(seed)
    config = hf.ResNetConfig(**sizes | {"layer_type": "basic"} | changes, **labels(names))
    hf.ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def stripes(n: int, classes: range = range(6), seed: int = 0) -> list[dict[str, Any]]:
    """Noisy images of six patterns, by the name of their class."""
    draws = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).random((6, 8, 8)) > 0.5
    rows = []
    for i in range(n):
        label = classes[i % len(classes)]
        image = patterns[label] + 0.3 * draws.standard_normal((8, 8))
        rows.append({"pixel_values": image[None].round(3).tolist(), "label": NAMES[label]})
    return rows


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer that knows the first classes, a residual network that knows the last ones; and data."""
    home = tmp_path_factory.mktemp("zoo")
    save_model(home / "new vit", "vit", num_labels=6, **labels())
    save_resnet(home / "new resnet")
    for name, classes, rate in (("vit", range(4), 3e-3), ("resnet", range(2, 6), 1e-2)):
        rows = write_rows(home / f"{name}.jsonl", stripes(160, classes))
        made = fine_tune(
            home / f"new {name}", data=rows, folder=home / "work" / name, learning_rate=rate, max_steps=60,
            per_device_train_batch_size=32, **FAST,
        )  # fmt: skip
        made.model.save_pretrained(home / name)
    write_rows(home / "data.jsonl", stripes(240, seed=1))
    write_rows(home / "test.jsonl", stripes(120, seed=2))
    write_rows(home / "unlabelled.jsonl", [{"pixel_values": r["pixel_values"]} for r in stripes(240, seed=1)])
    return home


def right(model: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    pixels = torch.tensor([row["pixel_values"] for row in rows])
    with torch.no_grad():
        found = model.eval()(pixel_values=pixels).logits.argmax(-1)
    return np.array([NAMES[i] for i in found.tolist()]) == np.array([row["label"] for row in rows])


def test_what_a_teacher_knows_more(zoo: Path) -> None:
    found = complement(zoo / "vit", {"resnet": zoo / "resnet", "itself": zoo / "vit"}, zoo / "test.jsonl", device="cpu")
    rows = stripes(120, seed=2)
    s, t = right(regraft.load(zoo / "vit"), rows), right(regraft.load(zoo / "resnet"), rows)
    flips = found["resnet"].flips
    assert flips.positive == pytest.approx((~s & t).mean())
    assert flips.negative == pytest.approx((s & ~t).mean())
    assert flips.positive > 0.2
    assert sum(flips.positive_per_class[name] for name in NAMES[4:]) > 0.9 * flips.positive * 120
    assert list(flips.positive_per_class) == NAMES
    itself = found["itself"]
    assert (itself.flips.positive, itself.flips.negative, itself.surer, itself.surer_of_label) == (0, 0, 0, 0)
    assert itself.flips.positive_entropy is None


def test_a_student_learns_from_another_architecture_and_forgets_nothing(zoo: Path, tmp_path: Path) -> None:
    """The partition keeps what the student knew; the same training without it loses that."""
    after = {}
    for partition, data in (("supervised", "data"), ("confidence", "unlabelled"), ("none", "unlabelled")):
        made = transfer(
            zoo / "vit", teacher=zoo / "resnet", data=zoo / f"{data}.jsonl", folder=tmp_path / partition,
            partition=partition, **SGD, **FAST,
        )  # fmt: skip
        assert type(made.model).__name__ == "ViTForImageClassification"
        after[partition] = made
    rows = stripes(120, seed=2)
    before = right(regraft.load(zoo / "vit"), rows)
    first = np.array([row["label"] in NAMES[:2] for row in rows])
    last = np.array([row["label"] in NAMES[4:] for row in rows])
    assert before[first].mean() > 0.9
    assert before[last].mean() == 0
    now = {partition: right(made.model, rows) for partition, made in after.items()}
    assert now["supervised"][last].mean() > 0.9
    assert now["supervised"][first].mean() > 0.9
    assert now["none"][last].mean() > 0.9
    assert now["none"][first].mean() < 0.5
    told = after["supervised"].diagnostics["transfer"]
    assert told["measured_on"] == "rows of the data"
    assert told["teachers"][0]["flips"]["positive"] > 0.2
    assert 0.1 < told["taught"] < 0.9
    assert "flips" not in after["confidence"].diagnostics["transfer"]["teachers"][0]
    history = after["supervised"].diagnostics["training"]["history"]
    assert history[-1]["kl"] < 0.3 * history[0]["kl"]


def test_rows_held_out_judge_the_student(zoo: Path, tmp_path: Path) -> None:
    call: dict[str, Any] = {"data": zoo / "data.jsonl", "held_out": 0.25, **SGD, **FAST}
    good = transfer(zoo / "vit", teacher=zoo / "resnet", folder=tmp_path / "a", **call)
    told = good.diagnostics["transfer"]
    assert (told["rows"], told["measured_on"], told["kept"]) == (60, "held-out rows", True)
    moved = told["teachers"][0]["transferred"]
    assert moved["delta"] == pytest.approx(moved["gain"] - moved["loss"])
    assert moved["delta"] > 0.2
    assert moved["transfer_rate"] > 0.8
    bad = transfer(zoo / "vit", teacher=zoo / "new resnet", folder=tmp_path / "b", partition="none", **call)
    assert not bad.diagnostics["transfer"]["kept"]
    assert any("is left as it was" in warning for warning in bad.warnings)
    before, after = (one.state_dict() for one in (regraft.load(zoo / "vit"), bad.model))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_labels_in_another_order(zoo: Path, tmp_path: Path) -> None:
    """A teacher that numbers the classes differently teaches the same."""
    turned = hf.ResNetForImageClassification.from_pretrained(zoo / "resnet")
    order = [3, 0, 5, 1, 4, 2]
    with torch.no_grad():
        for name, value in turned.named_parameters():
            if value.shape[:1] == (6,):
                value.copy_(value[order].clone())
                assert "classifier" in name
    for key, value in labels([NAMES[i] for i in order]).items():
        setattr(turned.config, key, value)
    turned.save_pretrained(tmp_path / "turned")
    found = []
    for teacher in (zoo / "resnet", tmp_path / "turned"):
        made = transfer(
            zoo / "vit", teacher=teacher, data=zoo / "data.jsonl", folder=tmp_path / f"work {teacher.name}",
            max_steps=3, per_device_train_batch_size=32, **FAST,
        )  # fmt: skip
        found.append(made.model.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


def test_each_model_prepares_images_by_its_own_means(tmp_path: Path) -> None:
    for name, size in (("s", 8), ("t", 16)):
        save_model(tmp_path / name, "vit", seed=size, image_size=size, num_channels=3, num_labels=6, **labels())
        processor = hf.ViTImageProcessorPil(size={"height": size, "width": size})
        processor.save_pretrained(tmp_path / name)
    images = (np.random.default_rng(0).random((24, 12, 12)) * 255).round()
    rows = [{"image": image.tolist(), "label": NAMES[i % 6]} for i, image in enumerate(images)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    made = transfer(tmp_path / "s", teacher=tmp_path / "t", data=data, folder=tmp_path / "w", max_steps=2, **FAST)
    assert 0 < made.diagnostics["transfer"]["taught"] < 1
    arrays = write_rows(tmp_path / "arrays.jsonl", [{"pixel_values": BLANK, "label": NAMES[0]}] * 4)
    with pytest.raises(UserError, match=r"the teacher cannot read the data: .*size.*in a column image") as caught:
        transfer(tmp_path / "s", teacher=tmp_path / "t", data=arrays, folder=tmp_path / "v", **FAST)
    assert caught.value.code == "RG601"
    with pytest.raises(UserError, match="the student cannot read the data"):
        transfer(tmp_path / "t", teacher=tmp_path / "s", data=arrays, folder=tmp_path / "u", **FAST)


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    def tell(done: int, steps: int, figures: Mapping[str, float]) -> None:
        if done == step:
            raise Killed

    return tell


def test_a_killed_run_with_two_teachers_ends_as_one_that_was_not(zoo: Path, tmp_path: Path) -> None:
    """Killed while the second teacher teaches; with slow weights, momentum, a batch norm, and what was said on disk."""
    call: dict[str, Any] = {
        "teacher": [zoo / "resnet", zoo / "vit"], "data": zoo / "data.jsonl", "max_steps": 6, "save_steps": 2,
        "per_device_train_batch_size": 16, "learning_rate": 0.05, "ema": 0.5, "ema_every": 2, "cache_teacher": True,
    }  # fmt: skip
    save_resnet(tmp_path / "student", seed=3)
    whole = transfer(tmp_path / "student", folder=tmp_path / "a", **call, **FAST)
    with pytest.raises(Killed):
        transfer(tmp_path / "student", folder=tmp_path / "b", tell=kill_at(11), **call, **FAST)
    assert (tmp_path / "b" / "teacher-2" / "checkpoint-4").is_dir()
    again = transfer(tmp_path / "student", folder=tmp_path / "b", **call, **FAST)
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    told = whole.diagnostics
    assert told["training"]["steps"] == 12
    assert [entry["step"] for entry in told["training"]["history"]] == list(range(1, 13))
    facts = {fact["role"]: fact["flips"]["teacher"] for fact in told["transfer"]["teachers"]}
    assert told["transfer"]["order"] == sorted(facts, key=lambda role: facts[role])


def test_the_order_of_teachers(zoo: Path, tmp_path: Path) -> None:
    call: dict[str, Any] = {"data": zoo / "data.jsonl", "max_steps": 1, **FAST}
    teachers = [zoo / "vit", zoo / "new vit"]  # right in two thirds, and as good as never
    for order, expected in (
        ("ascending", ["teacher_2", "teacher"]), ("descending", ["teacher", "teacher_2"]),
        ("given", ["teacher", "teacher_2"]),
    ):  # fmt: skip
        made = transfer(zoo / "resnet", teacher=teachers, folder=tmp_path / order, order=order, **call)
        assert made.diagnostics["transfer"]["order"] == expected
    both = transfer(zoo / "resnet", teacher=teachers, folder=tmp_path / "p", several="parallel", **call)
    assert both.diagnostics["training"]["steps"] == 1
    with pytest.raises(UserError, match="no accuracy to order the teachers by"):
        transfer(zoo / "resnet", teacher=teachers, folder=tmp_path / "q", measured_rows=0, **call)


def test_the_cache_changes_nothing(zoo: Path, tmp_path: Path) -> None:
    call: dict[str, Any] = {
        "teacher": zoo / "resnet",
        "data": zoo / "data.jsonl",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
    }
    one, two = (
        transfer(zoo / "vit", folder=tmp_path / str(cache), cache_teacher=cache, **call, **FAST).model.state_dict()
        for cache in (False, True)
    )
    assert list((tmp_path / "True" / "said").glob("*/features.bin"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6), name


def test_slow_weights_and_gradient_descent(tmp_path: Path) -> None:
    """Against a loop by hand: momentum, decay of matrices, and a slow copy into which every second step enters."""
    folder = save_tiny(tmp_path / "vit", "vit")
    rows = pictures(8)
    options = TrainOptions(
        optimizer="sgd", momentum=0.8, learning_rate=0.1, weight_decay=0.01, max_grad_norm=0.0, max_steps=6,
        lr_scheduler_type="constant", per_device_train_batch_size=8, ema=0.7, ema_every=2, ema_warmup=False,
    )  # fmt: skip
    found = regraft.load(folder)
    batches = batches_for(found, folder, rows[0])
    train(found, Sum(batches.collate, [(1.0, OwnLoss())]), rows, options, folder=tmp_path / "w", device="cpu")

    mine = regraft.load(folder).train()
    weights, velocity, slow = dict(mine.named_parameters()), {}, {}
    batch = batches.collate(rows, [0] * 8)
    for step in range(6):
        mine.zero_grad()
        mine(**batch).loss.backward()
        with torch.no_grad():
            for name, value in weights.items():
                assert value.grad is not None
                gradient = value.grad + 0.01 * value * (value.ndim > 1)
                velocity[name] = 0.8 * velocity[name] + gradient if step else gradient
                value -= 0.1 * velocity[name]
                if step == 0:
                    slow[name] = value.clone()
                elif step % 2 == 0:
                    slow[name] = 0.7 * slow[name] + 0.3 * value
    for name, value in found.named_parameters():
        assert torch.allclose(value, slow[name], atol=1e-5), name


def test_running_means_have_the_statistics_of_batch_norms(zoo: Path, tmp_path: Path) -> None:
    found = regraft.load(zoo / "resnet")
    rows = stripes(32)
    batches = batches_for(found, zoo / "resnet", rows[0])
    options = TrainOptions(max_steps=2, per_device_train_batch_size=32, ema=0.9, ema_warmup=False, learning_rate=0.01)
    seen: list[torch.Tensor] = []
    name, norm = next((n, m) for n, m in found.named_modules() if isinstance(m, torch.nn.BatchNorm2d))

    def note(step: int, steps: int, figures: Mapping[str, float]) -> None:
        assert norm.running_mean is not None
        seen.append(norm.running_mean.clone())

    objective = Sum(batches.collate, [(1.0, OwnLoss())])
    train(found, objective, rows, options, folder=tmp_path, device="cpu", tell=note)
    assert norm.running_mean is not None
    assert not torch.equal(seen[0], seen[1])
    assert torch.allclose(norm.running_mean, 0.9 * seen[0] + 0.1 * seen[1], atol=1e-6), name


def test_a_stream(zoo: Path, tmp_path: Path) -> None:
    made = transfer(
        zoo / "vit", teacher=zoo / "resnet", data=zoo / "data.jsonl", folder=tmp_path, stream=True, max_steps=2,
        per_device_train_batch_size=16, **FAST,
    )  # fmt: skip
    assert made.diagnostics["transfer"]["teachers"] == [{"role": "teacher"}]
    assert 0 < made.diagnostics["transfer"]["taught"] < 1


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_language_models_of_one_tokenizer(family: str, tmp_path: Path) -> None:
    teacher, student = save_tiny(tmp_path / "t", family), save_tiny(tmp_path / "s", family, seed=1)
    data = write_rows(tmp_path / "data.jsonl", texts())
    call: dict[str, Any] = {"data": data, "max_steps": 20, "learning_rate": 0.05, **FAST}
    made = transfer(student, teacher=teacher, folder=tmp_path / "w", **call)
    history = made.diagnostics["training"]["history"]
    assert history[-1]["kl"] < history[0]["kl"]
    assert 0 < made.diagnostics["transfer"]["taught"] < 1
    with pytest.raises(UserError, match="held_out measures classes"):
        transfer(student, teacher=teacher, data=data, folder=tmp_path / "v", held_out=0.5, **FAST)
    other = save_tiny(tmp_path / "other", "bert" if family == "gpt2" else "gpt2")
    with pytest.raises(UserError, match=r"the student is a .* of 96 tokens and the teacher a .* of 96") as caught:
        transfer(student, teacher=other, data=data, folder=tmp_path / "v", **FAST)
    assert caught.value.code == "RG204"


def test_teachers_that_cannot_teach_are_refused(zoo: Path, tmp_path: Path) -> None:
    def refused(words: str, code: str, teacher: Any, student: Path = zoo / "vit", **options: Any) -> None:
        given = {"data": zoo / "data.jsonl"} | FAST | options
        with pytest.raises(UserError, match=words) as caught:
            transfer(student, teacher=teacher, folder=tmp_path / "w", **given)
        assert caught.value.code == code
        assert not list(tmp_path.glob("w/**/checkpoint-*"))

    refused("teacher would teach none of the 240 rows", "RG213", zoo / "vit")
    few = save_resnet(tmp_path / "few", names=NAMES[:3])
    refused("6 classes apart and the teacher 3", "RG207", few)
    other = save_resnet(tmp_path / "other", names=[*NAMES[:5], "bird"])
    refused("a class 'class 5', and the teacher has none of that name", "RG207", other)
    save_model(tmp_path / "one", "vit", num_labels=1)
    refused(r"with 1 output\(s\) does not choose", "RG309", tmp_path / "one")
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"pixel_values": BLANK, "text": "w1"}])
    refused("a CLIPModel has no classes", "RG309", zoo / "vit", student=save_clip(tmp_path / "clip"), data=pairs)
    refused("there are no labels, which the partition", "RG309", zoo / "resnet", data=zoo / "unlabelled.jsonl")
    refused("held_out measures with labels", "RG309", zoo / "resnet", data=zoo / "unlabelled.jsonl",
            partition="confidence", held_out=0.5)  # fmt: skip
    refused(
        "held out leave none to train on",
        "RG601",
        zoo / "resnet",
        data=write_rows(tmp_path / "one.jsonl", stripes(1)),
        held_out=0.5,
    )
    refused("without a choice between them", "RG309", [zoo / "resnet", zoo / "new vit"], several="parallel",
            partition="none")  # fmt: skip
    refused("nothing to compare a single example with", "RG303", zoo / "vit", student=zoo / "resnet",
            per_device_train_batch_size=1)  # fmt: skip
    refused("nothing to compare a single example with", "RG303", zoo / "vit", student=zoo / "resnet",
            per_device_train_batch_size=239)  # fmt: skip
    for options, words in (
        ({"negative_flips": "skip"}, "is for partition: none"),
        ({"double_softmax": True}, "whose share is 0"),
        ({"partition": "self", "top_k": 3}, "no teacher is asked"),
        ({"stream": True, "held_out": 0.5}, "a share of data with a length"),
    ):
        refused(words, "RG303", zoo / "resnet", **options)
    data = zoo / "unlabelled.jsonl"
    with pytest.raises(UserError, match="distil takes no teacher_2"):
        distil(zoo / "vit", teacher=[zoo / "vit", zoo / "resnet"], data=data, folder=tmp_path / "w")
    with pytest.raises(UserError, match="transfer needs a teacher"):
        transfer(zoo / "vit", data=data, folder=tmp_path / "w")


def save_clip(folder: Path) -> Path:
    model("clip").save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def test_a_teacher_that_knows_nothing_more_is_remarked(zoo: Path, tmp_path: Path) -> None:
    """The same classes right, with other probabilities."""
    calm = regraft.load(zoo / "vit")
    with torch.no_grad():
        calm.classifier.weight.mul_(0.5)
        calm.classifier.bias.mul_(0.5)
    calm.save_pretrained(tmp_path / "calm")
    made = transfer(
        zoo / "vit", teacher=tmp_path / "calm", data=zoo / "data.jsonl", folder=tmp_path / "w", max_steps=1, **FAST
    )
    assert any("right nowhere where the student is wrong" in warning for warning in made.warnings)


def test_a_teacher_that_teaches_nearly_everything_is_remarked(zoo: Path, tmp_path: Path) -> None:
    loud = regraft.load(zoo / "vit")
    with torch.no_grad():
        loud.classifier.weight.mul_(20.0)
        loud.classifier.bias.mul_(20.0)
    loud.save_pretrained(tmp_path / "loud")
    made = transfer(
        zoo / "vit", teacher=tmp_path / "loud", data=zoo / "data.jsonl", folder=tmp_path / "w", max_steps=1,
        partition="confidence", **FAST,
    )  # fmt: skip
    assert any("too sure of itself" in warning for warning in made.warnings)


def test_flips_need_labels(zoo: Path) -> None:
    with pytest.raises(UserError, match="no column 'digit' with the true classes") as caught:
        complement(zoo / "vit", {"t": zoo / "resnet"}, zoo / "data.jsonl", FlipOptions(label="digit"))
    assert caught.value.code == "RG601"


def test_in_a_recipe_and_as_commands(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vit", "resnet", "new vit", "data.jsonl"):
        (tmp_path / name.replace(" ", "-")).symlink_to(zoo / name)
    Path("recipe.yaml").write_text(
        "models: {student: ./vit, one: ./resnet, two: ./new-vit}\n"
        "steps:\n"
        "  better: {train: transfer, model: student, teacher: [one, two], data: data.jsonl, max_steps: 2}\n"
        "  again: {train: transfer, model: better, teacher: one, data: data.jsonl, max_steps: 1}\n"
    )
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "-o", "out"])
    assert result.exit_code == 0, result.stderr
    lineage = json.loads(Path("out/better/regraft.json").read_text())
    assert [(i["role"], i["name"]) for i in lineage["inputs"]] == [
        ("model", "student"), ("teacher", "one"), ("teacher_2", "two")
    ]  # fmt: skip
    assert lineage["diagnostics"]["transfer"]["order"] == ["teacher_2", "teacher"]
    line = ["train", "transfer", "vit", "new", "--teacher", "resnet", "--teacher", "new-vit", "--data", "data.jsonl"]
    result = CliRunner().invoke(app, [*line, "--set", "max_steps=1", "--set", "several=parallel"])
    assert result.exit_code == 0, result.stderr
    assert "1 steps" in result.stdout
    for teachers, words in (("[one, one]", "one is listed twice"), ("[]", "teacher is empty")):
        text = Path("recipe.yaml").read_text().replace("[one, two]", teachers)
        Path("wrong.yaml").write_text(text)
        result = CliRunner().invoke(app, ["plan", "wrong.yaml"])
        assert result.exit_code == 2
        assert words in result.stderr

    result = CliRunner().invoke(app, ["flips", "vit", "resnet", "new-vit", "--data", "data.jsonl", "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["student"] == "vit"
    expected = complement(zoo / "vit", {"t": zoo / "resnet"}, zoo / "data.jsonl", device="cpu")["t"]
    assert told["teachers"]["resnet"]["positive"] == pytest.approx(expected.flips.positive)
    result = CliRunner().invoke(app, ["flips", "vit", "resnet", "vit", "--data", "data.jsonl", "--set", "limit=60"])
    assert result.exit_code == 0, result.stderr
    assert "right in" in result.stdout
    assert "60 rows" in result.stdout
    assert "class 5" in result.stdout
    assert "there is nothing to take over" in result.stderr
    for more, words in ((["--set", "labels=digit"], "flips has no option 'labels'"), (["--set", "label"], "no value")):
        result = CliRunner().invoke(app, ["flips", "vit", "resnet", "--data", "data.jsonl", *more])
        assert result.exit_code == 2
        assert words in result.stderr
