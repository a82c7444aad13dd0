"""Adapters in the loop: only they move, they go on where they were, PEFT loads them, and merged they are the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import regraft
from models import model
from regraft.axes.module_map import modules_of
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.objectives.own_loss import OwnLoss
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.resize import surgery
from regraft.resize.factorise import LowRankOptions, factorise
from regraft.train.batches import batches_for
from regraft.train.loop import train
from regraft.train.lora import LoraOptions, adapted, apart
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions
from tiny import inputs_of, output_of, rows_for, save_tiny, texts, write_rows

FAST: dict[str, Any] = {"device": "cpu", "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", texts())


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "vit", "clip"])
def test_merged_it_is_a_model_that_has_learnt(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    rows = write_rows(tmp_path / "rows.jsonl", rows_for(family))
    made = fine_tune(folder, data=rows, folder=tmp_path / "a", max_steps=12, lora_rank=4, **FAST)
    before = regraft.load(folder)
    assert type(made.model) is type(before)
    assert made.model.state_dict().keys() == before.state_dict().keys()
    history = made.diagnostics["training"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    roles = modules_of(before)
    adapted_to = {name for role in ("attention", "ffn") for name in roles.find(role)}
    heads = set(roles.find("head")) if family == "vit" else set()
    for name, value in made.model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        moved = not torch.equal(value, before.state_dict()[name])
        if module in adapted_to and leaf == "weight":
            assert moved, name
            if family != "gpt2" or "attn" not in name:  # three projections in one are wider
                assert torch.linalg.matrix_rank(value - before.state_dict()[name], rtol=1e-3) <= 4
        elif module not in heads:
            assert not moved, name
    trained = made.diagnostics["trained_parameters"]
    assert trained < 0.5 * sum(p.numel() for p in before.parameters())


def test_an_adapter_is_what_peft_loads(data: Path, tmp_path: Path) -> None:
    """Saved alone, and loaded by stock PEFT, it computes what the merged model computes."""
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    options: dict[str, Any] = {"max_steps": 4, "lora_rank": 2, "lora_alpha": 8.0, "lora_modules": ("ffn",)} | FAST
    merged = fine_tune(folder, data=data, folder=tmp_path / "a", **options)
    alone = fine_tune(folder, data=data, folder=tmp_path / "b", lora_output="adapter", **options)
    alone.adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.allclose(output_of(loaded, "gpt2"), output_of(merged.model, "gpt2"), atol=1e-5)
    assert not torch.allclose(output_of(loaded, "gpt2"), output_of(regraft.load(folder), "gpt2"), atol=1e-3)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 8.0, "CAUSAL_LM")
    assert all("c_fc" in m or "c_proj" in m for m in config["target_modules"])


def test_a_low_rank_model_gets_adapters_on_its_factors(data: Path, tmp_path: Path) -> None:
    whole = regraft.load(save_tiny(tmp_path / "bert", "bert"))
    factorise(whole, LowRankOptions(ratio=2))
    surgery.save(whole, tmp_path / "low")
    for file in (tmp_path / "bert").glob("tok*"):
        (tmp_path / "low" / file.name).write_bytes(file.read_bytes())
    options: dict[str, Any] = {"max_steps": 6, "lora_rank": 2} | FAST
    merged = fine_tune(tmp_path / "low", data=data, folder=tmp_path / "a", **options)
    assert surgery.surgeries_of(merged.model.config)
    surgery.save(merged.model, tmp_path / "again")
    assert torch.equal(output_of(regraft.load(tmp_path / "again"), "bert"), output_of(merged.model, "bert"))
    assert not torch.allclose(output_of(merged.model, "bert"), output_of(whole, "bert"), atol=1e-4)
    alone = fine_tune(tmp_path / "low", data=data, folder=tmp_path / "b", lora_output="adapter", **options)
    alone.adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(regraft.load(tmp_path / "low"), tmp_path / "adapter")
    assert torch.allclose(output_of(loaded, "bert"), output_of(merged.model, "bert"), atol=1e-5)


def test_half_precision_is_merged_in_full_and_stays_half(data: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2", dtype=torch.bfloat16)
    made = fine_tune(folder, data=data, folder=tmp_path / "a", max_steps=2, lora_rank=2, **FAST)
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}


class Killed(Exception):
    pass


def test_a_killed_run_of_an_adapter_ends_as_one_that_was_not(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert", hidden_dropout_prob=0.1)

    def go(where: str, tell: Any = None) -> Any:
        whole = regraft.load(folder)
        wrapped = adapted(whole, LoraOptions(lora_rank=2, lora_dropout=0.1))
        collate = batches_for(whole, folder, texts()[0]).collate
        options = TrainOptions(
            max_steps=5, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, ema=0.3, logging_steps=1
        )
        result = train(
            wrapped,
            Sum(collate, [(1.0, OwnLoss())]),
            texts(),
            options,
            folder=tmp_path / where,
            device="cpu",
            tell=tell,
        )
        return wrapped, result

    def kill(done: int, steps: int, figures: Mapping[str, float]) -> None:
        if done == 3:
            raise Killed

    one, first = go("a")
    with pytest.raises(Killed):
        go("b", kill)
    two, second = go("b")
    assert (first.resumed_from, second.resumed_from) == (0, 2)
    a, b = one.state_dict(), two.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [h["loss"] for h in first.history] == [h["loss"] for h in second.history]
    # A checkpoint is an adapter that PEFT loads, and small.
    checkpoint = tmp_path / "a" / "checkpoint-5"
    peft.PeftModel.from_pretrained(regraft.load(folder), str(checkpoint))
    assert not (checkpoint / "model.safetensors").exists()


def test_checkpointed_activations_reach_the_adapter(data: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    options: dict[str, Any] = {"max_steps": 3, "lora_rank": 2} | FAST
    one = fine_tune(folder, data=data, folder=tmp_path / "a", **options)
    two = fine_tune(folder, data=data, folder=tmp_path / "b", gradient_checkpointing=True, **options)
    for name, value in one.model.state_dict().items():
        assert torch.allclose(value, two.model.state_dict()[name], atol=1e-5), name


def test_what_adapters_refuse(data: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    for options, words in (
        ({"lora_alpha": 4.0}, "lora_alpha has no place without lora_rank"),
        ({"lora_output": "adapter"}, "lora_output has no place without lora_rank"),
        ({"lora_rank": 2, "lora_modules": ("atention",)}, "did you mean 'attention'"),
        ({"lora_rank": 2, "lora_modules": ("cross",)}, "no linear layer has a role of cross"),
        ({"lora_rank": 2, "lora_output": "adapter", "init": "random"}, "no model that an adapter could be loaded on"),
    ):
        with pytest.raises(UserError, match=words):
            fine_tune(folder, data=data, folder=tmp_path / "a", max_steps=1, **options)
    prompts = peft.get_peft_model(model("gpt2"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match=r"PROMPT_TUNING adds to the inputs"):
        apart(prompts)
    whole = model("gpt2")
    assert apart(whole) == (whole, None)


RECIPE = """
models: {base: ./bert}
steps:
  sorted: {train: fine_tune, model: base, data: data.jsonl, head: sequence_classification, labels: [even, odd],
           lora_rank: 2, lora_output: adapter, max_steps: 2, per_device_train_batch_size: 4}
  merged: {train: fine_tune, model: base, data: data.jsonl, lora_rank: 2, max_steps: 2, per_device_train_batch_size: 4}
