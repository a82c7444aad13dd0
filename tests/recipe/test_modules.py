"""mergekit's `modules:`: parts of a model that are merged by settings of their own, under mergekit's names for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from models import FAMILIES, VOCAB, save_fine_tune, save_model
from regraft.axes import Modules, layout
from regraft.checkpoint import open_checkpoint
from regraft.errors import UserError
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import merge
from regraft.recipe.settings import Settings

HALVES = "models: [{model: ./a, parameters: {weight: 0.5}}, {model: ./b, parameters: {weight: 0.5}}]"


def save_family(folder: Path, family: str, **changes: Any) -> Path:
    base = save_model(folder / "base", family, **changes)
    for seed, name in enumerate("ab", 1):
        save_fine_tune(folder / name, base, seed)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("t5"), "t5", num_layers=3, num_decoder_layers=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("clip"), "clip")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("llama"), "llama")


def read(folder: Path, text: str) -> Any:
    return parse_recipe(text, path=folder / "m.yaml")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def refused(folder: Path, text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        make_plan(read(folder, text))
    return caught.value


def module_names(folder: Path) -> tuple[str, ...]:
    model = open_checkpoint(str(folder))
    return Modules(model.config, layout(model.config, model.tensors), model.tensors).names


@pytest.mark.parametrize("family", FAMILIES)
def test_each_module_like_all_of_it_is_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path, family)
    names = module_names(folder / "a")
    expected = {
        "t5": ("decoder", "encoder", "shared"),
        "clip": ("text_model.encoder.layers", "vision_model.encoder.layers", "default"),
    }
    assert names == expected.get(family, ("default",))
    parts = "\n".join(f"  {name}: {{{HALVES}}}" for name in names)
    by_module = merge(read(folder, f"merge_method: linear\nmodules:\n{parts}\n"), tmp_path / "modules")
    whole = merge(read(folder, f"merge_method: linear\n{HALVES}\n"), tmp_path / "whole")
    one, other = weights(by_module), weights(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)
    config, same = (json.loads((out / "config.json").read_text()) for out in (by_module, whole))
    assert config == same


def test_each_module_has_its_own_models_and_settings(t5: Path, tmp_path: Path) -> None:
    text = """
merge_method: task_arithmetic
base_model: ./base
modules:
  encoder:
    models: [{model: ./a}]
    parameters: {weight: 0.25}
  decoder:
    models: [{model: ./b, parameters: {weight: [1, 2]}}]
  shared:
    models: [{model: ./a}]
parameters: {weight: 3}
"""
    out = merge(read(t5, text), tmp_path / "out")
    base, a, b, made = (weights(p) for p in (t5 / "base", t5 / "a", t5 / "b", out))
    assert made.keys() == base.keys()
    for name, value in made.items():
        if name.startswith("encoder."):
            expected = base[name] + 0.25 * (a[name].double() - base[name])
        elif name.startswith("decoder."):
            factor = 2 if name.startswith("decoder.block.1.") else 1  # behind the layers lists count from their start
            expected = base[name] + factor * (b[name].double() - base[name])
        else:
            expected = base[name] + 3 * (a[name].double() - base[name])
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_the_layers_of_one_module_are_stacked(t5: Path, tmp_path: Path) -> None:
    text = """
merge_method: passthrough
modules:
  encoder:
    slices:
      - sources: [{model: ./a, layer_range: [1, 3]}]
      - sources: [{model: ./b, layer_range: [0, 2]}]
  decoder: {models: [{model: ./base}]}
  shared: {models: [{model: ./b}]}
