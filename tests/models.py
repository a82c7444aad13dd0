"""Tiny but real models of every family, and fine-tunes of them, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

VOCAB = 96


def config(family: str, **changes: Any) -> hf.PretrainedConfig:
    """A configuration of the family with two layers of width 32."""
    decoder = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    encoder = {k: v for k, v in decoder.items() if k != "num_key_value_heads"}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {**vision, "image_size": 8, "patch_size": 4}
    match family:
        case "llama":
            return hf.LlamaConfig(**decoder | changes)
        case "qwen2":
            return hf.Qwen2Config(**decoder | changes)
        case "mistral":
            return hf.MistralConfig(**decoder | changes)
        case "gpt2":
            return hf.GPT2Config(
                **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | changes
            )
        case "bert":
            return hf.BertConfig(**encoder | changes)
        case "roberta":
            return hf.RobertaConfig(**encoder | {"max_position_embeddings": 66, "pad_token_id": 1} | changes)
        case "t5":
            sizes = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
            return hf.T5Config(**sizes | {"decoder_start_token_id": 0} | changes)
        case "vit":
            return hf.ViTConfig(**image | {"num_channels": 1, "num_labels": 10} | changes)
        case "swin":
            sizes = {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 16, "window_size": 4}
            calm = {"hidden_dropout_prob": 0.0, "drop_path_rate": 0.0}
            return hf.SwinConfig(**sizes | calm | {"depths": [2, 2], "num_heads": [2, 4], "num_labels": 10} | changes)
        case "clip":
            text = encoder | {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
            return hf.CLIPConfig(text_config=text, vision_config=image, **{"projection_dim": 16} | changes)
    raise KeyError(family)


CLASSES: dict[str, Any] = {
    "llama": hf.LlamaForCausalLM,
    "qwen2": hf.Qwen2ForCausalLM,
    "mistral": hf.MistralForCausalLM,
    "gpt2": hf.GPT2LMHeadModel,
    "bert": hf.BertForMaskedLM,
    "roberta": hf.RobertaForMaskedLM,
    "t5": hf.T5ForConditionalGeneration,
    "vit": hf.ViTForImageClassification,
    "clip": hf.CLIPModel,
}
FAMILIES = tuple(CLASSES)
CLASSES["swin"] = hf.SwinForImageClassification  # its blocks have roles, but no layout by which layers are merged


def model(family: str, seed: int = 0, **changes: Any) -> hf.PreTrainedModel:
    """A model with random weights."""
    torch.manual_seed(seed)
    return CLASSES[family](config(family, **changes)).eval()


def save_model(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save `model(...)` as `save_pretrained` does."""
    model(family, seed, **changes).to(dtype).save_pretrained(folder)
    return folder


def save_fine_tune(folder: Path, base: Path, seed: int, scale: float = 0.02) -> Path:
    """A sibling of the checkpoint at `base`: every float weight moved by noise of relative size `scale`."""
    loaded = getattr(hf, hf.AutoConfig.from_pretrained(base).architectures[0]).from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter += (scale * parameter.float().std().nan_to_num().clamp(min=1e-3) * noise).to(parameter.dtype)
    loaded.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int, **config: Any) -> Path:
    """A LoRA adapter of the causal language model at `base` that changes something; `config` as for `LoraConfig`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(hf.AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder
