"""LoRA in the loop: what of a model gets an adapter, and PEFT models taken apart and put together again.

Modules are chosen by role, as everywhere. Both factors of a low-rank layer get an adapter each (of a layer that is
several products in one, the first), so that a compressed model can be fine-tuned as it is. PEFT makes the adapter,
saves it and merges it; nothing here computes with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from regraft.adapters.folder import task_of
from regraft.axes.module_map import check_roles, modules_of
from regraft.checkpoint.weights import ADAPTER_CONFIG
from regraft.errors import UserError
from regraft.inspect.rows import need
from regraft.methods import Options
from regraft.resize.low_rank import LowRankLinear, is_linear

_GIVEN = ("lora_alpha", "lora_dropout", "lora_modules", "lora_output")


class LoraOptions(Options):
    """Train a LoRA adapter instead of the weights."""

    lora_rank: int | None = Field(
        None, ge=1, description="rank of a LoRA adapter that is trained instead of the weights; none to train these"
    )
    lora_alpha: float | None = Field(None, gt=0, description="the adapter counts alpha / rank; 2 rank if not given")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs that are left out")
    lora_modules: tuple[str, ...] = Field(("attention", "ffn"), description="roles of the layers that get an adapter")
    lora_output: Literal["merged", "adapter"] = Field(
        "merged", description="save the model with the adapter in its weights, or the adapter alone, for PEFT"
    )

    @model_validator(mode="after")
    def _lora_is_wanted(self) -> LoraOptions:
        check_roles(self.lora_modules)
        given = [name for name in _GIVEN if name in self.model_fields_set]
        changed = [n for n in given if getattr(self, n) != type(self).model_fields[n].default]
        if changed and self.lora_rank is None:
            raise ValueError(f"{changed[0]} has no place without lora_rank")
        return self


def makes_adapter(options: Any) -> bool:
    """Whether a method with these options gives an adapter instead of a model."""
    return getattr(options, "lora_output", "merged") == "adapter"


def adapted(model: Any, options: LoraOptions, *, seed: int = 0) -> Any:
    """The PEFT model of a model and a new adapter; the model's own weights are frozen.

    A classifier's head, with the pooler before it, is trained and saved as a whole: a new one is in no checkpoint.

    Raises:
        UserError: RG602 without peft, RG308 if no layer has one of the roles, RG208 for a family without a table.
    """
    peft = need("peft", "train", "an adapter")
    import torch

    assert options.lora_rank is not None
    roles = modules_of(model)
    modules = dict(model.named_modules())
    targets: list[str] = []
    for name, place in roles.places.items():
        if any(place.has(role) for role in options.lora_modules):
            if isinstance(modules[name], LowRankLinear):
                # Of several products in one the second factors are no layer that is called.
                targets += [f"{name}.down", *([f"{name}.up"] if modules[name].parts == 1 else [])]
            elif is_linear(modules[name]):
                targets.append(name)
    if not targets:
        what = f"no linear layer has a role of {', '.join(options.lora_modules)}"
        raise UserError("RG308", what, fix="name other roles in lora_modules, such as attention or ffn")
    heads = roles.find("head") + roles.find("pooler") if "Classification" in type(model).__name__ else []
    heads = [name for name in heads if not any(name.startswith(f"{other}.") for other in heads)]
    config = peft.LoraConfig(
        task_type=task_of(type(model).__name__),
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        modules_to_save=heads or None,
        fan_in_fan_out=all(type(modules[name]).__name__ == "Conv1D" for name in targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    if config.modules_to_save:  # for some tasks PEFT has put its own names of heads behind ours
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return wrapped


def apart(model: Any) -> tuple[Any, Any | None]:
    """(the transformers model within, the PEFT model) of a PEFT model; (model, None) of any other.

    Raises:
        UserError: RG309 for PEFT methods that work outside the model, on its inputs.
    """
    if not hasattr(model, "get_base_model") or not hasattr(model, "peft_config"):
        return model, None
    config = model.active_peft_config
    if config.is_prompt_learning:
        what = f"{config.peft_type.value} adds to the inputs of a model, where objectives do not see it"
        raise UserError("RG309", what, fix="use a method that adapts layers, such as LoRA")
    return model.get_base_model(), model


def save_adapter(adapter: Any, folder: Path, *, base: str = "", revision: str | None = None) -> None:
    """Write the adapter of a PEFT model as PEFT does.

    Args:
        base: what the adapter is to be loaded on, as adapter_config.json says.
    """
    adapter.save_pretrained(str(folder), save_embedding_layers=False)
    if base:
        path = folder / ADAPTER_CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base, "revision": revision}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def restore_adapter(adapter: Any, folder: Path) -> None:
    """Put the weights of a saved adapter into a PEFT model."""
    import peft
    from safetensors.torch import load_file

    from regraft.adapters.folder import WEIGHTS

    peft.set_peft_model_state_dict(adapter, load_file(folder / WEIGHTS))
