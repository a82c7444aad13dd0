"""Teachers stay as they are, and what they said comes back from the disk as they said it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import model
from regraft.axes.module_map import modules_of
from regraft.errors import UserError
from regraft.train.feature_cache import FeatureCache
from regraft.train.tap import Signal, every_block, look
from regraft.train.teacher import Teacher

IDS = torch.arange(12).reshape(3, 4) + 5
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
BATCH = {"input_ids": IDS.masked_fill(MASK == 0, 0), "attention_mask": MASK, "labels": IDS}


@pytest.mark.parametrize("family", ["llama", "t5", "clip", "gpt2"])
def test_what_comes_into_a_block_is_what_left_the_one_before(family: str) -> None:
    whole = model(family)
    stacks = modules_of(whole).blocks
    signals = [Signal(kind, s, b) for s in stacks for kind, b in (("block", 0), ("block_input", 1), ("block_input", 0))]
    batch = {"input_ids": IDS, "decoder_input_ids": IDS, "pixel_values": torch.rand(3, 3, 8, 8)}
    seen = look(whole, batch, signals)
    for stack in stacks:
        assert torch.equal(seen[Signal("block", stack, 0)], seen[Signal("block_input", stack, 1)])
        assert not torch.equal(seen[Signal("block", stack, 0)], seen[Signal("block_input", stack, 0)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in whole.modules())


def test_a_teacher_has_no_dropout_no_gradient_and_sees_no_labels() -> None:
    whole = model("bert", hidden_dropout_prob=0.5).train()
    teacher = Teacher(whole, every_block(whole))
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())
    one, two = teacher(BATCH), teacher(BATCH)
    assert torch.equal(one.logits, two.logits)
    assert not one.logits.requires_grad
    expected = look(whole, {k: v for k, v in BATCH.items() if k != "labels"}, every_block(whole))
    for signal in every_block(whole):
        assert torch.equal(one[signal], expected[signal])


def test_the_cache_gives_back_what_was_said(tmp_path: Path) -> None:
    whole = model("bert")
    plain = Teacher(whole, every_block(whole))(BATCH)
    teacher = Teacher(whole, every_block(whole), cache=FeatureCache(tmp_path, "bert"))
    teacher(BATCH)
    assert teacher.passes == 1
    # Other neighbours, another order, more padding, another process: the same examples.
    order = [2, 0]
    wider = {name: torch.nn.functional.pad(value[order], (0, 2)) for name, value in BATCH.items()}
    again = Teacher(whole, every_block(whole), cache=FeatureCache(tmp_path, "bert"))
    found = again(wider)
    assert again.passes == 0
    valid = MASK[order].bool()
    assert torch.equal(found.logits[:, :4][valid], plain.logits[order][valid])
    for signal in every_block(whole):
        assert found[signal].shape == (2, 6, 32)
        assert torch.equal(found[signal][:, :4][valid], plain[signal][order][valid])
    other = Teacher(whole, every_block(whole), cache=FeatureCache(tmp_path, "another model"))
    other(BATCH)
    assert other.passes == 1


def test_images_are_cached_whole(tmp_path: Path) -> None:
    whole = model("vit")
    pixels = {"pixel_values": torch.rand(3, 1, 8, 8)}
    cache = FeatureCache(tmp_path, "vit")
    teacher = Teacher(whole, [Signal("block")], cache=cache)
    first, second = teacher(pixels), teacher(pixels)
    assert teacher.passes == 1
    assert len(cache) == 3
    assert torch.equal(first[Signal("block")], second[Signal("block")])
    assert torch.equal(first.logits, second.logits)


def test_a_cache_whose_process_died_is_used_up_to_there(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "m")
    cache.write("a", {"x": torch.arange(6).float()})
    cache.write("b", {"x": torch.arange(3).float()})
    index = tmp_path / "features.jsonl"
    index.write_text(index.read_text()[:-9])
    again = FeatureCache(tmp_path, "m")
    assert len(again) == 1
    assert again.read("b") is None
    again.write("c", {"x": torch.ones(2), "y": torch.tensor([True])})
    third = FeatureCache(tmp_path, "m")
    found = third.read("c")
    assert found is not None
    assert found["x"].tolist() == [1, 1]
    assert found["y"].tolist() == [True]
    kept = third.read("a")
    assert kept is not None
    assert kept["x"].tolist() == list(range(6))
    half = FeatureCache(tmp_path / "half", "m", dtype=torch.float16)
    half.write("a", {"x": torch.tensor([0.1])})
    stored = half.read("a")
    assert stored is not None
    assert stored["x"].dtype == torch.float16


def test_a_cache_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the cache of features cannot be used") as caught:
        FeatureCache(tmp_path / "file", "m")
    assert caught.value.code == "RG405"


def test_signals_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match="there is no block 5 in the stack ''; the model has 2 in its stack"):
        look(model("bert"), BATCH, [Signal("block", "", 5)])
