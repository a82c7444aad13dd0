"""Texts in one row are as if each stood alone: losses, gradients, hidden states and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from models import model
from regraft.errors import UserError
from regraft.train.batches import DataOptions, batches_for
from regraft.train.methods.distil import distil
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.packing import check_packing, packed
from regraft.train.tap import every_block, look
from tiny import save_tiny, texts, write_rows

FAMILIES = ("gpt2", "llama", "mistral")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_gradients_and_states_are_those_of_padded_texts(family: str, attention: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family, scale=4.0)
    rows = texts(5)
    found = []
    for packing in (False, True):
        whole = regraft.load(folder).train()
        whole.set_attn_implementation(attention)
        collate = batches_for(whole, folder, rows[0], DataOptions(packing=packing)).collate
        batch = collate(rows, [0] * 5)
        seen = look(whole, batch, every_block(whole))
        seen.output.loss.backward()
        gradients = {name: p.grad for name, p in whole.named_parameters()}
        found.append((batch, seen, gradients))
    (padded, one, before), (row, two, after) = found
    real = padded["attention_mask"].bool()
    assert row["input_ids"].shape == (1, int(real.sum()))
    assert not real.all()
    assert float(two.output.loss) == pytest.approx(float(one.output.loss), rel=1e-5)
    for signal in every_block(whole):
        assert torch.allclose(two[signal][0], one[signal][real], atol=1e-4)
    for name, value in before.items():
        assert torch.allclose(after[name], value, atol=1e-5, rtol=1e-3), name


def test_a_row_that_forgot_its_borders_would_differ(tmp_path: Path) -> None:
    """What the tests above would say of a model that mixes texts: the same tokens with positions that go on."""
    folder = save_tiny(tmp_path / "llama", "llama", scale=4.0)
    whole = regraft.load(folder)
    row = packed([[5, 6, 7], [8, 9, 10, 11]])
    mixed = {**row, "position_ids": torch.arange(7)[None]}
    with torch.no_grad():
        apart, joined = (look(whole, batch).logits for batch in (row, mixed))
    assert torch.allclose(apart[0, :3], joined[0, :3], atol=1e-6)
    assert (apart[0, 3:] - joined[0, 3:]).abs().max() > 1e-2 * apart.abs().max()


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2"])
def test_families_that_keep_texts_apart(family: str) -> None:
    check_packing(model(family, initializer_range=0.3))


def test_rows() -> None:
    row = packed([[5, 6, 7], [8], [9, 10]])
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert row["labels"].tolist() == [[-100, 6, 7, -100, -100, 10]]


def test_a_run_with_packed_rows_is_the_run_without(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    data = write_rows(tmp_path / "data.jsonl", texts())
    options: dict[str, Any] = {
        "device": "cpu", "per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 4, "learning_rate": 1e-3,
    }  # fmt: skip
    one = fine_tune(folder, data=data, folder=tmp_path / "a", **options)
    two = fine_tune(folder, data=data, folder=tmp_path / "b", packing=True, **options)
    losses = [[h["loss"] for h in made.diagnostics["training"]["history"]] for made in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in one.model.state_dict().items():
        assert torch.allclose(value, two.model.state_dict()[name], atol=1e-4), name


def test_a_teacher_reads_packed_rows_as_well(tmp_path: Path) -> None:
    teacher, student = save_tiny(tmp_path / "t", "llama", scale=4.0), save_tiny(tmp_path / "s", "llama", seed=1)
    data = write_rows(tmp_path / "data.jsonl", texts())
    options: dict[str, Any] = {
        "device": "cpu", "per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 2, "feature_weight": 1.0,
        "teacher": teacher, "data": data,
    }  # fmt: skip
    one = distil(student, folder=tmp_path / "a", **options)
    two = distil(student, folder=tmp_path / "b", packing=True, **options)
    for name in ("logits", "features"):
        a, b = ([h[name] for h in made.diagnostics["training"]["history"]] for made in (one, two))
        assert b == pytest.approx(a, rel=1e-3), name
    with pytest.raises(UserError, match="would never be found again"):
        distil(student, folder=tmp_path / "c", packing=True, cache_teacher=True, **options)


def test_what_packing_refuses(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", texts())
    bert = save_tiny(tmp_path / "bert", "bert")
    with pytest.raises(UserError, match="packed for the own loss of causal language models, and this is a BertFor"):
        fine_tune(bert, data=data, folder=tmp_path / "a", packing=True, max_steps=1)
    whole = model("llama", initializer_range=0.3)
    check_packing(whole)
    forward = whole.forward

    def deaf(**inputs: Any) -> Any:
        inputs.pop("position_ids", None)
        return forward(**inputs)

    whole.forward = deaf  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"a LlamaForCausalLM, does not keep the texts of one row apart"):
        check_packing(whole)
