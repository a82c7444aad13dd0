"""Tokenizers of several models in one: numbers, cuts and texts, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as hf
from tokenizers import AddedToken, Tokenizer
from tokenizers import models as kinds

from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.sidecars import copy_sidecars
from regraft.errors import UserError
from regraft.inspect.vocabulary import TokenTable, token_table, united
from vocabularies import CODE, KINDS, PLAIN, bpe, save, unigram, wordpiece


def table(tokenizer: Tokenizer) -> TokenTable:
    return token_table(tokenizer.to_str(), where="here")


def pair(kind: str) -> tuple[Tokenizer, Tokenizer]:
    """Two tokenizers of a kind, the second with other words and two added tokens."""
    first, second = KINDS[kind](PLAIN), KINDS[kind](PLAIN + CODE, 340 if kind == "bpe" else 90)
    first.add_special_tokens(["<|mine|>"])
    second.add_special_tokens(["<|x|>"])
    second.add_tokens([AddedToken("tool_call", normalized=False)])
    return first, second


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_keeps_its_numbers_and_the_rest_follows_in_order(kind: str) -> None:
    first, second = map(table, pair(kind))
    both = united(first, [second], {"<|new|>": AddedToken("<|new|>")}, where="here")
    assert {t: both.ids[t] for t in first.ids} == first.ids
    assert both.ids.keys() == first.ids.keys() | second.ids.keys() | {"<|new|>"}
    assert sorted(both.ids.values()) == list(range(both.size))
    new = sorted((t for t in both.ids if t not in first.ids), key=both.ids.__getitem__)
    ordinary = [t for t in new if t not in second.added and t != "<|new|>"]
    assert new == [*sorted(ordinary, key=second.ids.__getitem__), "<|x|>", "tool_call", "<|new|>"]
    assert list(both.added) == [*first.added, "<|x|>", "tool_call", "<|new|>"]
    assert [both.added[t].special for t in new[-3:]] == [True, False, False]
    assert united(first, [second, second], {}, where="here").ids == united(first, [second], {}, where="here").ids


CLASSES = {
    "bpe": ("GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"),
    "unigram": ("T5Tokenizer", "LlamaTokenizerFast", "XLMRobertaTokenizer", "PreTrainedTokenizerFast"),
    "wordpiece": ("BertTokenizer", "DistilBertTokenizerFast", "PreTrainedTokenizerFast"),
}


@pytest.mark.parametrize("older", [True, False])  # files as transformers 4 wrote them, and as 5 does
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CLASSES.items() for name in names])
def test_transformers_reads_the_same_numbers_and_texts(kind: str, name: str, older: bool, tmp_path: Path) -> None:
    first, second = pair(kind)
    model = save(tmp_path / "model", first)
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": name}
    if older:
        settings = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        decoder = first.get_added_tokens_decoder().items()
        config["added_tokens_decoder"] = {str(i): {s: getattr(t, s) for s in settings} for i, t in decoder}
        (model / "vocab.txt").write_text("stale\n")
    path.write_text(json.dumps(config))
    both = united(table(first), [table(second)], {}, where="here")
    out = tmp_path / "out"
    out.mkdir()
    opened = open_checkpoint(str(model))
    copy_sidecars(
        out,
        config_from=opened,
        tokenizer_from=opened,
        config_changes={},
        dtype="float32",
        tokenizer_json=both.content,
    )
    assert not (out / "vocab.txt").exists()
    before, after = hf.AutoTokenizer.from_pretrained(model), hf.AutoTokenizer.from_pretrained(out)
    numbers = after.get_vocab()
    assert {token: numbers.get(token) for token in both.ids} == both.ids
    for text in PLAIN:
        assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])
        if kind != "wordpiece":
            assert after(text)["input_ids"] == before(text)["input_ids"]
    for token in ("<|x|>", "tool_call"):
        assert both.ids[token] in after(f"a {token} b")["input_ids"]
    assert {t.content for t in after.added_tokens_decoder.values()} >= set(both.added)
    assert after.eos_token == before.eos_token


def test_texts_with_characters_that_the_first_did_not_know_come_back_whole() -> None:
    text = CODE[0]
    known, more = Tokenizer.from_str(table(unigram(PLAIN)).content), unigram(PLAIN + CODE, 90)
    both = Tokenizer.from_str(united(table(known), [table(more)], {}, where="here").content)
    assert known.decode(known.encode(text).ids) != text
    assert both.decode(both.encode(text).ids) == text


def test_kinds_are_told_apart() -> None:
    found = [table(make(PLAIN)).kind for make in (bpe, unigram, wordpiece)]
    assert found == ["BPE of bytes", "Unigram with ▁ for spaces", "WordPiece"]
    llama = Tokenizer(kinds.BPE({"<unk>": 0, "▁": 1}, []))
    text = llama.to_str().replace(
        '"normalizer":null', '"normalizer":{"type":"Replace","pattern":{"String":" "},"content":"▁"}'
    )
    assert token_table(text, where="").kind == "BPE with ▁ for spaces"


@pytest.mark.parametrize("text", ["", "{}", "[1]", "version https://git-lfs.github.com/spec/v1"])
def test_files_that_are_no_tokenizer_are_told(text: str) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read.*AutoTokenizer") as caught:
        token_table(text, where="x")
    assert caught.value.code == "RG210"
