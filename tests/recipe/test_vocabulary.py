"""Merges of models whose vocabularies differ: every row, the files of the result, and what is told before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from farm_tools import edit_config
from models import save_fine_tune
from regraft.checkpoint.lineage import Lineage
from regraft.checkpoint.writer import ModelWriter
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import merge, run
from regraft.recipe.settings import Settings
from regraft.recipe.vocabulary_report import sentences
from vocabularies import CODE, KINDS, PLAIN, bpe, save, tokens_of, unigram

MODELS = "models: {base: ./base, chat: ./chat, code: ./code}\n"
CHAT = ("<|im_start|>", "<|im_end|>")
WEIGHTS = {"base": 0.5, "chat": 0.3, "code": 0.2}
LINEAR = "merge: linear, base: base, models: {base: {weight: 0.5}, chat: {weight: 0.3}, code: {weight: 0.2}}"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def world(folder: Path, kind: str = "bpe", *, tied: bool = False, padding: int = 0, family: str = "llama") -> Path:
    """A base, a model with two tokens more, and one with another vocabulary and an added token."""
    first, other = KINDS[kind](PLAIN), KINDS[kind](PLAIN + CODE, 320 if kind == "bpe" else 90)
    shared: dict[str, Any] = {"family": family, "tie_word_embeddings": tied}
    save(folder / "base", first, padding=padding, **shared)
    save(folder / "chat", first, seed=1, special=CHAT, **shared)
    save(folder / "code", other, seed=2, special=["<|c|>"], padding=2, **shared)
    return folder


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("llamas"), padding=3)


def made(folder: Path, out: Path, tokenizer: str, *, body: str = LINEAR, settings: Settings | None = None) -> Path:
    return merge(recipe(folder, tokenizer, body=body), out, settings or Settings(force=True))


def recipe(folder: Path, tokenizer: str, *, body: str = LINEAR) -> Any:
    text = f"{MODELS}steps:\n  x: {{{body}, tokenizer: {tokenizer}}}\n"
    return parse_recipe(text, path=folder / "recipe.yaml")


class ByHand:
    """The rows that a merge should have, found token by token from the files alone."""

    def __init__(self, folder: Path, tensor: str = EMBEDDING, **chosen: Callable[[ByHand], torch.Tensor]) -> None:
        self.ids = {name: tokens_of(folder / name) for name in WEIGHTS}
        self.rows = {name: load_file(folder / name / "model.safetensors")[tensor].double() for name in WEIGHTS}
        self.chosen = chosen

    def own(self, model: str, token: str) -> torch.Tensor:
        return self.rows[model][self.ids[model][token]]

    def default(self, token: str, base: bool) -> torch.Tensor:
        """mergekit's rule."""
        owners = [name for name in WEIGHTS if token in self.ids[name]]
        if not owners:
            return torch.zeros_like(self.rows["base"][0])
        if base and "base" in owners:
            owners = ["base"]
        return torch.stack([self.own(name, token) for name in owners]).mean(0)

    def merged(self, token: str, *, base: bool = True, default: torch.Tensor | None = None, force: bool = False) -> Any:
        """The weighted mean of the models' rows of a token."""
        filled = self.default(token, base) if default is None else default
        found = [filled if force or token not in self.ids[n] else self.own(n, token) for n in WEIGHTS]
        return sum(w * row for w, row in zip(WEIGHTS.values(), found, strict=True))


