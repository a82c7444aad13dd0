"""Adapters applied by regraft against the same adapters merged by peft."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import models
from regraft.checkpoint.model import Checkpoint, open_checkpoint, open_local

LLAMA_TARGETS = ["q_proj", "down_proj"]


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    source = checkpoint.source(name)
    return source.read().view(source.shape)


def adapt(model: Any, config: peft.PeftConfig, folder: Path, seed: int = 1) -> Any:
    """Wrap a model, give every trained parameter a random value, save the adapter."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter *= 1 + 0.1 * torch.rand_like(parameter)
            elif parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def check(base: Path, folder: Path, merged: Any, *, missing: tuple[str, ...] = ()) -> Checkpoint:
    """Every tensor of the checkpoint equals that of the merged model."""
    checkpoint = open_checkpoint(f"{base}+{folder}")
    state = merged.state_dict()
    assert checkpoint.adapters == (str(folder),)
    unseen = set(checkpoint.tensors)
    for name, expected in state.items():
        if name in checkpoint.tensors or name in checkpoint.aliases:
            torch.testing.assert_close(read(checkpoint, name), expected, atol=1e-6, rtol=1e-6, msg=name)
            unseen.discard(name)
    assert unseen <= set(missing)
    return checkpoint


def changed(base: Path, checkpoint: Checkpoint) -> set[str]:
    before = open_local(base)
    return {
        name
        for name in checkpoint.tensors
        if name not in before.tensors or not torch.equal(read(before, name), read(checkpoint, name))
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def base(family: str, **changes: Any) -> Path:
        key = f"{family} {changes}"
        if key not in made:
            made[key] = models.save_model(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return base


def load(base: Path, kind: Any = None) -> Any:
    kind = kind or getattr(hf, hf.AutoConfig.from_pretrained(base).architectures[0])
    return kind.from_pretrained(base).eval()


LORA_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 24, "r": 3},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 4},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5},
        "alpha_pattern": {r"layers\.[0]\..*": 32, "self_attn.q_proj": 3},
    },
    "patterns-rank-stabilised": {"use_rslora": True, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "regular-expression": {"target_modules": r".*layers\.1\..*(q|k)_proj"},
    "one-layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0.*"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding-dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [3, 90, 17]},
    "tokens-by-name": {"trainable_token_indices": {"embed_tokens": [95, 0]}},
}


@pytest.mark.parametrize("name", LORA_OPTIONS)
def test_llama_equals_peft(name: str, bases: Any, tmp_path: Path) -> None:
    base = bases("llama", tie_word_embeddings=False)
    options = {"r": 4, "target_modules": LLAMA_TARGETS} | LORA_OPTIONS[name]
    wrapped = adapt(load(base), peft.LoraConfig(**options), tmp_path / "lora")
    checkpoint = check(base, tmp_path / "lora", wrapped.merge_and_unload())
    assert changed(base, checkpoint)
    assert list(checkpoint.tensors) == list(open_local(base).tensors)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_adapter_replace_those_of_the_base(bias: str, bases: Any, tmp_path: Path) -> None:
    base = bases("qwen2", tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], bias=bias)
    wrapped = adapt(load(base), config, tmp_path / "lora")
    checkpoint = check(base, tmp_path / "lora", wrapped.merge_and_unload())
    moved = {name for name in changed(base, checkpoint) if name.endswith("bias")}
    assert len(moved) == (6 if bias == "all" else 2)


def test_lora_bias(bases: Any, tmp_path: Path) -> None:
    base = bases("qwen2", tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True)
    checkpoint = check(base, tmp_path / "a", adapt(load(base), config, tmp_path / "a").merge_and_unload())
    assert any(name.endswith("q_proj.bias") for name in changed(base, checkpoint))


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2_weights_are_stored_transposed(dora: bool, bases: Any, tmp_path: Path) -> None:
    base = bases("gpt2")
    # c_proj of the attention is square, that of the MLP is not
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=dora)
    check(base, tmp_path / "a", adapt(load(base), config, tmp_path / "a").merge_and_unload())


def test_a_square_transposed_weight_is_told_by_its_neighbours(bases: Any, tmp_path: Path) -> None:
    base = bases("gpt2")
    config = peft.LoraConfig(r=4, target_modules=r".*attn\.c_proj", fan_in_fan_out=True)
    merged = adapt(load(base), config, tmp_path / "a").merge_and_unload()
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": False}))
    check(base, tmp_path / "a", merged)


def test_bert_classifier_brings_a_head(bases: Any, tmp_path: Path) -> None:
    base = bases("bert")
    model = hf.BertForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "output.dense"])
    wrapped = adapt(model, config, tmp_path / "a")
    own = tuple(name for name in open_local(base).tensors if name.startswith("cls."))
    checkpoint = check(base, tmp_path / "a", wrapped.merge_and_unload(), missing=own)
    assert read(checkpoint, "classifier.weight").shape == (3, 32)
    assert checkpoint.architectures == ("BertForSequenceClassification",)
    assert len(checkpoint.config["id2label"]) == 3
    assert any("classifier.weight" in remark for remark in checkpoint.remarks)


