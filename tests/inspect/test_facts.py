"""Facts of one checkpoint: tokenizer hashes, card claims, scans, folders that cannot be opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import farm_tools
import models
from regraft.axes import layout
from regraft.checkpoint import Checkpoint, MemoryTensor, open_checkpoint
from regraft.errors import UserError
from regraft.inspect.architecture import architecture
from regraft.inspect.card import contradictions
from regraft.inspect.facts import facts, look
from regraft.inspect.obstacles import tokenizers
from regraft.inspect.tokenizer import tokenizer


def with_files(folder: Path, **config: Any) -> Checkpoint:
    """A checkpoint of the folder's files without weights."""
    files = {p.name: p for p in folder.iterdir()}
    return Checkpoint("here", folder, {}, config=config, files=files)


def test_headers_only_unless_stats_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(str(models.save_model(tmp_path / "m", "bert")))
    reads: list[str] = []
    kind = type(next(iter(opened.tensors.values())))
    original = kind.read

    def counting(self: Any, start: int = 0, stop: int | None = None) -> torch.Tensor:
        reads.append(self.name)
        return original(self, start, stop)

    monkeypatch.setattr(kind, "read", counting)
    assert facts(opened).scan is None
    assert reads == []
    seen: list[tuple[int, int]] = []
    found = facts(opened, stats=True, on_progress=lambda done, total: seen.append((done, total)))
    assert set(reads) == set(opened.tensors)
    assert seen[-1] == (opened.parameters, opened.parameters)
    assert found.scan is not None
    assert found.scan.digest == opened.full_digest()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["kind"] == "model"


