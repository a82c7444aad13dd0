"""PELA and svd end to end: from Python, in a recipe, and as commands, on real models of each kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import regraft
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.objectives.features import Features
from regraft.recipe import parse_recipe
from regraft.recipe.making import export
from regraft.recipe.plan import make_plan
from regraft.recipe.run import run
from regraft.resize.low_rank import LowRankLinear
from regraft.resize.methods.pela import pela
from regraft.resize.methods.svd import svd
from regraft.train.batches import batches_for
from regraft.train.tap import every_block, look
from tiny import output_of, pictures, rows_for, save_masked, save_tiny, texts, write_rows

KINDS = ("bert", "gpt2", "llama", "t5", "vit", "swin", "clip")


def distance(student: Any, teacher: Path, rows: list[dict[str, Any]]) -> float:
    """Mean squared difference of all hidden states on some examples."""
    original = regraft.load(teacher)
    batch = batches_for(original, teacher, rows[0], labels=False).collate(rows, [0] * len(rows))
    with torch.no_grad():
        one, two = (look(m, batch, every_block(m)) for m in (student, original))
        return float(Features()(one, batch, two))


@pytest.mark.parametrize("family", KINDS)
def test_pela_comes_nearer_to_the_original_than_its_factors(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family, scale=8)
    rows = rows_for(family, 40)
    data = write_rows(tmp_path / "data.jsonl", rows[:32])
    options: dict[str, Any] = {"ratio": 2, "rank": None}
    plain = svd(folder, data=data, folder=tmp_path / "a", **options).model
    seen: list[tuple[int, Mapping[str, float]]] = []
    made = pela(
        folder, data=data, folder=tmp_path / "b", device="cpu", max_steps=25, learning_rate=2e-3,
        task_weight=0.01, perturbation_weight=0.01, logging_steps=5, per_device_train_batch_size=16,
        tell=lambda step, steps, figures: seen.append((step, figures)), **options,
    )  # fmt: skip
    before, after = (distance(m, folder, rows[32:]) for m in (plain, made.model))
    assert after < 0.7 * before
    parts = made.diagnostics["training"]["history"][-1]
    assert {"own", "features", "perturbation", "loss"} <= parts.keys()
    assert [step for step, _ in seen] == list(range(1, 26))
    assert seen[-1][1]["seconds_left"] == 0
    cost = made.diagnostics["cost"]
    assert cost["parameters"]["after"] == sum(p.numel() for p in made.model.parameters())
    assert cost["flops"]["after"] < cost["flops"]["before"]
    assert all(times["after"] > 0 for times in cost["seconds"].values())
    assert made.diagnostics["low_rank"]["kept"] == cost["parameters"]["after"]


def test_without_labels_features_alone_are_matched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "encoder"
    hf.BertModel(hf.BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    )).save_pretrained(folder)  # fmt: skip
    from tiny import add_tokenizer

    add_tokenizer(folder)
    data = write_rows(tmp_path / "data.jsonl", texts())
    made = pela(folder, data=data, folder=tmp_path / "a", device="cpu", max_steps=2, logging_steps=1)
    assert "own" not in made.diagnostics["training"]["history"][-1]
    with pytest.raises(UserError, match="a BertModel with this data has no loss of its own"):
        pela(folder, data=data, folder=tmp_path / "b", max_steps=2, task_weight=1.0)
    with pytest.raises(UserError, match="all weights of the loss are 0"):
        pela(folder, data=data, folder=tmp_path / "c", max_steps=2, feature_weight=0.0)


def test_a_cached_teacher_teaches_the_same(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "vit")
    data = write_rows(tmp_path / "data.jsonl", rows_for("vit"))
    made = [
        pela(folder, data=data, folder=tmp_path / str(cached), device="cpu", num_train_epochs=3, cache_teacher=cached)
        for cached in (False, True)
    ]
    one, two = (m.model.state_dict() for m in made)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    # Another model, or another weight of a loss, in the same folder is another run.
    other = save_tiny(tmp_path / "other", "vit", seed=1)
    found = [
        pela(model, data=data, folder=tmp_path / "same", device="cpu", max_steps=1, cache_teacher=True).model
        for model in (other, folder)
    ]
    plain = pela(folder, data=data, folder=tmp_path / "own", device="cpu", max_steps=1).model
    for name, value in plain.state_dict().items():
        assert torch.allclose(found[1].state_dict()[name], value, atol=1e-6)
    assert not torch.allclose(output_of(found[0], "vit"), output_of(found[1], "vit"))


def test_whitened_factors_start_nearer(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bert", scale=8)
    rows = texts(40)
    data = write_rows(tmp_path / "data.jsonl", rows)
    plain, white = (svd(folder, data=data, folder=tmp_path / "a", init=init).model for init in ("svd", "whitened"))
    assert distance(white, folder, rows) < distance(plain, folder, rows)
    with pytest.raises(UserError, match="whitening needs data"):
        svd(folder, folder=tmp_path / "a", init="whitened")


RECIPE = """
models: {base: ./model}
steps:
  small: {compress: pela, model: base, data: data.jsonl, ratio: 2, max_steps: 3, per_device_train_batch_size: 8}
  tuned: {train: fine_tune, model: small, data: data.jsonl, max_steps: 2}
  score: {evaluate: accuracy, models: [base, small, tuned], data: data.jsonl}
