"""Every family, end to end: two fine-tunes and their base become one model that transformers loads and runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from models import CLASSES, FAMILIES, VOCAB, save_fine_tune, save_model
from regraft.merge import iso_cts
from regraft.recipe import parse_recipe
from regraft.recipe.run import merge


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    base = save_model(folder / "base", request.param)
    save_fine_tune(folder / "a", base, 1)
    save_fine_tune(folder / "b", base, 2)
    return request.param, folder


def recipe(folder: Path, body: str) -> object:
    text = f"models: {{base: ./base, a: ./a, b: ./b}}\nsteps:\n  merged: {body}\n"
    return parse_recipe(text, path=folder / "recipe.yaml")


def use(name: str, model: hf.PreTrainedModel) -> torch.Tensor:
    """Generate or classify: whatever the family is for."""
    ids = torch.arange(3, 11).unsqueeze(0) % VOCAB
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    with torch.inference_mode():
        if name in ("llama", "qwen2", "mistral", "gpt2", "t5"):
            out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert out.shape[1] > 1
            return model(ids, decoder_input_ids=ids).logits if name == "t5" else model(ids).logits
        if name == "vit":
            return model(image).logits
        if name == "clip":
            ids[0, -1] = 2
            return model(input_ids=ids, pixel_values=image.expand(1, 3, 8, 8)).logits_per_image
        return model(ids).logits


def test_task_arithmetic_loads_and_computes_what_the_formula_says(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    out = merge(recipe(folder, "{merge: task_arithmetic, base: base, models: [a, b], weight: 0.4}"), tmp_path / "out")
    base, a, b, merged = (
        load_file(p / "model.safetensors") for p in (folder / "base", folder / "a", folder / "b", out)
    )
    assert merged.keys() == base.keys()
    for key, value in merged.items():
        if value.is_floating_point():
            expected = base[key].double() + 0.4 * (a[key].double() - base[key]) + 0.4 * (b[key].double() - base[key])
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, base[key])
    loaded, report = CLASSES[name].from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    scores = use(name, loaded.eval())
    assert scores.isfinite().all()
    assert not torch.allclose(scores, use(name, CLASSES[name].from_pretrained(folder / "base").eval()))


def test_auto_classes_know_the_output(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    out = merge(recipe(folder, "{merge: linear, models: [a, b]}"), tmp_path / "out")
    auto = {
        "llama": hf.AutoModelForCausalLM,
        "qwen2": hf.AutoModelForCausalLM,
        "mistral": hf.AutoModelForCausalLM,
        "gpt2": hf.AutoModelForCausalLM,
        "bert": hf.AutoModelForMaskedLM,
        "roberta": hf.AutoModelForMaskedLM,
        "t5": hf.AutoModelForSeq2SeqLM,
        "vit": hf.AutoModelForImageClassification,
        "clip": hf.AutoModel,
    }[name]
    assert type(auto.from_pretrained(out)) is CLASSES[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", dtype=dtype)
    for i, name in enumerate("ab"):
        save_fine_tune(tmp_path / name, base, i)
    out = merge(recipe(tmp_path, "{merge: linear, models: [a, b]}"), tmp_path / "out")
    a, b, merged = (load_file(p / "model.safetensors") for p in (tmp_path / "a", tmp_path / "b", out))
    for key, value in merged.items():
        assert value.dtype == dtype
        assert torch.equal(value, ((a[key].double() + b[key].double()) / 2).to(dtype))
    assert hf.AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


@pytest.mark.parametrize(
    "models",
    ["models: [a, b]", "slices: [{models: [{model: a, layers: [0, 2]}, {model: b, layers: [0, 2]}]}]"],
)
def test_matrices_that_gpt2_stores_transposed_are_merged_the_way_round_they_are_used(
    models: str, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", "gpt2")
    for seed, name in enumerate("ab", start=1):
        save_fine_tune(tmp_path / name, base, seed)
    out = merge(recipe(tmp_path, f"{{merge: iso_cts, base: base, {models}}}"), tmp_path / "out")
    found, start, *others = (load_file(p / "model.safetensors") for p in (out, base, tmp_path / "a", tmp_path / "b"))
    turned = [name for name in found if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]
    assert len(turned) == 2 * 4
    for name in turned:
        expected = iso_cts([other[name].T for other in others], base=start[name].T).T
        assert torch.equal(found[name], expected), name