"""
    out = merge(read(t5, text), tmp_path / "out")
    base, a, b, made = (weights(p) for p in (t5 / "base", t5 / "a", t5 / "b", out))
    bias = "SelfAttention.relative_attention_bias.weight"
    for target, (source, layer) in enumerate([(a, 1), (a, 2), (b, 0), (b, 1)]):
        for name, value in source.items():
            if name.startswith(f"encoder.block.{layer}.") and bias not in name:
                assert torch.equal(made[name.replace(f"block.{layer}.", f"block.{target}.")], value)
    # Positions are the first layer's, for all of them; what lies before the layers is from the first slice.
    assert [name for name in made if bias in name and "encoder" in name] == [f"encoder.block.0.layer.0.{bias}"]
    assert torch.equal(made[f"encoder.block.0.layer.0.{bias}"], a[f"encoder.block.0.layer.0.{bias}"])
    assert torch.equal(made["encoder.final_layer_norm.weight"], b["encoder.final_layer_norm.weight"])
    assert all(torch.equal(made[n], base[n]) for n in base if n.startswith("decoder."))
    assert torch.equal(made["shared.weight"], b["shared.weight"])
    config = json.loads((out / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (4, 2)
    loaded, info = hf.T5ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 11).unsqueeze(0) % VOCAB
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 1


def test_a_decoder_whose_number_of_layers_is_not_written_keeps_its_own(t5: Path, tmp_path: Path) -> None:
    folder = save_family(tmp_path, "t5", num_layers=2)
    for name in ("base", "a", "b"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        del config["num_decoder_layers"]  # then it is that of the encoder
        path.write_text(json.dumps(config))
    slices = "{slices: [{sources: [{model: ./a, layer_range: [0, 1]}]}]}"
    rest = "{models: [{model: ./a}]}"
    text = f"merge_method: passthrough\nmodules: {{encoder: {slices}, decoder: {rest}, shared: {rest}}}\n"
    config = json.loads((merge(read(folder, text), tmp_path / "out") / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (1, 2)


def test_one_tower_of_clip_is_stacked(clip: Path, tmp_path: Path) -> None:
    whole = "{models: [{model: ./a}]}"
    slices = ", ".join(f"{{sources: [{{model: ./{m}, layer_range: [0, 2]}}]}}" for m in "ab")
    text = (
        f"merge_method: passthrough\nmodules:\n  default: {whole}\n  text_model.encoder.layers: {whole}\n"
        f"  vision_model.encoder.layers: {{slices: [{slices}]}}\n"
    )
    out = merge(read(clip, text), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 4
    assert config["text_config"]["num_hidden_layers"] == 2
    _, info = hf.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize(
    "body",
    [
        f"{HALVES}\nparameters: {{normalize: false}}",
        "slices: [{sources: [{model: ./a, layer_range: [0, 2]}, {model: ./b, layer_range: [0, 2]}]}]\n"
        "parameters: {weight: 0.3}",
    ],
)
def test_one_module_is_the_same_as_none(llama: Path, tmp_path: Path, body: str) -> None:
    plain = merge(read(llama, f"merge_method: linear\n{body}\n"), tmp_path / "plain")
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    module = merge(read(llama, f"merge_method: linear\nmodules:\n  default:\n{indented}\n"), tmp_path / "module")
    one, other = weights(plain), weights(module)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (plain / "config.json").read_text() == (module / "config.json").read_text()


def test_what_a_module_says_comes_before_what_the_recipe_says(llama: Path) -> None:
    module = "{default: {models: [{model: ./a}, {model: ./b, parameters: {weight: 7}}], parameters: {weight: 2}}}"
    text = f"merge_method: linear\nmodules: {module}\nparameters: {{weight: 1, normalize: false}}\n"
    (planned,) = make_plan(read(llama, text)).merges
    options: Any = planned.jobs[0].options
    assert options.weight == (2, 7)
    assert options.normalize is False


def test_filters_see_the_names_that_the_models_have(llama: Path) -> None:
    """mergekit's meaning: options per model by the name in that model, all others by the name in the result."""
    sources = "{model: ./a, layer_range: [1, 2]}, {model: ./b, layer_range: [0, 1]}"
    by_layer = "[{filter: layers.1., value: 3}, {value: 1}]"
    text = (
        f"merge_method: linear\nslices: [{{sources: [{sources}]}}]\n"
        f"parameters: {{weight: {by_layer}, normalize: [{{filter: layers.0., value: false}}, {{value: true}}]}}\n"
    )
    (planned,) = make_plan(read(llama, text)).merges
    options: Any = next(job.options for job in planned.jobs if ".layers.0." in job.info.name)
    assert (options.weight, options.normalize) == ((3, 1), False)


def slices_with_bases(first: str, second: str, top: str = "") -> str:
    parts = [
        f"{{base_model: ./{base}, sources: [{{model: ./{base}, layer_range: [0, 1]}}, "
        f"{{model: ./{other}, layer_range: [{layer}, {layer + 1}]}}]}}"
        for base, other, layer in ((first, "b", 0), (second, "base", 1))
    ]
    return f"merge_method: task_arithmetic\n{top}slices: [{', '.join(parts)}]\nparameters: {{weight: 0.5}}\n"


