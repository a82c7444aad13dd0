"""Extraction end to end: a fine-tune of a real model becomes an adapter, and PEFT makes the fine-tune of it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import models
from farm_tools import write_tokenizer
from regraft.adapters.extract import Wanted
from regraft.adapters.factors import Truncation
from regraft.adapters.publish import Made, extract_lora
from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.lineage import Lineage

ALL = Wanted(Truncation(rank=64), save=["all"], embeddings=True)


def load(folder: Path) -> Any:
    return getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0]).from_pretrained(folder).eval()


def outputs(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    given = {"input_ids": ids}
    if model.config.model_type == "vit":
        given = {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    if model.config.model_type == "t5":
        given["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**given).logits


def extract(folder: Path, wanted: Wanted, tuned: str = "tuned", **more: Any) -> Made:
    base, model = open_checkpoint(str(folder / "base")), open_checkpoint(str(folder / tuned))
    return extract_lora(model, base, folder / "out", wanted, **more)


def low_rank(folder: Path, rank: int, pattern: str = "weight") -> None:
    """`folder/tuned`: the base with products of this rank added to the matrices that have `pattern` in their names."""
    loaded = load(folder / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if parameter.dim() == 2 and pattern in name:
                left, right = torch.randn(parameter.shape[0], rank), torch.randn(rank, parameter.shape[1])
                parameter += 0.01 * (left @ right).to(parameter.dtype)
    loaded.save_pretrained(folder / "tuned")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_everything_that_a_fine_tune_changed(tmp_path: Path, family: str) -> None:
    models.save_model(tmp_path / "base", family)
    models.save_fine_tune(tmp_path / "tuned", tmp_path / "base", seed=1, scale=0.1)
    made = extract(tmp_path, ALL)
    assert made.error < 1e-5
    base, tuned = load(tmp_path / "base"), outputs(load(tmp_path / "tuned"))
    assert float((outputs(base) - tuned).abs().max()) > 1e-3
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(outputs(adapted), tuned, rtol=1e-4, atol=1e-5)
    # And so does regraft itself, to the tensor.
    applied = open_checkpoint(f"{tmp_path}/base+{tmp_path}/out")
    for name, value in load_file(tmp_path / "tuned" / "model.safetensors").items():
        torch.testing.assert_close(applied.source(name).read(), value.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "pattern"), [("llama", "proj"), ("gpt2", "h.1."), ("bert", "attention")])
def test_changes_of_low_rank_are_found_as_they_are(tmp_path: Path, family: str, pattern: str) -> None:
    models.save_model(tmp_path / "base", family)
    low_rank(tmp_path, 3, pattern)
    made = extract(tmp_path, Wanted(Truncation(energy=1.0)))
    assert {change.rank for change in made.changes} == {3}
    assert made.error < 1e-5
    tuned = outputs(load(tmp_path / "tuned"))
    adapted = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out").eval()
    torch.testing.assert_close(outputs(adapted), tuned, rtol=1e-4, atol=1e-5)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    wrapped = [n for n, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) == len(made.changes)
    assert all(any(name.endswith(t) for t in targets) for name in wrapped)


def test_ranks_differ_by_tensor(tmp_path: Path) -> None:
    models.save_model(tmp_path / "base", "llama")
    models.save_fine_tune(tmp_path / "tuned", tmp_path / "base", seed=1)
    made = extract(tmp_path, Wanted(Truncation(energy=0.8), exclude=["norm", "embed"]))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {c.name: c.rank for c in made.changes if c.kind == "low rank"}
    assert len(set(ranks.values())) > 1
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert all(c.energy >= 0.8 - 1e-6 for c in made.changes if c.kind == "low rank")
    base, tuned = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "tuned"))
    adapted = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
    merged = adapted.merge_and_unload().state_dict()
    for change in made.changes:
        delta = tuned[change.name] - base[change.name]
        error = float((tuned[change.name] - merged[change.name]).norm() / delta.norm())
        assert change.error == pytest.approx(error, rel=1e-3)
        assert change.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    lost = sum(float((tuned[n] - merged[n]).norm()) ** 2 for n in tuned)
    moved = sum(float((tuned[n] - base[n]).norm()) ** 2 for n in tuned)
    assert made.error == pytest.approx((lost / moved) ** 0.5, rel=1e-3)


def test_the_folder_tells_what_it_is(tmp_path: Path) -> None:
    models.save_model(tmp_path / "base", "llama")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    models.save_fine_tune(tmp_path / "tuned", tmp_path / "base", seed=1)
    (tmp_path / "tuned" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    made = extract(tmp_path, Wanted(Truncation(rank=2), exclude=["norm", "embed"]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model_relation: adapter\nlibrary_name: peft\ntags:\n- lora\n- regraft\n- extract-lora\n" in card
    assert "license: apache-2.0" in card
    assert "PeftModel.from_pretrained(model, " in card
    assert str(tmp_path) not in card
    lineage = Lineage.read(tmp_path / "out")
    assert [record.role for record in lineage.inputs] == ["base", "model"]
    assert lineage.settings["rank"] == 2
    assert lineage.diagnostics["relative_error"] == made.error
    assert len(lineage.diagnostics["tensors"]) == len(made.changes)
    assert lineage.output is not None
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert lineage.output.parameters == sum(t.numel() for t in state.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_a_head_that_the_base_does_not_have(tmp_path: Path) -> None:
    models.save_model(tmp_path / "base", "bert")
    torch.manual_seed(3)
    tuned = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    with torch.no_grad():
        tuned.bert.encoder.layer[1].output.dense.weight += 0.1 * torch.randn(32, 1) @ torch.randn(1, 64)
    tuned.save_pretrained(tmp_path / "tuned")
    made = extract(tmp_path, Wanted(save=["classifier", "pooler"]))
    assert {c.name for c in made.changes if c.kind == "saved"} >= {"classifier.weight", "classifier.bias"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    base = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(outputs(adapted), outputs(tuned.eval()), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    models.save_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    low_rank(tmp_path, 2, "proj")
    made = extract(tmp_path, Wanted(Truncation(rank=2)))
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    assert 0 < made.error < 0.05
    wide = extract(tmp_path, Wanted(Truncation(rank=2), dtype=torch.float32), force=True)
    assert wide.error < made.error


def test_an_adapted_model_gives_its_adapter_back(tmp_path: Path) -> None:
    models.save_model(tmp_path / "base", "llama")
    wrapped = peft.get_peft_model(
        load(tmp_path / "base"), peft.LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = open_checkpoint(str(tmp_path / "base"))
    made = extract_lora(open_checkpoint(f"{tmp_path}/base+{tmp_path}/adapter"), base, tmp_path / "out")
    assert [(c.name, c.rank) for c in made.changes] == [
        (f"model.layers.{i}.self_attn.q_proj.weight", 4) for i in (0, 1)
    ]
    assert made.error < 1e-5


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    models.save_model(tmp_path / "base", "llama")
    low_rank(tmp_path, 1, "proj")
    seen: list[tuple[int, int]] = []
    extract(tmp_path, Wanted(), on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """A pattern without an anchor would give the rank of one module to another whose name ends in its name."""
    models.save_model(tmp_path / "base", "t5")
    low_rank(tmp_path, 2, "encoder.block.0.layer.0.SelfAttention.k")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    torch.manual_seed(4)
    name = "decoder.block.0.layer.0.SelfAttention.k.weight"
    tensors[name] += 0.1 * torch.randn(tensors[name].shape)
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    extract(tmp_path, Wanted(Truncation(rank=32)))
    adapted = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out").eval()
    torch.testing.assert_close(outputs(adapted), outputs(load(tmp_path / "tuned")), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_words_that_the_fine_tune_added(tmp_path: Path, tied: bool) -> None:
    """The resized embedding and head are saved whole, the tokenizer beside them; PEFT loads both on a resized base."""
    models.save_model(tmp_path / "base", "llama", tie_word_embeddings=tied)
    write_tokenizer(tmp_path / "base")
    low_rank(tmp_path, 2, "proj")
    tuned = load(tmp_path / "tuned")
    tuned.resize_token_embeddings(models.VOCAB + 2)
    tuned.save_pretrained(tmp_path / "tuned")
    write_tokenizer(tmp_path / "tuned", added=("<|im_start|>", "<|im_end|>"))
    made = extract(tmp_path, Wanted(Truncation(rank=2), save=["all"]))
    assert made.error < 1e-5
    assert {c.name for c in made.changes if c.kind == "saved"} >= {"model.embed_tokens.weight"}
    assert made.lineage.sources == {"tokenizer": "model"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.resize_token_embeddings(98)\nmodel = PeftModel" in card
    base = load(tmp_path / "base")
    base.resize_token_embeddings(98)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(outputs(adapted), outputs(tuned.eval()), rtol=1e-4, atol=1e-5)
    words, own = (hf.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "tuned"))
    assert words("w1 <|im_end|>")["input_ids"] == own("w1 <|im_end|>")["input_ids"]
    applied = open_checkpoint(f"{tmp_path}/base+{tmp_path}/out")
    for name, value in load_file(tmp_path / "tuned" / "model.safetensors").items():
        torch.testing.assert_close(applied.source(name).read(), value.flatten(), rtol=1e-5, atol=1e-6)
    left = extract(tmp_path, Wanted(Truncation(rank=2), exclude=["embed"] + ["lm_head"] * (not tied)), force=True)
    assert left.lineage.sources == {"tokenizer": "base"}
    assert "the rows of the fine-tune's new tokens are left out" in left.lineage.warnings[0]
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_chat_template_goes_beside_the_adapter(tmp_path: Path) -> None:
    models.save_model(tmp_path / "base", "llama")
    low_rank(tmp_path, 1, "proj")
    for name in ("base", "tuned"):
        write_tokenizer(tmp_path / name)
    assert extract(tmp_path, Wanted()).lineage.sources == {"tokenizer": "base"}
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    (tmp_path / "tuned" / "chat_template.jinja").write_text("{{ messages }}")
    assert extract(tmp_path, Wanted(), force=True).lineage.sources == {"tokenizer": "model"}
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
    assert "tokenizer = AutoTokenizer" in (tmp_path / "out" / "README.md").read_text()
