"""Encoder-decoders: what they read and write, their own loss, and a teacher of the same kind with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from models import model
from regraft.train.batches import batches_for
from regraft.train.feature_cache import FeatureCache
from regraft.train.methods.distil import distil
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.tap import every_block
from regraft.train.teacher import Teacher
from tiny import save_tiny, targets, write_rows

FAST: dict[str, Any] = {"device": "cpu", "per_device_train_batch_size": 8, "logging_steps": 1}


def test_batches_of_t5(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "t5", "t5")
    whole = regraft.load(folder)
    found = batches_for(whole, folder, targets()[0])
    assert (found.kind, found.has_loss) == ("text to text", True)
    batch = found.collate([{"text": "w1 w2 w3", "target": "w4"}, {"text": "w1", "target": "w5 w6"}], [0, 0])
    assert batch["input_ids"].shape == (2, 3)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (2, 2)
    assert (batch["labels"] == -100).tolist() == [[False, True], [False, False]]
    assert batch["decoder_input_ids"][:, 0].tolist() == [whole.config.decoder_start_token_id] * 2
    assert torch.equal(batch["decoder_input_ids"][1, 1:], batch["labels"][1, :-1])
    plain = {name: value for name, value in batch.items() if not name.startswith("decoder")}
    with torch.no_grad():
        assert torch.allclose(whole(**batch).loss, whole(**plain).loss, atol=1e-6)
    blind = batches_for(whole, folder, {"text": "w1"}, labels=False)
    assert "labels" not in blind.collate([{"text": "w1 w2"}], [0])
    assert not blind.has_loss


def test_t5_learns_to_write(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "t5", "t5")
    data = write_rows(tmp_path / "data.jsonl", targets())
    made = fine_tune(folder, data=data, folder=tmp_path / "a", max_steps=20, learning_rate=1e-2, **FAST)
    history = made.diagnostics["training"]["history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


@pytest.mark.parametrize("labelled", [True, False])
def test_t5_learns_from_t5(labelled: bool, tmp_path: Path) -> None:
    teacher, student = save_tiny(tmp_path / "t", "t5"), save_tiny(tmp_path / "s", "t5", seed=1)
    rows = targets() if labelled else [{"text": row["text"]} for row in targets()]
    data = write_rows(tmp_path / "data.jsonl", rows)
    options: dict[str, Any] = {"max_steps": 20, "learning_rate": 5e-3, "feature_weight": 0.1} | FAST
    found = []
    for cache in (False, True):
        made = distil(
            student, teacher=teacher, data=data, folder=tmp_path / f"a{cache}", cache_teacher=cache,
            task_weight=0.5 if labelled else 0.0, **options,
        )  # fmt: skip
        found.append([h["loss"] for h in made.diagnostics["training"]["history"]])
    assert found[0][-1] < 0.8 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_cache_tells_what_the_decoder_reads_apart(tmp_path: Path) -> None:
    """Encoder and decoder read as many tokens as each other here, of which not the same ones are padding."""
    whole = model("t5")
    mask, other = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids = torch.arange(8).reshape(2, 4) + 5
    batch = {
        "input_ids": ids * mask, "attention_mask": mask,
        "decoder_input_ids": ids.flip(0) * other, "decoder_attention_mask": other,
    }  # fmt: skip
    signals = every_block(whole)
    plain = Teacher(whole, signals)(batch)
    teacher = Teacher(whole, signals, cache=FeatureCache(tmp_path, "t5"))
    teacher(batch)
    again = teacher(batch)
    assert teacher.passes == 1
    assert torch.equal(again.logits[other.bool()], plain.logits[other.bool()])
    for signal in signals:
        real = (mask if signal.stack == "encoder" else other).bool()
        assert torch.equal(again[signal][real], plain[signal][real])
    changed = {**batch, "decoder_input_ids": batch["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][0, 3] = 50  # where the encoder's text is padded
    teacher(changed)
    assert teacher.passes == 2
