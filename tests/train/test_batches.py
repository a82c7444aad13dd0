"""What examples become for each kind of model, and that what is drawn belongs to the example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

import regraft
from models import model
from regraft.errors import UserError
from regraft.train.batches import DataOptions, batches_for, masked_tokens
from regraft.train.data import open_data
from regraft.train.vocabulary import same_tokens
from tiny import add_tokenizer, pairs, pictures, rows_for, save_tiny, texts, write_rows


@given(st.integers(1, 60), st.integers(0, 10**9), st.floats(0.05, 0.9))
def test_masking(length: int, seed: int, probability: float) -> None:
    ids = torch.arange(length) + 10
    open_to = torch.arange(length) % 3 != 0
    found, labels = masked_tokens(ids, open_to, probability, 1, 200, seed)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert not (chosen & ~open_to).any()
    assert chosen.any() == open_to.any()
    assert torch.equal(found[~chosen], ids[~chosen])
    again = masked_tokens(ids, open_to, probability, 1, 200, seed)
    assert torch.equal(again[0], found)


def test_shares_of_masking() -> None:
    ids = torch.full((40_000,), 7)
    found, labels = masked_tokens(ids, torch.ones(40_000, dtype=torch.bool), 0.15, 1, 1000, 3)
    chosen = labels != -100
    assert float(chosen.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((found[chosen] == 1).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((found[chosen] == 7).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_a_text_is_masked_alike_in_any_batch(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")
    collate = batches_for(regraft.load(folder), folder, texts()[0]).collate
    rows = texts(6)
    whole = collate(rows, [11, 12, 13, 14, 15, 16])
    part = collate(rows[2:4], [13, 14])
    width = part["input_ids"].shape[1]
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(whole[name][2:4, :width], part[name])
    assert (part["labels"] != -100).any(1).all()
    assert not (part["labels"][part["attention_mask"] == 0] != -100).any()


def test_kinds(tmp_path: Path) -> None:
    for family, kind, has_loss in (
        ("bert", "masked", True), ("gpt2", "causal", True), ("vit", "image classes", True), ("clip", "pairs", True),
    ):  # fmt: skip
        folder = save_tiny(tmp_path / family, family)
        rows = rows_for(family)
        whole = regraft.load(folder)
        found = batches_for(whole, folder, rows[0])
        assert (found.kind, found.has_loss) == (kind, has_loss)
        assert torch.isfinite(whole(**found.collate(rows[:3], [0, 1, 2])).loss)
        plain = batches_for(whole, folder, rows[0], labels=False)
        assert not plain.has_loss
        assert not {"labels", "return_loss"} & plain.collate(rows[:2], [0, 1]).keys()
    unlabelled = {"pixel_values": pictures()[0]["pixel_values"]}
    found = batches_for(regraft.load(tmp_path / "vit"), tmp_path / "vit", unlabelled)
    assert (found.kind, found.has_loss) == ("images", False)


def test_causal_labels_leave_padding_out(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    batch = batches_for(regraft.load(folder), folder, texts()[0]).collate(texts(3), [0, 0, 0])
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


def classifier(folder: Path, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.BertConfig(vocab_size=96, **sizes, **changes)
    hf.BertForSequenceClassification(config).save_pretrained(folder)
    add_tokenizer(folder)
    return regraft.load(folder)


def test_classes_by_name_by_number_and_in_pairs(tmp_path: Path) -> None:
    whole = classifier(tmp_path, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    rows = [{"text": "w1 w2", "label": "dog"}, {"text": "w3", "label": 0}]
    collate = batches_for(whole, tmp_path, rows[0]).collate
    assert collate(rows, [0, 0])["labels"].tolist() == [1, 0]
    with pytest.raises(UserError, match=r"no label 'dogs' .*did you mean 'dog'"):
        collate([{"text": "w1", "label": "dogs"}], [0])
    with pytest.raises(UserError, match=r"no label 2 .*from 0 to 1"):
        collate([{"text": "w1", "label": 2}], [0])
    two = batches_for(whole, tmp_path, {"a": "w1", "b": "w2"}, DataOptions(text="a", text_pair="b"))
    assert two.kind == "texts"
    ids = two.collate([{"a": "w1", "b": "w2"}, {"a": "w1 w1", "b": "w2"}], [0, 0])["input_ids"]
    assert ids.shape == (2, 3)


def test_regression(tmp_path: Path) -> None:
    whole = classifier(tmp_path, num_labels=1)
    batch = batches_for(whole, tmp_path, {"text": "w1", "label": 0.5}).collate([{"text": "w1", "label": 0.5}], [0])
    assert batch["labels"].tolist() == [0.5]
    assert torch.isfinite(whole(**batch).loss)


def test_lengths(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    whole = regraft.load(folder)
    long = [{"text": "w1 " * 200}]
    assert batches_for(whole, folder, long[0]).collate(long, [0])["input_ids"].shape == (1, 64)
    cut = batches_for(whole, folder, long[0], DataOptions(max_length=5)).collate(long, [0])
    assert cut["input_ids"].shape == (1, 5)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert")
    with pytest.raises(UserError, match="there is no column 'text'"):
        batches_for(regraft.load(folder), folder, {"words": "w1"})
    with pytest.raises(UserError, match="no column 'image'"):
        batches_for(model("vit"), folder, {"label": 1})
    with pytest.raises(UserError, match="no column 'image'"):
        batches_for(model("clip"), folder, {"text": "w1"})
    bare = tmp_path / "bare"
    model("bert").save_pretrained(bare)
    with pytest.raises(UserError, match="folder has no tokenizer"):
        batches_for(regraft.load(bare), bare, {"text": "w1"})


def test_data_of_every_kind(tmp_path: Path) -> None:
    rows = texts(5)
    jsonl = write_rows(tmp_path / "rows.jsonl", rows)
    assert list(open_data(jsonl)) == rows
    assert len(open_data(jsonl, limit=2)) == 2
    stream = open_data(jsonl, stream=True)
    assert not hasattr(stream, "__len__")
    assert list(stream) == list(stream) == rows
    (tmp_path / "lines.txt").write_text("one\n\ntwo words\n", encoding="utf-8")
    assert [r["text"] for r in open_data(tmp_path / "lines.txt")] == ["one", "two words"]
    import datasets

    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    assert [dict(r) for r in open_data(tmp_path / "rows.parquet")] == rows
    table.save_to_disk(tmp_path / "disk")
    assert open_data(tmp_path / "disk")[3] == rows[3]
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "images" / name / "a.png")
    assert [r["label"] for r in open_data(tmp_path / "images")] == ["cat", "dog"]
    with pytest.raises(UserError, match="the data does not exist"):
        open_data(tmp_path / "nothing.jsonl")
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="the data cannot be read"):
        open_data(tmp_path / "broken.parquet")


def test_vocabularies_are_compared(tmp_path: Path) -> None:
    one, two = save_tiny(tmp_path / "one", "bert"), save_tiny(tmp_path / "two", "gpt2")
    same_tokens(one, two)
    same_tokens(one, save_tiny(tmp_path / "vit", "vit"))
    from farm_tools import write_tokenizer

    write_tokenizer(two, seed=1)
    with pytest.raises(UserError, match="different vocabularies") as caught:
        same_tokens(one, two)
    assert caught.value.code == "RG204"


def test_pairs_need_both(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "clip", "clip")
    batch = batches_for(regraft.load(folder), folder, pairs(2)[0]).collate(pairs(2), [0, 0])
    assert batch["return_loss"] is True
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