def check(
    out: Path, hand: ByHand, tensor: str = EMBEDDING, special: Mapping[str, Any] | None = None, **how: Any
) -> None:
    """Every token of the result has the row that was found by hand; `special`: other arguments for some tokens."""
    rows = load_file(out / "model.safetensors")[tensor].double()
    for token, number in tokens_of(out).items():
        wanted = hand.merged(token, **{**how, **(special or {}).get(token, {})})
        torch.testing.assert_close(rows[number], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_union_are_those_found_by_hand(kind: str, tied: bool, tmp_path: Path) -> None:
    world(tmp_path, kind, tied=tied)
    out = made(tmp_path, tmp_path / "out", "union")
    everything = set().union(*(tokens_of(tmp_path / name) for name in WEIGHTS))
    assert set(tokens_of(out)) == everything
    for tensor in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        check(out, ByHand(tmp_path, tensor), tensor)
    assert (HEAD in load_file(out / "model.safetensors")) is not tied
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(everything)


@pytest.mark.parametrize("kind", KINDS)
def test_the_union_loads_writes_and_reads(kind: str, tmp_path: Path) -> None:
    world(tmp_path, kind)
    out = made(tmp_path, tmp_path / "out", "union")
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(out), hf.AutoTokenizer.from_pretrained(out)
    source = hf.AutoTokenizer.from_pretrained(tmp_path / "base")
    for text in PLAIN:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == source.decode(source(text)["input_ids"])
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    given = tokenizer("<|im_start|>the quick<|im_end|>", return_tensors="pt")
    assert {tokens_of(out)[token] for token in CHAT} <= set(given["input_ids"][0].tolist())
    assert model.generate(**given, max_new_tokens=3, do_sample=False).shape[1] > given["input_ids"].shape[1]


@pytest.mark.parametrize("source", ["base", "chat", "code"])
def test_the_tokenizer_of_a_model_comes_byte_for_byte(source: str, llamas: Path, tmp_path: Path) -> None:
    out = made(llamas, tmp_path / "out", source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (llamas / source / name).read_bytes()
    check(out, ByHand(llamas))
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    mine = json.loads((llamas / source / "config.json").read_text())
    for key in ("vocab_size", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, key) == mine[key]
    assert model.generation_config.eos_token_id == mine["eos_token_id"]
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    model.generate(**tokenizer("the quick", return_tensors="pt"), max_new_tokens=2)


def test_padding_stays_with_each_models_own_rows_or_those_of_the_tokenizers_model(llamas: Path, tmp_path: Path) -> None:
    rows = load_file(made(llamas, tmp_path / "out", "base") / "model.safetensors")[EMBEDDING].double()
    hand = ByHand(llamas)
    assert len(rows) == len(hand.ids["base"]) + 3
    for number in range(len(hand.ids["base"]), len(rows)):
        own = [
            hand.rows[name][number]
            if len(hand.ids[name]) <= number < len(hand.rows[name])
            else hand.rows["base"][number]
            for name in WEIGHTS
        ]
        wanted = sum(w * row for w, row in zip(WEIGHTS.values(), own, strict=True))
        torch.testing.assert_close(rows[number], wanted, rtol=1e-5, atol=1e-6)


def test_padding_to_a_multiple_is_the_mean_of_all_tokens(llamas: Path, tmp_path: Path) -> None:
    out = made(llamas, tmp_path / "out", "{source: union, pad_to_multiple_of: 64}")
    rows = load_file(out / "model.safetensors")[EMBEDDING].double()
    tokens = len(tokens_of(out))
    assert len(rows) == -(-tokens // 64) * 64 > tokens
    for row in rows[tokens:]:
        torch.testing.assert_close(row, rows[:tokens].mean(0), rtol=1e-5, atol=1e-6)
    check(out, ByHand(llamas))


def test_the_recipe_chooses_rows_token_by_token(llamas: Path, tmp_path: Path) -> None:
    chosen = {
        "<|im_start|>": "{source: chat, force: true}",
        "<|im_end|>": "{source: {kind: zero}}",
        "<|c|>": '{source: {kind: model_token, model: base, token: "<s>"}, force: true}',
        "<|new|>": "{source: {kind: model_token, model: code, token_id: 7}}",
        "the": "{source: {kind: zero}, force: true}",
    }
    tokens = ", ".join(f'"{token}": {source}' for token, source in chosen.items())
    out = made(llamas, tmp_path / "out", f"{{source: base, tokens: {{{tokens}}}}}")
    hand = ByHand(llamas)
    zero = torch.zeros_like(hand.rows["base"][0])
    special = {
        "<|im_start|>": {"default": hand.own("chat", "<|im_start|>"), "force": True},
        "<|im_end|>": {"default": zero},
        "<|c|>": {"default": hand.own("base", "<s>"), "force": True},
        "<|new|>": {"default": hand.rows["code"][7]},
        "the": {"default": zero, "force": True},
    }
    assert set(tokens_of(out)) == set(hand.ids["base"]) | set(chosen)
    check(out, hand, special=special)
    settings = Tokenizer.from_file(str(out / "tokenizer.json")).get_added_tokens_decoder()
    assert {t.content: t.special for t in settings.values()}["<|im_start|>"] is True  # as the model has it


def test_without_a_base_the_mean_of_the_owners_is_taken(llamas: Path, tmp_path: Path) -> None:
    body = "merge: linear, models: {chat: {weight: 0.3}, code: {weight: 0.2}, base: {weight: 0.5}}"
    out = made(llamas, tmp_path / "out", "union", body=body)
    check(out, ByHand(llamas), base=False)
    assert any(len([n for n in WEIGHTS if t in ByHand(llamas).ids[n]]) == 2 for t in tokens_of(out))


def test_task_vectors_of_a_token_that_the_base_lacks_are_taken_from_its_owner(llamas: Path, tmp_path: Path) -> None:
    out = made(
        llamas, tmp_path / "out", "union", body="merge: task_arithmetic, base: base, models: [chat, code], weight: 0.5"
    )
    hand, rows = ByHand(llamas), load_file(out / "model.safetensors")[EMBEDDING].double()
    for token, number in tokens_of(out).items():
        base = hand.default(token, base=True)
        others = [hand.own(n, token) if token in hand.ids[n] else base for n in ("chat", "code")]
        torch.testing.assert_close(rows[number], base + 0.5 * sum(o - base for o in others), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "t5"])
def test_other_families_have_their_vocabulary_elsewhere(family: str, tmp_path: Path) -> None:
    first, other = bpe(PLAIN), bpe(PLAIN + CODE, 320)
    shared: dict[str, Any] = {"family": family, "pad_token_id": 0}
    save(tmp_path / "base", first, **shared)
    save(tmp_path / "chat", first, seed=1, special=CHAT, **shared)
    save(tmp_path / "code", other, seed=2, **shared)
    out = made(tmp_path, tmp_path / "out", "union")
    kind = getattr(hf, json.loads((out / "config.json").read_text())["architectures"][0])
    parts = {name: kind.from_pretrained(tmp_path / name) for name in WEIGHTS}
    whole, info = kind.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    number = tokens_of(out)["<|im_end|>"]
    chat = parts["chat"].get_output_embeddings()
    assert torch.allclose(whole.get_output_embeddings().weight[number], chat.weight[-1], atol=1e-6)
    if chat.bias is not None:
        assert torch.allclose(whole.get_output_embeddings().bias[number], chat.bias[-1], atol=1e-6)


def test_chunks_and_workers_do_not_matter(llamas: Path, tmp_path: Path) -> None:
    tokenizer = "{source: union, pad_to_multiple_of: 64}"
    body = "merge: ties, base: base, models: [chat, code], density: 0.4, trim_scope: tensor"
    small = made(llamas, tmp_path / "a", tokenizer, body=body, settings=Settings(force=True, workers=1, chunk=1 << 14))
    large = made(llamas, tmp_path / "b", tokenizer, body=body, settings=Settings(force=True, workers=3, chunk=1 << 20))
    assert (small / "model.safetensors").read_bytes() == (large / "model.safetensors").read_bytes()


def test_excluded_and_stacked_tensors_have_the_new_rows_too(llamas: Path, tmp_path: Path) -> None:
    hand = ByHand(llamas)
    out = made(llamas, tmp_path / "a", "union", body=f"{LINEAR}, exclude: embed_tokens")
    rows = load_file(out / "model.safetensors")[EMBEDDING].double()
    for token, number in tokens_of(out).items():
        wanted = hand.own("base", token) if token in hand.ids["base"] else hand.default(token, base=True)
        assert torch.equal(rows[number], wanted)
    slices = "[{models: [{model: chat, layers: [0, 2]}]}, {models: [{model: code, layers: [1, 2]}]}]"
    out = made(llamas, tmp_path / "b", "union", body=f"merge: passthrough, slices: {slices}")
    found, ids = load_file(out / "model.safetensors"), tokens_of(out)
    head = ByHand(llamas, HEAD)
    assert torch.equal(found[EMBEDDING][ids["<|im_end|>"]].double(), hand.own("chat", "<|im_end|>"))
    assert torch.equal(found[HEAD][ids["<|c|>"]].double(), head.own("code", "<|c|>"))
    assert torch.equal(found[HEAD][ids["<|im_end|>"]].double(), head.own("chat", "<|im_end|>"))
    assert hf.AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3


def test_models_of_one_vocabulary_merge_as_if_nothing_was_chosen(llamas: Path, tmp_path: Path) -> None:
    save_fine_tune(tmp_path / "chat", shutil.copytree(llamas / "base", tmp_path / "base"), 1)
    save_fine_tune(tmp_path / "code", tmp_path / "base", 2)
    for name in ("chat", "code"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tmp_path / "base" / file, tmp_path / name / file)
    plain = parse_recipe(f"{MODELS}steps:\n  x: {{{LINEAR}}}\n", path=tmp_path / "recipe.yaml")
    for source in ("union", "base"):
        chosen, without = make_plan(recipe(tmp_path, source)), make_plan(plain)
        assert chosen.merges[0].vocabulary is None
        assert chosen.merges[0].key == without.merges[0].key


def test_rows_of_other_dtypes(llamas: Path, tmp_path: Path) -> None:
    for name in WEIGHTS:
        shutil.copytree(llamas / name, tmp_path / name)
    path = tmp_path / "code" / "model.safetensors"
    save_file({n: t.to(torch.bfloat16) for n, t in load_file(path).items()}, path, {"format": "pt"})
    out = made(tmp_path, tmp_path / "out", "union")
    assert load_file(out / "model.safetensors")[EMBEDDING].dtype == torch.float32
    check(out, ByHand(tmp_path))


def test_special_tokens_go_with_the_tokenizer(tmp_path: Path) -> None:
    save(tmp_path / "base", bpe(PLAIN), pad_token_id=5)
    save(tmp_path / "chat", bpe(PLAIN), seed=1, special=CHAT)
    save(tmp_path / "code", bpe(PLAIN + CODE, 320), seed=2, eos_token_id=None, bos_token_id=None)
    generation = tmp_path / "base" / "generation_config.json"
    edited = json.loads(generation.read_text()) | {"eos_token_id": [2, 5], "temperature": 0.5}
    generation.write_text(json.dumps(edited))
    (tmp_path / "code" / "generation_config.json").unlink()
    word = next(token for token, number in tokens_of(tmp_path / "base").items() if number == 5)
    out = made(tmp_path, tmp_path / "out", "code")
    config, written = (json.loads((out / f).read_text()) for f in ("config.json", "generation_config.json"))
    ids = tokens_of(out)
    assert (config["eos_token_id"], config["pad_token_id"]) == (ids["</s>"], ids.get(word))
    assert written["eos_token_id"] == [ids[t] for t in ("</s>", word) if t in ids]
    assert written["temperature"] == 0.5
    out = made(tmp_path, tmp_path / "other", "chat")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == tokens_of(out)["<|im_end|>"]


def test_the_plan_and_the_lineage_tell_what_becomes_of_the_tokens(llamas: Path, tmp_path: Path) -> None:
    planned = make_plan(
        recipe(llamas, '{source: chat, tokens: {"<|new|>": {source: {kind: zero}}}}'), Settings(force=True)
    )
    (step,) = planned.to_dict()["steps"]
    told, ids = step["vocabulary"], {name: tokens_of(llamas / name) for name in WEIGHTS}
    assert (told["source"], told["tokenizer_of"], told["tokens"]) == ("chat", "chat", len(ids["chat"]) + 1)
    assert told["invented"] == {"count": 1, "examples": ["<|new|>"]}
    assert told["models"]["base"]["same_row"] == len(ids["base"])
    assert told["models"]["base"]["filled"]["models"] == {"chat": {"count": 2, "examples": list(CHAT)}}
    assert told["models"]["base"]["filled"]["zeros"] == {"count": 1, "examples": ["<|new|>"]}
    dropped = set(ids["code"]) - set(ids["chat"])
    assert told["models"]["code"]["dropped"]["count"] == len(dropped)
    moved = {t for t in ids["code"] if t in ids["chat"] and ids["code"][t] != ids["chat"][t]}
    assert told["models"]["code"]["moved"]["count"] == len(moved) > 5
    assert len(told["models"]["code"]["moved"]["examples"]) == 5
    assert set(told["models"]["code"]["moved"]["examples"]) <= moved
    lines = sentences(told)
    assert lines[0] == f"vocabulary of chat: {len(ids['chat']) + 1:,} tokens; 1 ('<|new|>') in no model"
    assert lines[1].startswith(f"base: {len(ids['base'])} tokens stay in their rows; 2 ('<|im_start|>', '<|im_end|>')")
    assert any("tokens of code that the result does not have" in w for w in step["warnings"])
    assert any("no model has a row for 1 ('<|new|>')" in w for w in step["warnings"])
    out = made(llamas, tmp_path / "out", "union")
    lineage = Lineage.read(out)
    assert lineage.vocabulary["source"] == "union"
    assert lineage.vocabulary["models"].keys() == WEIGHTS.keys()
    assert lineage.sources["tokenizer"] == "base"


def test_what_is_chosen_is_part_of_the_key(llamas: Path, tmp_path: Path) -> None:
    choices = [
        "union",
        "base",
        "chat",
        "{source: union, pad_to_multiple_of: 64}",
        '{source: union, tokens: {"<|im_end|>": {source: {kind: zero}}}}',
        '{source: union, tokens: {"<|im_end|>": {source: {kind: zero}, force: true}}}',
        '{source: union, tokens: {"<|im_end|>": {source: {kind: model_token, model: code, token_id: 7}}}}',
    ]
    keys = [make_plan(recipe(llamas, c)).merges[0].key for c in choices]
    assert len(set(keys)) == len(keys)
    assert keys == [make_plan(recipe(llamas, c)).merges[0].key for c in choices]
    first = run(recipe(llamas, "union"), tmp_path / "out").artefacts["x"]
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert run(recipe(llamas, "union"), tmp_path / "out").artefacts["x"] == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert run(recipe(llamas, "chat"), tmp_path / "out").artefacts["x"] != first


def test_a_merge_that_was_stopped_goes_on(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = "{source: union, pad_to_multiple_of: 64}"
    whole = made(llamas, tmp_path / "whole", tokenizer)
    finish, done = ModelWriter.finish, []

    def stopping(self: ModelWriter, name: str, facts: Mapping[str, Any]) -> None:
        finish(self, name, facts)
        done.append(name)
        if len(done) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ModelWriter, "finish", stopping)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            made(llamas, tmp_path / "out", tokenizer, settings=Settings(force=True, workers=1))
    done.clear()
    monkeypatch.setattr(ModelWriter, "finish", lambda *given: (done.append(given[1]), finish(*given))[1])
    out = made(llamas, tmp_path / "out", tokenizer, settings=Settings(force=True, workers=1))
    assert len(done) == len(load_file(out / "model.safetensors")) - 5
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_the_command_prints_what_becomes_of_the_tokens(llamas: Path, tmp_path: Path) -> None:
    path = llamas / "printed.yaml"
    path.write_text(f"{MODELS}steps:\n  x: {{{LINEAR}, tokenizer: union}}\n")
    printed = CliRunner().invoke(app, ["plan", str(path), "--force"])
    assert printed.exit_code == 0, printed.output
    text = " ".join(printed.output.split())
    assert "union of the vocabularies: " in text
    assert "base: 300 tokens stay in their rows; 2 ('<|im_start|>', '<|im_end|>') filled with rows of chat" in text
    as_json = CliRunner().invoke(app, ["plan", str(path), "--json"])
    told = json.loads(as_json.stdout)["steps"][0]["vocabulary"]
    assert told["models"]["chat"]["moved"]["count"] == 2


def test_a_later_step_plans_with_the_united_vocabulary(llamas: Path, tmp_path: Path) -> None:
    text = (
        f"{MODELS}steps:\n  x: {{{LINEAR}, tokenizer: union}}\n"
        "  y: {merge: linear, models: [x, chat], tokenizer: {source: x}}\n"
    )
    out = merge(parse_recipe(text, path=llamas / "recipe.yaml"), tmp_path / "out")
    step = tmp_path / "out.steps" / "artefacts"
    (first,) = (p for p in step.iterdir() if p.is_dir())
    assert tokens_of(out) == tokens_of(first)
    rows = {
        n: load_file(p / "model.safetensors")[EMBEDDING]
        for n, p in (("x", first), ("chat", llamas / "chat"), ("y", out))
    }
    number = tokens_of(out)["<|im_end|>"]
    wanted = (rows["x"][number] + rows["chat"][tokens_of(llamas / "chat")["<|im_end|>"]]) / 2
    torch.testing.assert_close(rows["y"][number], wanted)


def test_mergekits_words_mean_the_same(llamas: Path, tmp_path: Path) -> None:
    models = ", ".join(f"{{model: ./{n}, parameters: {{weight: {w}}}}}" for n, w in WEIGHTS.items())
    text = f"merge_method: linear\nbase_model: ./base\nmodels: [{models}]\n"
    for line in ("tokenizer_source: union", "tokenizer: {pad_to_multiple_of: 8}"):
        theirs = parse_recipe(f"{text}{line}\n", path=llamas / "mergekit.yaml")
        out = merge(theirs, tmp_path / line[:12], Settings(force=True))
        check(out, ByHand(llamas))
    own = made(llamas, tmp_path / "own", "union")
    theirs_rows = load_file(tmp_path / "tokenizer_so" / "model.safetensors")[EMBEDDING]
    assert torch.equal(theirs_rows, load_file(own / "model.safetensors")[EMBEDDING])
    named = parse_recipe(f"{text}tokenizer_source: ./code\n", path=llamas / "mergekit.yaml")
    assert make_plan(named).merges[0].vocabulary is not None


PARSED = [
    ("{tokens: {}}", "RG303", "needs 'source'"),
    ("{source: union, pad_to_multiple_of: 0}", "RG303", "from 1 to"),
    ("{source: union, multiple: 8}", "RG302", "multiple"),
    ("{source: nobody}", "RG307", "nobody"),
    ("{source: union, tokens: {x: {}}}", "RG303", "no source"),
    ("{source: union, tokens: {x: {source: base, force: 1}}}", "RG303", "true or false"),
    ("{source: union, tokens: {x: {source: {kind: zeros}}}}", "RG303", "did you mean 'zero'"),
    ("{source: union, tokens: {x: {source: {kind: zero, model: base}}}}", "RG302", "model"),
    ("{source: union, tokens: {x: {source: {kind: model_token, model: base}}}}", "RG303", "either token or token_id"),
    ("{source: union, tokens: {x: {source: {kind: model_token, model: base, token_id: -1}}}}", "RG303", "from 0"),
    ("{source: union, tokens: {x: {source: {kind: model_token, model: base, token: ''}}}}", "RG303", "a token"),
    ("union, tokenizer_from: chat", "RG303", "tokenizer and tokenizer_from"),
]
PLANNED = [
    ('{source: base, tokens: {"<|im_strt|>": {source: chat}}}', "RG310", "did you mean '<|im_start|>'"),
    ("{source: union, tokens: {x: {source: {kind: model_token, model: base, token: nowhere}}}}", "RG310", "nowhere"),
    ("{source: union, tokens: {x: {source: {kind: model_token, model: base, token_id: 303}}}}", "RG310", "has 303"),
    ("{source: union, tokens: {x: {source: stranger}}}", "RG307", "is no model of this merge"),
]


@pytest.mark.parametrize(("tokenizer", "code", "says"), PARSED)
def test_mistakes_in_the_text(tokenizer: str, code: str, says: str, llamas: Path) -> None:
    with pytest.raises(UserError) as caught:
        recipe(llamas, tokenizer)
    assert caught.value.code == code, caught.value
    assert says in str(caught.value)
    assert "recipe.yaml, line 3, step x, tokenizer" in str(caught.value)


@pytest.mark.parametrize(("tokenizer", "code", "says"), PLANNED)
def test_mistakes_that_the_models_show(tokenizer: str, code: str, says: str, llamas: Path) -> None:
    text = f"{MODELS.replace('}', ', stranger: ./base}')}steps:\n  x: {{{LINEAR}, tokenizer: {tokenizer}}}\n"
    with pytest.raises(UserError) as caught:
        make_plan(parse_recipe(text, path=llamas / "recipe.yaml"))
    assert caught.value.code == code, caught.value
    assert says in str(caught.value)
    assert "recipe.yaml, line 3, step x, tokenizer" in str(caught.value)


def test_models_that_cannot_be_united(tmp_path: Path) -> None:
    world(tmp_path)
    save(tmp_path / "chat", unigram(PLAIN), seed=1)
    obstacle(tmp_path, "union", "RG210", "kind BPE of bytes, chat one of the kind Unigram")
    warnings = make_plan(recipe(tmp_path, "base")).to_dict()["steps"][0]["warnings"]
    assert any("tokens are matched by their text" in w for w in warnings)
    (tmp_path / "chat" / "tokenizer.json").write_text("{}")
    obstacle(tmp_path, "base", "RG210", "tokenizer.json cannot be read")
    (tmp_path / "chat" / "tokenizer.json").unlink()
    obstacle(tmp_path, "base", "RG210", "chat has no tokenizer.json")


def test_models_that_contradict_themselves_or_are_not_known(tmp_path: Path) -> None:
    world(tmp_path)
    path = tmp_path / "chat" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, HEAD: weights[HEAD][:-1].clone()}, path, {"format": "pt"})
    obstacle(tmp_path, "union", "RG204", "chat has different numbers of rows")
    save_file({n: t for n, t in weights.items() if n != HEAD}, path, {"format": "pt"})
    edit_config(tmp_path / "chat", tie_word_embeddings=True)
    obstacle(tmp_path, "union", "RG209", "tied to model.embed_tokens.weight")
    for name in WEIGHTS:
        edit_config(tmp_path / name, model_type="novel")
    obstacle(tmp_path, "union", "RG208", "which tensors of novel have a row for each token")