def test_a_head_on_a_bare_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf.BertModel(models.config("bert")).save_pretrained(tmp_path / "base")
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2).eval()
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"])
    wrapped = adapt(model, config, tmp_path / "a")
    checkpoint = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'a'}")
    merged = wrapped.merge_and_unload().state_dict()
    for name in changed(tmp_path / "base", checkpoint):
        full = name if name.startswith("classifier") else f"bert.{name}"
        torch.testing.assert_close(read(checkpoint, name), merged[full], atol=1e-6, rtol=1e-6)
    logits = reload(checkpoint, tmp_path / "out")(input_ids=torch.arange(8)[None]).logits
    torch.testing.assert_close(logits, wrapped.merge_and_unload()(input_ids=torch.arange(8)[None]).logits)


def test_an_adapter_of_the_bare_model_on_a_base_with_a_head(bases: Any, tmp_path: Path) -> None:
    base = bases("llama", tie_word_embeddings=False)
    wrapped = adapt(load(base, hf.LlamaModel), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "a")
    checkpoint = open_checkpoint(f"{base}+{tmp_path / 'a'}")
    moved = changed(base, checkpoint)
    assert moved == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    for name, expected in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(read(checkpoint, f"model.{name}"), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_vit_and_its_convolution(options: dict[str, Any], bases: Any, tmp_path: Path) -> None:
    base = bases("vit")
    targets = [name for name, m in load(base).named_modules() if isinstance(m, torch.nn.Conv2d)]
    targets += [name for name, m in load(base).named_modules() if isinstance(m, torch.nn.Linear)][:4]
    config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=["classifier"], **options)
    merged = adapt(load(base), config, tmp_path / "a").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")  # under the names of the files, which differ from those in memory
    checkpoint = open_checkpoint(f"{base}+{tmp_path / 'a'}")
    expected = open_local(tmp_path / "merged")
    assert set(checkpoint.tensors) == set(expected.tensors)
    for name in expected.tensors:
        torch.testing.assert_close(read(checkpoint, name), read(expected, name), atol=1e-6, rtol=1e-6, msg=name)
    assert any(len(checkpoint.tensors[name].shape) == 4 for name in changed(base, checkpoint))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ia3(family: str, bases: Any, tmp_path: Path) -> None:
    base = bases(family)
    targets = {"llama": (["k_proj", "down_proj"], ["down_proj"]), "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])}
    target, feedforward = targets[family]
    config = peft.IA3Config(target_modules=target, feedforward_modules=feedforward)
    check(base, tmp_path / "a", adapt(load(base), config, tmp_path / "a").merge_and_unload())


def reload(checkpoint: Checkpoint, out: Path) -> Any:
    """Write the checkpoint as it is and load it with transformers."""
    out.mkdir()
    save_file(
        {name: read(checkpoint, name).clone() for name in checkpoint.tensors},
        out / "model.safetensors",
        {"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    return getattr(hf, checkpoint.architectures[0]).from_pretrained(out).eval()


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize(
    ("options", "two"),
    [
        ({"target_modules": "HEAD"}, True),
        ({"target_modules": "EMBEDDING"}, True),
        ({"target_modules": "OTHER", "modules_to_save": ["EMBEDDING"]}, True),
        ({"target_modules": "OTHER", "modules_to_save": ["HEAD"]}, True),
        ({"target_modules": "OTHER", "trainable_token_indices": {"EMBEDDING": [5, 2]}}, False),
    ],
    ids=["head", "embedding", "saved-embedding", "saved-head", "tokens"],
)
def test_tied_weights_behave_as_in_the_adapted_model(
    family: str, options: dict[str, Any], two: bool, bases: Any, tmp_path: Path
) -> None:
    base = bases(family, tie_word_embeddings=True)
    words = {"HEAD": "lm_head", "EMBEDDING": "wte", "OTHER": "c_attn"}
    if family == "qwen2":
        words |= {"EMBEDDING": "embed_tokens", "OTHER": "q_proj"}
    text = json.dumps(options)
    for word, name in words.items():
        text = text.replace(word, name)
    options = json.loads(text)
    options["target_modules"] = [options["target_modules"]]
    wrapped = adapt(load(base), peft.LoraConfig(r=4, **options), tmp_path / "a")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits  # not merged: merging in place would change both
        checkpoint = open_checkpoint(f"{base}+{tmp_path / 'a'}")
        assert ("lm_head.weight" in checkpoint.tensors) is two
        assert any("two" in remark for remark in checkpoint.remarks) is two
        got = reload(checkpoint, tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_equal_copies_of_tied_weights_stay_tied(bases: Any, tmp_path: Path) -> None:
    base = bases("qwen2", tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    wrapped = adapt(load(base), config, tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    state = load_file(file)
    state["base_model.model.lm_head.weight"] = state["base_model.model.model.embed_tokens.weight"].clone()
    save_file(state, file)
    checkpoint = open_checkpoint(f"{base}+{tmp_path / 'a'}")
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.config["tie_word_embeddings"] is True
    torch.testing.assert_close(
        read(checkpoint, "model.embed_tokens.weight"), wrapped.merge_and_unload().model.embed_tokens.weight
    )


def test_a_resized_vocabulary(bases: Any, tmp_path: Path) -> None:
    base = bases("qwen2", tie_word_embeddings=True)
    model = load(base)
    model.resize_token_embeddings(models.VOCAB + 3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    (tmp_path / "a/tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(f"{base}+{tmp_path / 'a'}")
    assert checkpoint.config["vocab_size"] == models.VOCAB + 3
    assert checkpoint.files["tokenizer.json"] == tmp_path / "a/tokenizer.json"
    with torch.no_grad():
        got = reload(checkpoint, tmp_path / "out")(input_ids=torch.arange(5)[None]).logits
        torch.testing.assert_close(got, wrapped(input_ids=torch.arange(5)[None]).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_rounded_once_to_the_base_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = models.save_model(tmp_path / "base", "llama", dtype=dtype)
    model = hf.LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    adapt(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj"
    state = load_file(tmp_path / "a/adapter_model.safetensors")
    a, b = (state[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    before = read(open_local(base), f"{name}.weight")
    expected = before.double() + 8 / 4 * (b @ a)
    got = read(open_checkpoint(f"{base}+{tmp_path / 'a'}"), f"{name}.weight")
    assert got.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-14)
    else:
        assert (got == expected.to(dtype)).float().mean() > 0.999


def test_adapters_compose(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    first = adapt(load(base), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "a", seed=1)
    second_base = first.merge_and_unload()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True)
    second = adapt(second_base, config, tmp_path / "b", seed=2)
    checkpoint = open_checkpoint(f"{base}+{tmp_path / 'a'}+{tmp_path / 'b'}")
    assert checkpoint.adapters == (str(tmp_path / "a"), str(tmp_path / "b"))
    merged = second.merge_and_unload().state_dict()
    for name in checkpoint.tensors:
        torch.testing.assert_close(read(checkpoint, name), merged[name], atol=2e-6, rtol=1e-5)


def test_pickled_adapters_and_bases(bases: Any, tmp_path: Path) -> None:
    base = bases("gpt2")
    torch.save(load(base).state_dict(), (tmp_path / "base").mkdir() or tmp_path / "base/pytorch_model.bin")
    (tmp_path / "base/config.json").write_text((base / "config.json").read_text())
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    wrapped = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        wrapped.base_model.model.lm_head.lora_B["default"].weight.fill_(0.1)
    wrapped.save_pretrained(tmp_path / "a", safe_serialization=False)
    assert (tmp_path / "a/adapter_model.bin").exists()
    checkpoint = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'a'}")
    assert "lm_head.weight" in checkpoint.tensors
    assert not checkpoint.aliases
    with torch.no_grad():
        got = reload(checkpoint, tmp_path / "out")(input_ids=torch.arange(5)[None]).logits
        torch.testing.assert_close(got, wrapped(input_ids=torch.arange(5)[None]).logits, atol=1e-5, rtol=1e-4)


def test_keys_with_the_adapter_name_mean_the_same(bases: Any, tmp_path: Path) -> None:
    base = bases("llama", tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=True)
    adapt(load(base), config, tmp_path / "a")
    expected = open_checkpoint(f"{base}+{tmp_path / 'a'}")
    state = load_file(tmp_path / "a/adapter_model.safetensors")
    named = {}
    for key, tensor in state.items():
        key = re.sub(r"(lora_(embedding_)?[AB]|lora_magnitude_vector)(?=$|\.)", r"\1.mine", key)
        key = key.replace("lm_head.weight", "lm_head.modules_to_save.mine.weight")
        named[key] = tensor
    named["base_model.model.lm_head.original_module.weight"] = torch.zeros(1)
    assert len(named.keys() - state.keys()) > 7
    save_file(named, tmp_path / "a/adapter_model.safetensors")
    got = open_checkpoint(f"{base}+{tmp_path / 'a'}")
    assert list(got.tensors) == list(expected.tensors)
    for name in expected.tensors:
        assert torch.equal(read(got, name), read(expected, name))


def test_a_one_dimensional_convolution(tmp_path: Path) -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = torch.nn.Conv1d(3, 7, 5)
            self.norm = torch.nn.LayerNorm(4)

    torch.manual_seed(0)
    model = Small()
    (tmp_path / "base").mkdir()
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "base/model.safetensors"
    )
    merged = adapt(model, peft.LoraConfig(r=2, target_modules=["front"]), tmp_path / "a").merge_and_unload()
    checkpoint = check(tmp_path / "base", tmp_path / "a", merged)
    assert changed(tmp_path / "base", checkpoint) == {"front.weight"}
