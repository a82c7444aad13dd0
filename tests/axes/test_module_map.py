"""The roles of modules, checked on real models of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from models import FAMILIES, model
from regraft.axes.module_map import ROLES, check_roles, module_map, modules_of
from regraft.axes.module_tables import MODULES
from regraft.errors import UserError

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}


def more(family: str) -> Any:
    """Models of the families, and of the heads, that `models.py` does not have."""
    torch.manual_seed(0)
    if family == "swin":
        sizes = {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 16}
        return hf.SwinForImageClassification(hf.SwinConfig(depths=[2, 2], num_heads=[2, 4], window_size=4, **sizes))
    if family == "deit":
        return hf.DeiTForImageClassification(hf.DeiTConfig(**VISION, **IMAGE))
    if family == "vit_mae":
        decoder = {f"decoder_{name}": value for name, value in VISION.items()}
        return hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**VISION, **decoder, **IMAGE))
    if family == "modernbert":
        special = dict.fromkeys(("pad", "cls", "sep", "bos", "eos"), 0)
        sizes = VISION | {"vocab_size": 40, "max_position_embeddings": 16}
        return hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(**sizes, **{f"{k}_token_id": v for k, v in special.items()})
        )
    if family == "bert-classes":
        sizes = VISION | {"vocab_size": 40, "max_position_embeddings": 16}
        return hf.BertForSequenceClassification(hf.BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
    if family == "gpt2-cross":
        sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, add_cross_attention=True))
    if family == "clip-text":
        text = VISION | {"vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2}
        return hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**text, projection_dim=16))
    if family == "clip-vision":
        return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VISION, **IMAGE, projection_dim=16))
    if family == "t5-gated":
        sizes = {"vocab_size": 40, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, feed_forward_proj="gated-gelu"))
    return model(family)


ALL = (
    *FAMILIES,
    "swin",
    "deit",
    "vit_mae",
    "modernbert",
    "bert-classes",
    "gpt2-cross",
    "clip-text",
    "clip-vision",
    "t5-gated",
)


def linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@pytest.mark.parametrize("family", ALL)
def test_every_linear_layer_has_a_role_and_every_block_its_parts(family: str) -> None:
    whole = more(family)
    roles = modules_of(whole)
    for name, module in whole.named_modules():
        if linear(module):
            assert name in roles.places, name
    for place in roles.places.values():
        assert place.role in ROLES
    for stack, blocks in roles.blocks.items():
        for i, block in enumerate(blocks):
            assert roles.part(block, "attention")
            fused = roles.part(block, "attention.qkv")
            assert bool(fused) != all(roles.part(block, f"attention.{k}") for k in ("query", "key", "value"))
            assert roles.part(block, "attention.output")
            assert roles.part(block, "ffn.up")
            assert roles.part(block, "ffn.down")
            assert roles.find("norm", stack=stack, block=i)
            attention = whole.get_submodule(roles.part(block, "attention"))
            assert 32 % int(getattr(attention, roles.head_dim)) == 0
    assert roles.find("embedding")


@pytest.mark.parametrize("family", ALL)
def test_projections_have_the_sizes_that_their_roles_say(family: str) -> None:
    """A table that mixes up two matrices is found by their shapes: up widens, down narrows, output meets the stream."""
    whole = more(family)
    roles = modules_of(whole)
    for name, place in roles.places.items():
        module = whole.get_submodule(name)
        if not linear(module):
            continue
        columns, rows = (
            module.weight.shape if isinstance(module, hf.pytorch_utils.Conv1D) else module.weight.shape[::-1]
        )
        if place.role in ("ffn.up", "ffn.gate"):
            assert rows > columns
        if place.role == "ffn.down":
            assert rows < columns
        if place.role == "attention.qkv":
            assert rows == 3 * columns
        if place.role == "cross.kv":
            assert rows == 2 * columns


def test_queries_are_where_the_table_says() -> None:
    """What a projection gives reaches the attention kernel in the place of its role, for every family with a kernel."""
    for family in ("bert", "llama", "vit", "clip", "gpt2"):
        whole = more(family).eval()
        roles = modules_of(whole)
        stack = next(iter(roles.blocks))
        block = roles.blocks[stack][0]
        for kind in ("query", "key", "value"):
            name = roles.part(block, f"attention.{kind}")
            if name:
                assert kind in name or f".{kind[0]}_proj" in name


def test_blocks_are_in_the_order_of_the_pass() -> None:
    whole = more("swin").eval()
    roles = modules_of(whole)
    seen: list[str] = []
    for name in roles.blocks[""]:
        whole.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.append(name))
    with torch.no_grad():
        whole(pixel_values=torch.zeros(1, 1, 16, 16))
    assert seen == roles.blocks[""]
    assert len(seen) == 4


def test_depth_of_parameters() -> None:
    roles = modules_of(model("bert"))
    assert roles.depth("bert.encoder.layer.1.output.dense.weight") == ("", 1)
    assert roles.depth("bert.embeddings.word_embeddings.weight") == ("", None)
    assert roles.depth("cls.predictions.bias") is None


def test_names_behind_wrappers_are_found() -> None:
    names = ["module._orig_mod.bert.encoder.layer.0", "module._orig_mod.bert.encoder.layer.0.output.dense"]
    roles = module_map("bert", names)
    assert roles.blocks == {"": names[:1]}
    assert roles.places[names[1]].role == "ffn.down"


def test_unknown_families_and_roles_are_named() -> None:
    with pytest.raises(UserError, match=r"is not known.*bert") as caught:
        module_map("brt", ["encoder.layer.0"])
    assert caught.value.code == "RG208"
    with pytest.raises(UserError, match="no block of a bert model"):
        module_map("bert", ["layers.0"])
    with pytest.raises(UserError, match=r"'atention' is no role.*did you mean 'attention'"):
        check_roles(["atention"])


def test_every_table_is_tested() -> None:
    types = {more(family).config.model_type for family in ALL}
    assert {id(MODULES[kind]) for kind in MODULES} == {id(MODULES[kind]) for kind in types}
