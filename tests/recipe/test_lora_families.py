"""Merging adapters and merging whole models agree where it is exact, over families of models and kinds of LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from models import save_model
from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.lineage import Lineage
from regraft.recipe import parse_recipe
from regraft.recipe.run import merge

# family -> modules of two adapters, which overlap; GPT-2's are stored transposed, and one of them is square.
TARGETS = {
    "llama": (["q_proj", "up_proj"], ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (["c_attn", "c_proj"], ["c_proj", "c_fc"]),
    "bert": (["query", "dense"], ["query", "value"]),
    "t5": (["q", "wo"], ["q", "v"]),
    "vit": (["q_proj", "fc1"], ["q_proj", "v_proj"]),
}
# What is peculiar to the two adapters.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "equal ranks": ({"r": 4, "lora_alpha": 16}, {"r": 4, "lora_alpha": 8}),
    "different ranks": ({"r": 2, "lora_alpha": 3}, {"r": 5, "lora_alpha": 32}),
    "rank-stabilised": ({"r": 4, "lora_alpha": 16, "use_rslora": True}, {"r": 8, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"FIRST": 3}},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"FIRST": 2}, "alpha_pattern": {"FIRST": 20}},
    ),
}


def load(folder: Path) -> Any:
    return getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0]).from_pretrained(folder).eval()


def outputs(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 7), generator=generator)
    given: dict[str, torch.Tensor] = {"input_ids": ids}
    if model.config.model_type == "vit":
        given = {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator)}
    if model.config.model_type == "t5":
        given["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**given).logits


def save_adapter(folder: Path, base: Path, seed: int, targets: list[str], kind: dict[str, Any]) -> None:
    first = {"FIRST": targets[0]}
    named = {
        key: {first[module]: n for module, n in value.items()} if key.endswith("_pattern") else value
        for key, value in kind.items()
    }
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(base), peft.LoraConfig(target_modules=targets, **named))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in TARGETS:
        save_model(folder / family, family)
    return folder


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("family", list(TARGETS))
def test_adapters_and_whole_models_agree(family: str, kind: str, bases: Path, tmp_path: Path) -> None:
    base = bases / family
    for seed, (name, targets, options) in enumerate(zip("ab", TARGETS[family], KINDS[kind], strict=True)):
        save_adapter(tmp_path / name, base, seed, targets, options)
    models = "models: {a: {weight: 0.7}, b: {weight: -0.4}}"
    text = (
        f"models: {{base: {base}, a: {base}+{tmp_path}/a, b: {base}+{tmp_path}/b}}\n"
        f"steps: {{x: {{merge: task_arithmetic, base: base, {models}OUTPUT}}}}"
    )
    merge(parse_recipe(text.replace("OUTPUT", ", output: lora")), tmp_path / "lora")
    merge(parse_recipe(text.replace("OUTPUT", "")), tmp_path / "whole")
    assert Lineage.read(tmp_path / "lora").diagnostics["relative_error"] < 1e-5
    applied, untouched = open_checkpoint(f"{base}+{tmp_path}/lora"), load_file(base / "model.safetensors")
    moved = 0
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        torch.testing.assert_close(applied.source(name).read(), value.flatten(), rtol=1e-5, atol=1e-5)
        moved += not torch.equal(value, untouched[name])
    assert moved >= 4
    found = outputs(peft.PeftModel.from_pretrained(load(base), tmp_path / "lora").eval())
    wanted = outputs(load(tmp_path / "whole"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float((outputs(load(base)) - wanted).abs().max()) > 1e-3
