"""Tiny image classifiers, text encoders and described images, for tests on descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from models import config
from tiny import WORDS, add_tokenizer, pictures, save_tiny

SIZES: dict[str, dict[str, Any]] = {
    "resnet": {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 10},
    "swin": {
        "num_channels": 1, "image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
        "window_size": 2, "num_labels": 10, "drop_path_rate": 0.0,
    },
    "deit": {
        "num_channels": 1, "image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 10,
    },
}  # fmt: skip
KINDS: dict[str, tuple[Any, Any]] = {
    "resnet": (hf.ResNetConfig, hf.ResNetForImageClassification),
    "swin": (hf.SwinConfig, hf.SwinForImageClassification),
    "deit": (hf.DeiTConfig, hf.DeiTForImageClassification),
}


def save_classifier(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A tiny image classifier of ten classes with random weights."""
    if family == "vit":
        return save_tiny(folder, "vit", seed, **changes)
    configure, build = KINDS[family]
    torch.manual_seed(seed)
    layer = {"layer_type": "basic"} if family == "resnet" else {}
    build(configure(**SIZES[family] | layer | changes)).save_pretrained(folder)
    return folder


def save_encoder(folder: Path, kind: str, seed: int = 0) -> Path:
    """A tiny text encoder: `bert`, `t5`, `gpt2`, `clip`, or one tower of CLIP, with or without its projection."""
    if not kind.startswith("clip_"):
        return save_tiny(folder, kind, seed)
    text = config("clip").text_config
    text.projection_dim = 16
    torch.manual_seed(seed)
    build = hf.CLIPTextModelWithProjection if kind == "clip_projected" else hf.CLIPTextModel
    build(text).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def described(n: int = 24) -> list[dict[str, Any]]:
    """Images with a label and a description each, all of them different."""
    return [
        {**row, "text": f"{WORDS[i % 40]} {WORDS[(i * 3 + 1) % 40]} {WORDS[i // 40]}"}
        for i, row in enumerate(pictures(n))
    ]