def test_slices_have_bases_of_their_own(llama: Path, tmp_path: Path) -> None:
    out = merge(read(llama, slices_with_bases("base", "a")), tmp_path / "out")
    base, a, b, made = (weights(p) for p in (llama / "base", llama / "a", llama / "b", out))

    def moved(start: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return start.double() + 0.5 * (to.double() - start.double())

    for name, value in made.items():
        if ".layers.0." in name or "embed" in name:
            expected = moved(base[name], b[name])
        elif ".layers.1." in name:
            expected = moved(a[name.replace(".1.", ".0.", 1)], base[name])
        else:
            expected = moved(a[name], base[name])
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    lineage = json.loads((out / "regraft.json").read_text())
    assert {i["name"]: i["role"] for i in lineage["inputs"]} == {"./base": "base", "./a": "base", "./b": "model"}
    (planned,) = make_plan(read(llama, slices_with_bases("base", "a", "base_model: ./b\n"))).merges
    assert planned.template.name == "./b"  # whose configuration and other files it gets


def test_slerp_starts_at_the_base_of_its_slice(llama: Path, tmp_path: Path) -> None:
    both = "sources: [{model: ./a, layer_range: [0, 1]}, {model: ./b, layer_range: [0, 1]}]"
    slices = f"[{{base_model: ./a, {both}}}, {{base_model: ./b, {both}}}]"
    text = f"merge_method: slerp\nslices: {slices}\nparameters: {{t: 0}}\n"
    made = weights(merge(read(llama, text), tmp_path / "out"))
    for layer, source in ((0, "a"), (1, "b")):
        for name, value in weights(llama / source).items():
            if ".layers.0." in name:
                assert torch.equal(made[name.replace(".0.", f".{layer}.", 1)], value)


def test_the_same_layers_of_other_models_are_another_result(llama: Path) -> None:
    def key(names: str) -> str:
        slices = ", ".join(f"{{sources: [{{model: ./{n}, layer_range: [0, 1]}}]}}" for n in names)
        (planned,) = make_plan(read(llama, f"merge_method: passthrough\nslices: [{slices}]\n")).merges
        return planned.key

    assert key("aba") == key("aba")
    assert len({key("aba"), key("abb"), key("aab")}) == 3


LEFT = "modules: {encoder: {models: [{model: ./a}]}, decoder: {models: [{model: ./a}]}}\n"
ALL = "modules: {encoder: %s, decoder: {models: [{model: ./a}]}, shared: %s}\n"
WHOLE = "{models: [{model: ./a}]}"
SLICED = "{slices: [{sources: [{model: ./a, layer_range: [%s]}]}]}"


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (LEFT, "RG309", "modules says nothing of shared"),
        (
            LEFT.replace("encoder", "encodr"),
            "RG307",
            "its modules are decoder, encoder, shared",
        ),
        (LEFT.replace("encoder", "default"), "RG307", "no module default"),
        (ALL % (WHOLE, SLICED % "0, 1"), "RG208", "none are known of the module shared of t5"),
        (ALL % (SLICED % "0, 4", WHOLE), "RG303", "layers 0 to 4 of ./a, which has layers 0 to 3"),
        (
            "slices: [{sources: [{model: ./a, layer_range: [0, 1]}]}]\n",
            "RG208",
            "its modules: decoder, encoder, shared",
        ),
        ("modules: {}\n", "RG303", "modules is empty"),
        ("modules: [encoder]\n", "RG303", "the name of each module"),
        ("modules: {encoder: {}}\n", "RG303", "encoder has neither models nor slices"),
        (f"modules: {{encoder: {WHOLE[:-1]}, slices: []}}}}\n", "RG303", "encoder has both models and slices"),
        (f"modules: {{encoder: {WHOLE}}}\nmodels: [{{model: ./a}}]\n", "RG303", "both models and modules"),
        (f"modules: {{encoder: {WHOLE[:-1]}, base_model: ./a}}}}\n", "RG302", "a module has no key 'base_model'"),
        (f"modules: {{encoder: {WHOLE[:-1]}, weight_prefix: x}}}}\n", "RG302", "a module has no key 'weight_prefix'"),
        ("modules: {encoder: {models: [{model: ./a}], parameters: {weight: 1}}}\n", "RG302", "no option 'weight'"),
    ],
)
def test_mistakes(t5: Path, text: str, code: str, says: str) -> None:
    error = refused(t5, f"merge_method: passthrough\n{text}")
    assert error.code == code, str(error)
    assert says in str(error), str(error)
    assert error.where.startswith("m.yaml, line ")