def test_vocabularies_that_differ_are_refused_where_nothing_is_chosen(llamas: Path) -> None:
    plain = parse_recipe(f"{MODELS}steps:\n  x: {{{LINEAR}}}\n", path=llamas / "recipe.yaml")
    with pytest.raises(UserError, match=r"vocab_size is 303 in base and 302 in chat.*tokenizer: union") as caught:
        make_plan(plain)
    assert caught.value.code == "RG204"


def test_the_word_base_is_the_steps_unless_a_model_has_this_name() -> None:
    def source(names: str, body: str, of: str = "base") -> str | None:
        (step,) = parse_recipe(f"models: {{{names}}}\nsteps:\n  x: {{{body}, tokenizer: {of}}}\n").steps
        return step.vocabulary.source  # type: ignore[union-attr]

    assert source("a: ./a, b: ./b", "merge: linear, base: b, models: [a]") == "b"
    assert source("base: ./base, b: ./b", "merge: linear, base: b, models: [base]") == "base"
    assert source("a: ./a, b: ./b", "merge: linear, models: [a, b]", "union") is None
    with pytest.raises(UserError, match="the step has no base") as caught:
        source("a: ./a, b: ./b", "merge: linear, models: [a, b]")
    assert caught.value.code == "RG304"


def obstacle(folder: Path, tokenizer: str, code: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(recipe(folder, tokenizer))
    assert caught.value.code == code, caught.value
    assert says in str(caught.value)