"""


@pytest.mark.parametrize("ratio", [0.25, 0.9])
def test_a_masked_auto_encoder_hides_as_much_as_its_original(ratio: float, tmp_path: Path) -> None:
    """At another share than the one that is configured, 0.75."""
    folder = save_masked(tmp_path / "model", "vit_mae", scale=8)
    data = write_rows(tmp_path / "data.jsonl", pictures(16))
    made, whitened = (
        pela(
            folder, data=data, folder=tmp_path / init, device="cpu", mask_ratio=ratio, init=init, max_steps=steps,
            learning_rate=2e-3, logit_weight=1.0, task_weight=0.01, per_device_train_batch_size=16, logging_steps=1,
        )
        for init, steps in (("svd", 20), ("whitened", 1))
    )  # fmt: skip
    history = made.diagnostics["training"]["history"]
    assert history[-1]["features"] < 0.8 * history[0]["features"]
    assert whitened.diagnostics["training"]["history"][0]["features"] < history[0]["features"]
    assert made.model.config.mask_ratio == ratio
    flops = made.diagnostics["cost"]["flops"]
    assert 0.3 * flops["before"] < flops["after"] < flops["before"]


def test_in_a_recipe(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "vit")
    write_rows(tmp_path / "data.jsonl", rows_for("vit"))
    recipe = parse_recipe(RECIPE, path=tmp_path / "recipe.yaml")
    told = make_plan(recipe).to_dict()
    assert [s["step"] for s in told["steps"]] == ["small", "tuned", "score"]
    result = run(recipe, tmp_path / "out")
    assert [e.model for e in result.evaluations] == ["base", "small", "tuned"]
    small = regraft.load(tmp_path / "out" / "small")
    tuned = regraft.load(tmp_path / "out" / "tuned")
    for model in (small, tuned):
        assert any(isinstance(m, LowRankLinear) for m in model.modules())
    assert not torch.equal(output_of(small, "vit"), output_of(tuned, "vit"))
    lineage = json.loads((tmp_path / "out" / "small" / "regraft.json").read_text())
    assert (lineage["kind"], lineage["method"]) == ("compress", "pela")
    assert lineage["surgeries"][0]["kind"] == "low_rank"
    assert len(lineage["scores"]) == 1
    card = (tmp_path / "out" / "small" / "README.md").read_text()
    assert "`base` compressed by `pela`" in card
    assert "regraft.load(" in card
    assert not list((tmp_path / "out" / "artefacts").glob("*.work"))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "artefacts").rglob("*.safetensors")}
    run(recipe, tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    changed = parse_recipe(RECIPE, path=tmp_path / "recipe.yaml", changes=["steps.tuned.max_steps=1"])
    again = run(changed, tmp_path / "out")
    assert again.artefacts["small"] == result.artefacts["small"]
    assert again.artefacts["tuned"] != result.artefacts["tuned"]


def test_as_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("model"), "bert")
    write_rows(Path("data.jsonl"), texts())
    line = "compress pela model small --data data.jsonl --set max_steps=2 --set ratio=1.5 --device cpu"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.stderr
    assert "parameters" in result.stdout
    assert "operations" in result.stdout
    result = CliRunner().invoke(app, ["inspect", "small"])
    assert result.exit_code == 0, result.stderr
    result = CliRunner().invoke(app, ["export", "small", "dense"])
    assert result.exit_code == 0, result.stderr
    dense = hf.AutoModelForMaskedLM.from_pretrained("dense")
    assert (output_of(dense, "bert") - output_of(regraft.load("small"), "bert")).abs().max() < 1e-5
    assert hf.AutoTokenizer.from_pretrained("dense").mask_token == "[MASK]"
    line = "compress svd model sketched --data data.jsonl --set init=whitened --set svd=randomized --device cpu"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.stderr
    assert "by a randomised decomposition" in result.stderr
    layers = json.loads(Path("sketched/regraft.json").read_text())["diagnostics"]["low_rank"]["layers"]
    assert all(layer["randomized"] and 0 < layer["output_error"] < 1 for layer in layers)
    for line, code, words in (
        ("export model other", 2, "the model is dense already"),
        ("compress pela model other", 2, "needs data"),
        ("compress pla model other --data data.jsonl", 2, "did you mean 'pela'"),
        ("compress pela model other --data data.jsonl --set ration=2", 2, "did you mean 'ratio'"),
        ("compress pela model other --data data.jsonl --set ratio=0.5", 2, "greater than 1"),
        ("compress pela model model --data data.jsonl", 2, "is the folder of model"),
        ("compress pela small other --data data.jsonl", 2, "low-rank already"),
        ("train distil model other --data data.jsonl", 2, "needs a teacher"),
    ):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == code, line
        assert words in result.stderr, (line, result.stderr)
        assert not Path("other").exists()


def test_factors_are_not_merged(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bert")
    write_rows(tmp_path / "data.jsonl", texts())
    text = """
models: {base: ./model}
steps:
  a: {compress: svd, model: base}
  merged: {merge: linear, models: [base, a]}
"""
    with pytest.raises(UserError, match="a is a compressed model") as caught:
        make_plan(parse_recipe(text, path=tmp_path / "recipe.yaml"))
    assert caught.value.code == "RG309"
    with pytest.raises(UserError, match="the model is dense already"):
        export(folder, tmp_path / "dense")