def test_the_digest_is_of_the_content_and_not_of_the_file_format(tmp_path: Path) -> None:
    one = models.save_model(tmp_path / "one", "llama")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(load_file(one / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "config.json").write_text((one / "config.json").read_text())
    a, b = (look(str(p), stats=True).scan for p in (one, pickled))
    assert a is not None
    assert b is not None
    assert a.digest == b.digest


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def hash_of(folder: Path) -> str | None:
    found = tokenizer(with_files(folder))
    assert found is not None
    return found.hash


def test_the_tokenizer_hash_ignores_what_does_not_change_tokens(tmp_path: Path) -> None:
    farm_tools.write_tokenizer(tmp_path)
    before = hash_of(tmp_path)
    rewrite(tmp_path, lambda c: dict(sorted(c.items(), reverse=True)))
    assert hash_of(tmp_path) == before
    rewrite(tmp_path, lambda c: c | {"padding": {"strategy": "BatchLongest"}, "truncation": None, "version": "9"})
    assert hash_of(tmp_path) == before
    rewrite(tmp_path, lambda c: c | {"pre_tokenizer": {"type": "ByteLevel"}})
    assert hash_of(tmp_path) != before


def test_two_spellings_of_merges_are_one_tokenizer(tmp_path: Path) -> None:
    pairs = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": pairs}))
    before = hash_of(tmp_path)
    path.write_text(json.dumps({"model": pairs | {"merges": ["a b"]}}))
    assert hash_of(tmp_path) == before
    path.write_text(json.dumps({"model": pairs | {"merges": []}}))
    assert hash_of(tmp_path) != before


def test_how_tokenizers_relate(tmp_path: Path) -> None:
    made = {}
    for name, settings in {
        "one": {},
        "same": {},
        "other": {"seed": 1},
        "added": {"added": ("<tool>",)},
        "special": {},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        farm_tools.write_tokenizer(folder, **settings)
        made[name] = folder
    path = made["special"] / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": {"content": "[EOS]"}}))
    found = {name: tokenizer(with_files(folder)) for name, folder in made.items()}
    relations = {name: tokenizers(found["one"], other) for name, other in found.items()}
    assert relations == {
        "one": "same",
        "same": "same",
        "other": "different",
        "added": "other added tokens",
        "special": "other special tokens",
    }
    assert tokenizers(None, None) == "none"
    assert tokenizers(found["one"], None) == "unknown"
    assert found["added"] is not None
    assert found["added"].added == ("<tool>",)


def test_tokenizers_without_tokenizer_json_are_hashed_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    first = tokenizer(with_files(tmp_path))
    assert first is not None
    assert (first.kind, first.size) == (None, None)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nb\n")
    assert first.hash != hash_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    broken = tokenizer(with_files(tmp_path))
    assert broken is not None
    assert broken.hash is None
    assert any("line 1" in remark for remark in broken.remarks)


@pytest.mark.parametrize(
    ("body", "subjects"),
    [
        ("It has 1.1B parameters.", ["parameters"]),
        ("It has 100 million parameters.", []),
        ("It has 0,11 B parameters in all.", []),
        ("The family: 7B parameters, 100M parameters, 1B parameters.", []),
        ("Context length: 2k tokens.", []),
        ("A context window of 2,048 tokens.", []),
        ("Its sequence length is 512.", ["context length"]),
        ("```\ncontext length 512\n```", []),
        ("", []),
    ],
)
def test_claims_of_the_card_against_the_files(tmp_path: Path, body: str, subjects: list[str]) -> None:
    farm_tools.write_card(tmp_path, None, body)
    found = contradictions(with_files(tmp_path), task=None, head="none", sizes=[110_000_000, 100_000_000], context=2048)
    assert [c.subject for c in found] == subjects
    unknown = contradictions(with_files(tmp_path), task=None, head=None, sizes=[], context=None)
    assert unknown == []


def test_scans_find_every_bad_value_in_every_dtype(tmp_path: Path) -> None:
    values = torch.zeros(3, 5)
    values[1, 2], values[2, 0] = torch.nan, torch.inf
    tensors = {
        "a": values.half(),
        "b": values.bfloat16(),
        "c": values.to(torch.float8_e5m2),
        "d": torch.zeros(4, dtype=torch.float64),
        "e": torch.zeros(4, dtype=torch.int64),
        "f": torch.ones(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    scan = look(str(tmp_path), stats=True).scan
    assert scan is not None
    assert (scan.nan, scan.inf) == (3, 3)
    assert scan.damaged == {"a": 2, "b": 2, "c": 2}
    assert scan.zero == ("d",)


@pytest.mark.parametrize(
    ("classes", "head"),
    [
        (("LlamaForTokenClassification",), "token classification"),
        (("T5EncoderModel",), "none"),
        (("WhisperForAudioClassification",), "audio classification"),
        (("SomethingElse",), None),
        ((), None),
    ],
)
def test_heads_are_named_by_their_class_or_unknown(classes: tuple[str, ...], head: str | None) -> None:
    config = {"model_type": "llama", "architectures": list(classes)}
    found = architecture(Checkpoint("x", Path(), {}, config=config), layout(config, ()))
    assert found.head == head
    assert found.stacks[0].hidden is None
    assert found.vocabulary is None
    assert found.positions.theta is None


def test_older_configurations_and_scaled_rope() -> None:
    config = {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 8192,
    }
    found = architecture(Checkpoint("x", Path(), {}, config=config), layout(config, ()))
    assert found.positions.kind == "rotary"
    assert found.positions.theta == 500000.0
    assert found.positions.scaling == {"rope_type": "llama3", "factor": 8.0}
    assert (found.stacks[0].kv_heads, found.stacks[0].head_dim) == (4, 16)
    assert found.context == 8192


def test_unknown_families_have_the_facts_that_their_config_gives(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=96, **sizes))
    model.save_pretrained(tmp_path)
    found = look(str(tmp_path))
    shape = found.architecture
    assert not shape.known
    assert (shape.stacks[0].layers, shape.stacks[0].configured_layers, shape.stacks[0].ffn) == (2, 2, 64)
    assert shape.positions.kind == "rotary"
    assert shape.tied is False
    assert shape.vocabulary is None
    assert found.size.parameters == model.num_parameters()


def test_fewer_layers_than_configured_are_a_contradiction(tmp_path: Path) -> None:
    folder = models.save_model(tmp_path / "m", "llama")
    farm_tools.edit_config(folder, num_hidden_layers=3)
    found = look(str(folder)).contradictions
    assert [(c.subject, c.card, c.found) for c in found] == [("layers", "config.json: 3", "weights: 2")]


def test_candidates_are_ranked_by_their_weights(tmp_path: Path) -> None:
    base = models.save_model(tmp_path / "base", "vit")
    tuned = models.save_fine_tune(tmp_path / "tuned", base, 1)
    other = models.save_model(tmp_path / "other", "vit", seed=4)
    candidates = [open_checkpoint(str(p)) for p in (other, base)]
    found = facts(open_checkpoint(str(tuned)), candidates=candidates).bases
    assert [(b.source, b.model) for b in found] == [("weights", str(base))]
    assert "fine-tune" in found[0].detail


def test_an_adapter_on_its_base_counts_as_applied(tmp_path: Path) -> None:
    tensors = {"w": MemoryTensor("w", torch.ones(2, 2))}
    found = facts(Checkpoint("b+l", tmp_path, tensors, adapters=("./l",)))
    assert any("./l is applied" in remark for remark in found.remarks)
    assert found.size.disk is None


@pytest.mark.parametrize("name", ["missing", "nowhere/at-all"])
def test_what_does_not_exist_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as error:
        look(str(tmp_path / name), offline=True)
    assert error.value.code == "RG101"