def test_a_tensor_that_only_another_model_of_a_module_has(t5: Path, tmp_path: Path) -> None:
    deeper = save_model(tmp_path / "deeper", "t5", num_layers=4, num_decoder_layers=2)
    both = f"{{models: [{{model: ./a}}, {{model: {deeper}}}]}}"
    one = "{models: [{model: ./a}]}"
    slices = "{slices: [{sources: [{model: ./a, layer_range: [0, 1]}]}]}"
    parts = f"{{encoder: {both}, decoder: {slices}, shared: {one}}}"
    text = f"merge_method: linear\nmodules: {parts}\nparameters: {{weight: 1}}\n"
    error = refused(t5, text)
    assert (error.code, error.what.partition(" that ")[2]) == ("RG202", "./a lacks")
    assert "encoder.block.3" in error.what


# Small models of the families of several modules that regraft has no table of layers for, with the names in mergekit's
# own files on them.
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWER = {**VISION, "image_size": 8, "patch_size": 4}
QWEN = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def several(kind: str) -> Any:
    match kind:
        case "whisper":
            sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
                     (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
            config = hf.WhisperConfig(
                **sizes, vocab_size=VOCAB, d_model=32, num_mel_bins=8, max_source_positions=8, max_target_positions=8,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )  # fmt: skip
            return hf.WhisperForConditionalGeneration(config)
        case "gemma3":
            config = hf.Gemma3Config(text_config=TEXT, vision_config=TOWER, mm_tokens_per_image=4)
            return hf.Gemma3ForConditionalGeneration(config)
        case "mistral3":
            vision = {**TOWER, "model_type": "pixtral", "head_dim": 8}
            config = hf.Mistral3Config(text_config={**TEXT, "model_type": "mistral"}, vision_config=vision)
            return hf.Mistral3ForConditionalGeneration(config)
        case "qwen2_vl":
            config = hf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=QWEN)
            return hf.Qwen2VLForConditionalGeneration(config)
    raise KeyError(kind)


MODULES = {
    "whisper": ("decoder", "encoder"),
    "gemma3": ("text_decoder", "multi_modal_projector", "vision_tower"),
    "mistral3": ("text_decoder", "multi_modal_projector", "vision_tower"),
    "qwen2_vl": ("text_decoder", "multi_modal_projector", "vision_tower"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_families_of_several_modules(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    several(kind).save_pretrained(tmp_path / "base")
    save_fine_tune(tmp_path / "a", tmp_path / "base", 1)
    assert module_names(tmp_path / "a") == MODULES[kind]
    first, *others = MODULES[kind]
    rest = "".join(f"  {name}: {{models: [{{model: ./a}}]}}\n" for name in others)
    slices = ", ".join("{sources: [{model: ./a, layer_range: [0, 2]}]}" for _ in range(2))
    out = merge(read(tmp_path, f"merge_method: passthrough\nmodules:\n{rest}  {first}: {{slices: [{slices}]}}\n"),
                tmp_path / "out")  # fmt: skip
    made, a = weights(out), weights(tmp_path / "a")
    assert all(torch.equal(made[name], value) for name, value in a.items())
    grown = [name for name in made if name not in a]
    assert len(grown) == len([name for name in a if ".layers." in name and module_of(name, kind) == first])
    _, info = type(several(kind)).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def module_of(name: str, kind: str) -> str:
    if kind == "whisper":
        return "decoder" if ".decoder." in name else "encoder"
    return "vision_tower" if "vision" in name or "visual" in name else "text_decoder"


def test_settings_reach_every_part(llama: Path, tmp_path: Path) -> None:
    """Workers and chunks change nothing in a model made of parts."""
    text = f"merge_method: linear\nmodules:\n  default: {{{HALVES}}}\n"
    one = merge(read(llama, text), tmp_path / "one", Settings(workers=1, chunk=100))
    other = merge(read(llama, text), tmp_path / "other", Settings(workers=3))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())
