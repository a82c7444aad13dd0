"""Tiny models with tokenizers and data, for tests that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers.processors import TemplateProcessing

from farm_tools import write_tokenizer
from models import VOCAB, save_model
from regraft.axes.module_map import modules_of
from regraft.resize.surgery import load

WORDS = [f"w{i}" for i in range(40)]


def save_tiny(folder: Path, family: str, seed: int = 0, scale: float = 1.0, **changes: Any) -> Path:
    """A model of `models.py` with what it needs beside it to read texts; without dropout.

    `scale` multiplies the matrices of linear layers: as they are initialised, they hardly change what passes by them.
    """
    calm = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    calm["roberta"] = calm["bert"]
    calm["gpt2"] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    save_model(folder, family, seed, **calm.get(family, {}) | changes)
    if scale != 1.0:
        _scaled(load(folder), scale).save_pretrained(folder)
    if family not in ("vit", "swin"):
        add_tokenizer(folder)
    return folder


def _scaled(model: Any, scale: float) -> Any:
    roles = modules_of(model)
    with torch.no_grad():
        for name in (*roles.find("attention"), *roles.find("ffn")):
            if isinstance(weight := getattr(model.get_submodule(name), "weight", None), torch.Tensor):
                weight *= scale
    return model


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of words with a mask token, as many tokens as the models of `models.py` embed."""
    write_tokenizer(folder, size=VOCAB - 1, added=("[MASK]",))
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = "[MASK]"
    tokenizer.save_pretrained(folder)


def texts(n: int = 24) -> list[dict[str, Any]]:
    """Texts of different lengths with a label each."""
    return [{"text": " ".join(WORDS[(i * 7 + j) % 40] for j in range(3 + i % 9)), "label": i % 2} for i in range(n)]


def pictures(n: int = 24, size: int = 8) -> list[dict[str, Any]]:
    """Random images of one channel with a label each."""
    pixels = torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0)).tolist()
    return [{"pixel_values": p, "label": i % 10} for i, p in enumerate(pixels)]


def pairs(n: int = 24) -> list[dict[str, Any]]:
    """Images with texts, for models with two towers that take three channels."""
    pixels = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)).tolist()
    return [{"pixel_values": p, "text": row["text"]} for p, row in zip(pixels, texts(n), strict=True)]


def targets(n: int = 24) -> list[dict[str, Any]]:
    """Texts, each with its first two words as what an encoder-decoder is to write."""
    return [row | {"target": " ".join(row["text"].split()[:2])} for row in texts(n)]


def rows_for(family: str, n: int = 24) -> list[dict[str, Any]]:
    if family == "swin":
        return pictures(n, 16)
    return {"vit": pictures, "clip": pairs, "t5": targets}.get(family, texts)(n)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    """A batch for comparing outputs."""
    ids = torch.arange(3, 15).reshape(2, 6)
    pixels = torch.rand(2, 3 if family == "clip" else 1, 8, 8, generator=torch.Generator().manual_seed(1))
    if family == "vit":
        return {"pixel_values": pixels}
    if family == "swin":
        return {"pixel_values": torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))}
    if family == "clip":
        return {"input_ids": ids, "pixel_values": pixels}
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})


def output_of(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**inputs_of(family))
    return output.logits_per_image if family == "clip" else output.logits


def masked_images(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model that guesses hidden patches of images of 8 x 8 pixels: of 16 patches, "swin" of 16 as well."""
    torch.manual_seed(seed)
    image = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "vit_mae":
        decoder = {"decoder_hidden_size": 16, "decoder_intermediate_size": 32, "decoder_num_hidden_layers": 1}
        config = hf.ViTMAEConfig(**sizes, **decoder, decoder_num_attention_heads=2, **image, **changes)
        return hf.ViTMAEForPreTraining(config).eval()
    if family == "swin":
        config = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "encoder_stride": 4}
        return hf.SwinForMaskedImageModeling(hf.SwinConfig(**image, **config | changes)).eval()
    kind = {"vit": (hf.ViTConfig, hf.ViTForMaskedImageModeling), "deit": (hf.DeiTConfig, hf.DeiTForMaskedImageModeling)}
    config_class, model_class = kind[family]
    return model_class(config_class(**sizes, **image, **{"encoder_stride": 2} | changes)).eval()


def save_masked(folder: Path, family: str, seed: int = 0, scale: float = 1.0, **changes: Any) -> Path:
    _scaled(masked_images(family, seed, **changes), scale).save_pretrained(folder)
    return folder


def begin_with_cls(folder: Path) -> Path:
    """Have a model's tokenizer put a token before each text, as those of BERT do."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.cls_token = "[BOS]"
    first = [("[BOS]", tokenizer.cls_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=first)
    tokenizer.save_pretrained(folder)
    return folder
