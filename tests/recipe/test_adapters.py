"""LoRA adapters in recipes: `model+adapter` merges as the folded model would."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file

from models import save_adapter, save_model
from regraft.recipe import parse_recipe
from regraft.recipe.run import merge

TARGETS = {"r": 4, "target_modules": ["q_proj", "up_proj"]}


def test_experts_that_are_adapters_of_one_base(tmp_path: Path) -> None:
    from peft import PeftModel

    base = save_model(tmp_path / "base", "llama")
    for i, name in enumerate("ab"):
        save_adapter(tmp_path / name, base, i, **TARGETS)
    text = (
        "models: {base: ./base, a: ./base+./a, b: ./base+./b}\n"
        "steps:\n  x: {merge: task_arithmetic, base: base, models: [a, b], weight: 0.5}\n"
    )
    out = merge(parse_recipe(text, path=tmp_path / "recipe.yaml"), tmp_path / "out")
    folded = []
    for name in "ab":
        model = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), tmp_path / name)
        folded.append(model.merge_and_unload().state_dict())
    for name, value in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(value, (folded[0][name] + folded[1][name]) / 2, rtol=1e-5, atol=1e-6)
    hf.AutoModelForCausalLM.from_pretrained(out)
