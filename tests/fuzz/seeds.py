"""Valid tiny models, adapters and recipes, a few kilobytes each, that the fuzzer damages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY, WIDTH, LAYERS = 16, 8, 2
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "tie_word_embeddings": False,
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
    "text_config": {"model_type": "llama", "hidden_size": WIDTH},
    "torch_dtype": "float32",
    "transformers_version": "5.0.0",
    "_name_or_path": "somewhere",
}
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", **_ADDED}, {"id": 1, "content": "</s>", **_ADDED}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE",
        "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4},
        "merges": [["a", "b"]],
        "unk_token": None,
    },
}
TEXTS: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "model_max_length": 32,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "name_or_path": "/somewhere/else",
        "chat_template": "{{ messages }}",
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1], "temperature": 0.7},
    "modules.json": [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling", "type": "x.Pooling"}],
    "preprocessor_config.json": {"size": {"height": 8}, "image_mean": [0.5]},
}
CARD = """---
license: apache-2.0
language: [en, de]
datasets:
- one/data
base_model: org/base
pipeline_tag: text-generation
tags: &tags [merge, tiny]
model-index:
- name: tiny
  results: []
---

# Tiny

A model with 1.1K parameters and a context length of 32.
"""
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {},
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "bias": "none",
    "auto_mapping": None,
    "trainable_token_indices": None,
}
OWN = """seed: 1
models:
  base: {base}
  a: {a}
  b: {b}
steps:
  early:
    merge: linear
    models: {{a: {{weight: 0.6}}, b: {{weight: 0.4}}}}
    dtype: bfloat16
  merged:
    merge: ties
    base: base
    models: {{early: {{weight: [{{filter: mlp, value: [0.2, 1]}}, {{value: 0.5}}]}}, b: null}}
    density: 0.5
    out_dtype: float32
    exclude: [layernorm]
    config_from: base
    tokenizer_from: a
    chat_template: "{{{{ messages }}}}"
"""
SWEEP = """models: {{base: {base}, a: {a}}}
steps:
  many: {{merge: ties, base: base, models: &two [a, {b}], sweep: {{density: [0.2, 0.5], lambda: [1, 0.5]}}}}
  mean: {{merge: linear, models: *two}}
  last: {{merge: slerp, base: base, models: ["many@density=0.2,lambda=1"], t: [0, 0.5, 1]}}
  score: {{evaluate: accuracy, models: [many, a], data: data.csv, limit: 3}}
"""
SLICES = """steps:
  stacked:
    merge: passthrough
    slices:
    - models: [{{model: {a}, layers: [0, 2]}}]
    - models: [{{model: {b}, layers: [0, 1], scale: 0.5}}]
"""
MERGEKIT = """merge_method: dare_ties
base_model: {base}
models:
- model: {a}
  parameters: {{weight: 0.5, density: [0.1, 1]}}
- model: {{model: {{path: {b}, revision: null}}}}
  parameters:
    weight:
    - {{filter: self_attn, value: 0.3}}
    - value: 0.7
parameters: {{normalize: true, int8_mask: true}}
dtype: float32
tokenizer: {{source: base}}
chat_template: auto
"""
MERGEKIT_SLICES = """merge_method: slerp
base_model: {a}
slices:
- sources:
  - {{model: {a}, layer_range: [0, 2]}}
  - {{model: {b}, layer_range: [0, 2]}}
  parameters: {{t: [{{filter: mlp, value: [0, 1]}}, {{value: 0.5}}]}}
dtype: bfloat16
"""
RECIPES = (OWN, SWEEP, SLICES, MERGEKIT, MERGEKIT_SLICES)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Weights as a Llama of this size has them; all seeds are near one another, as fine-tunes are."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        shapes[f"{path}.input_layernorm.weight"] = (WIDTH,)
        shapes |= {f"{path}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qo"}
        shapes |= {f"{path}.self_attn.{part}_proj.weight": (WIDTH // 2, WIDTH) for part in "kv"}
        shapes |= {f"{path}.mlp.{part}_proj.weight": (12, WIDTH) for part in ("gate", "up")}
        shapes[f"{path}.mlp.down_proj.weight"] = (WIDTH, 12)
        shapes[f"{path}.post_attention_layernorm.weight"] = (WIDTH,)
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    start, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=start) + 0.05 * torch.randn(shape, generator=own)
        for name, shape in shapes.items()
    }


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1))


def save_seed(folder: Path, seed: int = 0) -> Path:
    """A whole model: one safetensors file and every other file that regraft reads or copies."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "tokenizer.json", TOKENIZER)
    for name, data in TEXTS.items():
        write_json(folder / name, data)
    (folder / "README.md").write_text(CARD)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("The licence.\n")
    save_file(tensors(seed), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def save_shards(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Two shards and their index; the index."""
    state = list(tensors(seed).items())
    shards = {"model-00001-of-00002.safetensors": dict(state[:9]), "model-00002-of-00002.safetensors": dict(state[9:])}
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
    for file, content in shards.items():
        save_file(content, folder / file)
        index["weight_map"] |= dict.fromkeys(content, file)
    write_json(folder / INDEX, index)
    return index


def adapter_tensors() -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on two modules of each layer, and a head of its own."""
    path = "base_model.model.model.layers"
    state = {"base_model.model.lm_head.weight": torch.ones(VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        for module, outputs in (("q_proj", WIDTH), ("v_proj", WIDTH // 2)):
            state[f"{path}.{layer}.self_attn.{module}.lora_A.weight"] = torch.full((2, WIDTH), 0.1)
            state[f"{path}.{layer}.self_attn.{module}.lora_B.weight"] = torch.full((outputs, 2), 0.1)
    return state


def save_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", ADAPTER)
    save_file(adapter_tensors(), folder / "adapter_model.safetensors")
    return folder