"""


def test_in_a_recipe_and_as_a_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("bert"), "bert")
    Path("recipe.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "-o", "out"])
    assert result.exit_code == 0, result.stderr
    there = {path.name for path in Path("out/sorted").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "regraft.json", "README.md"} <= there
    assert "config.json" not in there
    assert json.loads(Path("out/sorted/adapter_config.json").read_text())["base_model_name_or_path"] == "./bert"
    base = hf.AutoModelForSequenceClassification.from_pretrained("bert", num_labels=2)
    loaded = peft.PeftModel.from_pretrained(base, "out/sorted").eval()
    with torch.no_grad():
        assert loaded(**inputs_of("bert")).logits.shape == (2, 2)
    assert "peft" in Path("out/sorted/README.md").read_text()
    before = Path("out/sorted/regraft.json").stat().st_mtime_ns
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "-o", "out"])
    assert result.exit_code == 0, result.stderr
    assert Path("out/sorted/regraft.json").stat().st_mtime_ns == before
    line = ["train", "fine_tune", "bert", "new", "--data", "data.jsonl", "--set", "max_steps=1", "--set", "lora_rank=2"]
    result = CliRunner().invoke(app, [*line, "--set", "lora_output=adapter"])
    assert result.exit_code == 0, result.stderr
    assert Path("new/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{evaluate: perplexity, models: [a], data: data.jsonl}", "a is an adapter, which has no folder"),
        ("{train: fine_tune, model: a, data: data.jsonl}", "a is an adapter, which has no folder"),
        ("{merge: linear, models: [a, base]}", "a is an adapter that is not there before this run"),
    ],
)
def test_later_steps_cannot_use_it(step: str, words: str, data: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "gpt2", "gpt2")
    first = "{train: fine_tune, model: base, data: data.jsonl, lora_rank: 2, lora_output: adapter}"
    text = f"models: {{base: ./gpt2}}\nsteps:\n  a: {first}\n  b: {step}\n"
    with pytest.raises(UserError, match=words):
        make_plan(parse_recipe(text, path=tmp_path / "recipe.yaml"))
