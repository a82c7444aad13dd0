"""Every family's table against a real, tiny model of that family; inference for those without a table."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

import models
from regraft.axes import Layout, Place, layout
from regraft.axes.families import FAMILIES

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}


def _config(family: str) -> Any:
    match family:
        case "gpt2":
            return models.config("gpt2", n_layer=3)
        case "t5":
            return models.config("t5", num_layers=3, num_decoder_layers=2)
        case "vit":
            return models.config("vit", num_hidden_layers=3)
        case "clip":
            text, vision = models.config("clip").text_config, models.config("clip").vision_config
            text.num_hidden_layers, vision.num_hidden_layers = 3, 2
            return hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
        case "clip_text_model" | "clip_vision_model":
            part = "text_config" if "text" in family else "vision_config"
            return getattr(_config("clip"), part)
        case "mt5":
            sizes = {"vocab_size": 96, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 3, "num_heads": 4}
            return hf.MT5Config(**sizes, decoder_start_token_id=0)
        case "distilbert":
            return hf.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=64, n_layers=3, n_heads=4)
        case "deit":
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
            return hf.DeiTConfig(**sizes, num_hidden_layers=3, image_size=8, patch_size=4)
        case "bert" | "roberta" | "camembert" | "xlm-roberta" | "electra":
            return hf.AutoConfig.for_model(family, **ENCODER)
        case _:
            extra = {"num_local_experts": 2} if family == "mixtral" else {}
            return hf.AutoConfig.for_model(family, **DECODER, **extra)


def _classes(family: str) -> list[Any]:
    """Classes with and without a head, so that names come with and without the prefix."""
    causal = [hf.AutoModelForCausalLM, hf.AutoModel, hf.AutoModelForSequenceClassification]
    masked = [hf.AutoModelForMaskedLM, hf.AutoModel, hf.AutoModelForSequenceClassification]
    special: dict[str, list[Any]] = {
        "t5": [hf.T5ForConditionalGeneration, hf.T5EncoderModel, hf.T5ForSequenceClassification],
        "mt5": [hf.MT5ForConditionalGeneration, hf.MT5EncoderModel],
        "vit": [hf.ViTForImageClassification, hf.ViTModel, hf.ViTForMaskedImageModeling],
        "deit": [hf.DeiTForImageClassificationWithTeacher, hf.DeiTModel],
        "clip": [hf.CLIPModel, hf.CLIPForImageClassification],
        "clip_text_model": [hf.CLIPTextModel, hf.CLIPTextModelWithProjection],
        "clip_vision_model": [hf.CLIPVisionModel, hf.CLIPVisionModelWithProjection],
        "gpt2": [*causal, hf.GPT2DoubleHeadsModel],
        "bert": [*masked, hf.BertForPreTraining, hf.BertForQuestionAnswering],
        "granite": causal[:2],
        "electra": [hf.ElectraForMaskedLM, hf.ElectraForPreTraining, hf.ElectraForSequenceClassification],
    }
    if family in special:
        return special[family]
    return masked if family in ("roberta", "camembert", "xlm-roberta", "distilbert") else causal


def _build(make: Any, config: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return make.from_config(config) if hasattr(make, "from_config") else make(config)


def saved(model: hf.PreTrainedModel) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json and tensor shapes as save_pretrained writes them."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        return json.loads((Path(folder) / "config.json").read_text()), shapes


@cache
def examples(family: str) -> list[tuple[str, dict[str, Any], dict[str, list[int]], Any]]:
    made = []
    for make in _classes(family):
        model = _build(make, _config(family))
        made.append((type(model).__name__, *saved(model), model))
    return made


def count_of(config: dict[str, Any], key: str) -> int:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return int(value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_on_disk_has_a_place_and_layers_are_as_configured(family: str) -> None:
    for name, config, shapes, _ in examples(family):
        found = layout(config, shapes)
        assert found.known
        assert found.family == config["model_type"] == family
        assert found.unplaced(shapes) == [], name
        assert found.stacks
        for stack, layers in found.stacks.items():
            assert layers == count_of(config, found.layer_count_key[stack])
        for tensor in shapes:
            place = found.place(tensor)
            assert (place.layer is None) == (place.num_layers is None)
            if place.layer is not None:
                assert place.layer < found.stacks[place.stack]
                assert place.part in ("attention", "ffn", "norm")
                assert place.position == "inside"


@pytest.mark.parametrize("family", FAMILIES)
def test_renaming_to_another_layer_gives_the_twin_of_the_same_shape(family: str) -> None:
    for _, config, shapes, _ in examples(family):
        found = layout(config, shapes)
        for name, shape in shapes.items():
            place = found.place(name)
            if place.layer is None:
                with pytest.raises(ValueError, match="outside the layers"):
                    found.renamed(name, 0)
                continue
            assert found.renamed(name, place.layer) == name
            for other in range(found.stacks[place.stack]):
                twin = found.renamed(name, other)
                if "relative_attention_bias" not in name:  # only in the first layer of T5
                    assert shapes[twin] == shape
                assert found.place(twin) == replace(place, layer=other)
                assert (place.role, place.position) == ("", "inside")
                assert found.renamed(twin, place.layer) == name


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_agree_with_the_modules_of_the_model(family: str) -> None:
    """transformers itself says which module embeds and which one is the output layer."""
    for _, config, shapes, model in examples(family):
        found = layout(config, shapes)
        names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in shapes}
        if config["model_type"] != "clip":
            embedding = next(model.get_input_embeddings().parameters())
            assert found.place(names[id(embedding)]).role == "embedding"
            assert found.place(names[id(embedding)]).position == "before"
        output = model.get_output_embeddings()
        if output is not None and id(output.weight) in names and output.weight is not embedding:
            assert found.place(names[id(output.weight)]).role == "head"
            assert found.place(names[id(output.weight)]).position == "after"
        for name in shapes:
            if name.startswith(("classifier", "score", "cls_classifier", "qa_outputs", "classification_head")):
                assert found.place(name).role == "head"


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_that_are_stored_transposed_are_those_of_such_modules(family: str) -> None:
    for _, config, shapes, model in examples(family):
        found = layout(config, shapes)
        turned = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
        for name, parameter in model.named_parameters():
            if name in shapes:
                assert found.place(name).transposed == (id(parameter) in turned), name


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_pairs_are_those_that_transformers_shares(family: str) -> None:
    for _, config, shapes, model in examples(family):
        found = layout(config, shapes)
        shared: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(parameter), []).append(name)
        expected = {}
        for group in shared.values():
            stored = [name for name in group if name in shapes]
            if stored:  # some files use other names than the modules in memory
                expected.update({name: stored[0] for name in group if name not in shapes})
        pairs = dict(found.tied)
        for alias, canonical in expected.items():
            assert pairs[alias] == canonical
        assert all(canonical in shapes for canonical in pairs.values() if canonical.endswith("weight"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vocabulary_is_counted_by_just_the_dimensions_that_have_its_size(family: str) -> None:
    size = 101  # of nothing else
    for make in _classes(family):
        config = _config(family)
        text = getattr(config, "text_config", config)
        if hasattr(text, "vocab_size"):
            text.vocab_size = size
        written, shapes = saved(_build(make, config))
        found = layout(written, shapes)
        axes = {name: found.vocabulary_axis(name) for name in shapes}
        assert {n: a for n, a in axes.items() if a is not None} == {
            n: shape.index(size) for n, shape in shapes.items() if size in shape
        }
        if found.tokens in shapes:
            assert axes[found.tokens] == 0
            assert count_of(written, found.vocabulary_key) == size


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_state_dict_without_a_configuration_is_read_by_the_table_that_explains_it(family: str) -> None:
    for _, config, shapes, model in examples(family)[:2]:
        with_config = layout(config, shapes)
        for names in (list(shapes), list(model.state_dict())):
            found = layout({}, names)
            assert found.known
            assert found.family == ""
            assert sorted(found.stacks.values()) == sorted(with_config.stacks.values())
            assert found.tied == ()


def test_untied_models_have_no_pairs_and_old_configurations_take_the_default_of_their_family() -> None:
    llama = ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    assert layout({"model_type": "llama"}, llama).tied == ()
    assert layout({"model_type": "llama", "tie_word_embeddings": True}, llama).tied == (
        ("lm_head.weight", "model.embed_tokens.weight"),
    )
    gpt2 = ["wte.weight", "h.0.attn.c_attn.weight"]
    assert layout({"model_type": "gpt2"}, gpt2).tied == (("lm_head.weight", "wte.weight"),)
    assert layout({"model_type": "gpt2", "tie_word_embeddings": False}, gpt2).tied == ()


def test_a_file_that_keeps_the_head_and_drops_the_embedding_has_the_pair_the_other_way_round() -> None:
    names = ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    found = layout({"model_type": "llama", "tie_word_embeddings": True}, names)
    assert found.tied == (("model.embed_tokens.weight", "lm_head.weight"),)


def test_names_of_original_hub_checkpoints() -> None:
    names = ["wte.weight", "h.0.attn.bias", "h.0.attn.c_attn.weight", "h.11.ln_1.bias"]
    old_gpt2 = layout({"model_type": "gpt2"}, names)
    assert old_gpt2.place("h.0.attn.bias") == Place(0, 12, "", "buffer", "inside", "attention")
    assert old_gpt2.place("h.0.attn.c_attn.bias").role == ""
    assert old_gpt2.place("h.0.attn.c_attn.bias").part == "attention"
    names = [
        "bert.embeddings.LayerNorm.gamma",
        "bert.embeddings.position_ids",
        "bert.encoder.layer.0.attention.output.LayerNorm.beta",
        "cls.predictions.decoder.weight",
        "cls.seq_relationship.weight",
    ]
    bert = layout({"model_type": "bert"}, names)
    assert [bert.place(n).role for n in names] == ["norm", "buffer", "", "head", "head"]
    assert bert.place(names[0]).position == "before"
    assert bert.place(names[2]).part == "norm"
    llama = layout({"model_type": "llama"}, ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight"])
    assert llama.place("model.layers.0.self_attn.rotary_emb.inv_freq").role == "buffer"
    assert llama.place("model.norm.weight") == Place(None, None, "", "norm", "after")


def shapes_of(config: Any, auto: Any) -> tuple[dict[str, Any], Layout, dict[str, list[int]]]:
    written, shapes = saved(_build(auto, config))
    return written, layout(written, shapes), shapes


def test_layers_of_families_without_a_table_are_inferred() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    neox = hf.GPTNeoXConfig(vocab_size=96, **sizes)
    written, found, shapes = shapes_of(neox, hf.AutoModelForCausalLM)
    assert not found.known
    assert found.family == "gpt_neox"
    assert found.stacks == {"": 3}
    assert found.layer_count_key == {"": "num_hidden_layers"}
    assert found.place("gpt_neox.embed_in.weight") == Place(None, None, "", "embedding", "before")
    assert found.place("gpt_neox.final_layer_norm.weight") == Place(None, None, "", "norm", "after")
    assert found.place("embed_out.weight").layer is None
    assert found.place("gpt_neox.layers.1.attention.dense.weight") == Place(1, 3, "", "", "inside", "attention")
    assert found.renamed("gpt_neox.layers.1.attention.dense.weight", 2) == "gpt_neox.layers.2.attention.dense.weight"
    assert written["model_type"] == "gpt_neox"
    assert set(shapes) >= {"gpt_neox.layers.2.attention.dense.weight"}


def test_two_stacks_are_inferred_with_names_that_tell_them_apart() -> None:
    sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4}
    bart = hf.BartConfig(vocab_size=96, **sizes, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
    _, found, _ = shapes_of(bart, hf.AutoModelForSeq2SeqLM)
    assert not found.known
    assert found.stacks == {"encoder": 3, "decoder": 2}
    assert found.layer_count_key == {}


def test_wrapped_names_of_a_known_family_fall_back_to_inference() -> None:
    names = [f"module.model.layers.{i}.mlp.{p}.weight" for i in range(2) for p in ("up_proj", "down_proj")]
    found = layout({"model_type": "llama", "num_hidden_layers": 2}, names)
    assert not found.known
    assert found.stacks == {"": 2}


@pytest.mark.parametrize(
    "names",
    [
        ["tensor"],
        ["0.weight", "2.weight"],
        ["classifier.0.weight", "classifier.1.weight"],
        ["body.1.weight", "body.2.weight"],
        ["stages.0.blocks.0.w", "stages.1.blocks.0.w", "stages.1.blocks.1.w", "stages.1.down.w"],
    ],
)
def test_numbers_that_count_no_layers_are_not_taken_for_layers(names: list[str]) -> None:
    found = layout({}, names)
    assert not found.known
    assert found.stacks == {}
    assert all(found.place(n).layer is None for n in names)
