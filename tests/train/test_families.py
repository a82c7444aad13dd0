"""Learning from a teacher in families whose blocks are unlike others: stages of Swin, fused projections of GPT-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from models import model
from regraft.axes.module_map import modules_of
from regraft.errors import UserError
from regraft.resize.factorise import LowRankOptions, factorise
from regraft.resize.surgery import save
from regraft.train.methods.distil import distil
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.methods.minilm import minilm
from regraft.train.student import SizeOptions, student_of
from regraft.train.tap import KINDS, Signal, every_block, look
from tiny import inputs_of, output_of, rows_for, save_tiny, write_rows

FAST: dict[str, Any] = {"device": "cpu", "per_device_train_batch_size": 8, "logging_steps": 1}


def test_signals_of_swin_grow_wider_from_stage_to_stage() -> None:
    whole = model("swin").eval()
    wanted = [Signal(kind, "", block) for kind in KINDS for block in range(4)]
    seen = look(whole, inputs_of("swin"), wanted)
    assert [tuple(seen[Signal("block", "", i)].shape) for i in range(4)] == [(2, 64, 16)] * 2 + [(2, 16, 32)] * 2
    assert torch.equal(seen[Signal("block_input", "", 1)], seen[Signal("block", "", 0)])
    roles = modules_of(whole)
    for i, block in enumerate(roles.blocks[""]):
        windows = seen[Signal("query", "", i)]
        assert windows.shape == seen[Signal("value", "", i)].shape == ((8, 16, 16) if i < 2 else (2, 16, 32))
        norm = whole.get_submodule(f"{block}.layernorm_before")
        x = norm(seen[Signal("block_input", "", i)])
        if i % 2 == 0:  # the others are shifted first
            own = whole.get_submodule(roles.part(block, "attention.query"))(x)
            assert torch.allclose(own.sum(), windows.sum(), rtol=1e-3)


@pytest.mark.parametrize("family", ["swin", "t5"])
def test_distil(family: str, tmp_path: Path) -> None:
    teacher, student = save_tiny(tmp_path / "t", family, scale=3), save_tiny(tmp_path / "s", family, seed=1, scale=3)
    data = write_rows(tmp_path / "data.jsonl", rows_for(family, 32))
    made = distil(
        student, teacher=teacher, data=data, folder=tmp_path / "a", max_steps=30, learning_rate=5e-3,
        feature_weight=0.5, task_weight=0.1, **FAST,
    )  # fmt: skip
    history = made.diagnostics["training"]["history"]
    for part in ("logits", "features"):
        assert history[-1][part] < 0.8 * history[0][part], part
    target = output_of(regraft.load(teacher), family).softmax(-1)
    before, after = (
        float((output_of(m, family).softmax(-1) - target).abs().sum()) for m in (regraft.load(student), made.model)
    )
    assert after < before


@pytest.mark.parametrize("family", ["swin", "gpt2", "vit"])
def test_minilm(family: str, tmp_path: Path) -> None:
    """Relations within windows, and of thirds of one matrix."""
    teacher, student = save_tiny(tmp_path / "t", family, scale=3), save_tiny(tmp_path / "s", family, seed=1, scale=3)
    data = write_rows(tmp_path / "data.jsonl", rows_for(family, 32))
    made = minilm(student, teacher=teacher, data=data, folder=tmp_path / "a", max_steps=20, learning_rate=3e-3, **FAST)
    history = made.diagnostics["training"]["history"]
    assert history[-1]["relations"] < 0.7 * history[0]["relations"]


@pytest.mark.parametrize("family", ["swin", "t5"])
def test_fine_tune_of_a_compressed_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", family, scale=3)
    whole = regraft.load(folder)
    factorise(whole, LowRankOptions(ratio=2))
    low = tmp_path / "low"
    save(whole, low)
    for file in folder.glob("tok*"):
        (low / file.name).write_bytes(file.read_bytes())
    data = write_rows(tmp_path / "data.jsonl", rows_for(family))
    made = fine_tune(low, data=data, folder=tmp_path / "a", max_steps=15, learning_rate=5e-3, **FAST)
    assert not torch.equal(output_of(made.model, family), output_of(regraft.load(low), family))
    save(made.model, tmp_path / "again")
    assert torch.equal(output_of(regraft.load(tmp_path / "again"), family), output_of(made.model, family))


def test_another_size_of_swin_is_refused() -> None:
    with pytest.raises(UserError, match="another size of a swin model, whose stages differ in width"):
        student_of(model("swin"), SizeOptions(init="layers", num_layers=2), 0)


def test_every_block_of_swin_is_compared() -> None:
    assert len(every_block(model("swin"))) == 4
