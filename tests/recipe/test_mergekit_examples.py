"""The examples that mergekit brings: each is planned and merged with small models of the same architectures and names.

The files in `mergekit_examples` have the keys and values of mergekit's own; `NAMES` says what is a model in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

from farm_tools import write_tokenizer
from models import save_fine_tune, save_model
from regraft.recipe import load_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import merge
from regraft.recipe.settings import Settings

EXAMPLES = sorted((Path(__file__).parent / "mergekit_examples").glob("*.yml"))
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
FAMILIES = {
    "llama": {
        "TheBloke/Llama-2-13B-fp16": 0,
        "psmathur/orca_mini_v3_13b": 1,
        "garage-bAInd/Platypus2-13B": 2,
        "WizardLM/WizardLM-13B-V1.2": 3,
        "WizardLM/WizardMath-13B-V1.0": 4,
        "model_a": 5,
        "model_b": 6,
    },
    "mistral": {
        "mistralai/Mistral-7B-v0.1": 0,
        "mistralai/Mistral-7B-Instruct-v0.2": 1,
        "BioMistral/BioMistral-7B": 2,
        "NousResearch/Hermes-2-Pro-Mistral-7B": 3,
        "teknium/OpenHermes-2.5-Mistral-7B": 4,
    },
}


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples and all of their models; those of Llama as deep as theirs, for the slices."""
    root = tmp_path_factory.mktemp("examples")
    for family, names in FAMILIES.items():
        base, *others = names
        save_model(root / base, family, num_hidden_layers={"llama": 40, "mistral": 4}[family], **SMALL)
        write_tokenizer(root / base)
        for name in others:
            save_fine_tune(root / name, root / base, names[name])
            write_tokenizer(root / name)
    for example in EXAMPLES:
        (root / example.name).write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    return root


def test_all_of_them_are_here() -> None:
    """Those in mergekit's folder of examples, one of them in both of its spellings, and that of mergekit-multi."""
    assert [path.stem for path in EXAMPLES] == [
        "arcee_fusion", "bio-merge", "gradient-slerp-models", "gradient-slerp", "linear", "multimerge",
        "orcamini-platy-44layer", "ties",
    ]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_planned_and_merged(example: Path, farm: Path, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(example.read_text(encoding="utf-8")))
    recipe = load_recipe(farm / example.name)
    plan = make_plan(recipe)
    assert sorted(p.rule.name for p in plan.merges) == sorted(d["merge_method"] for d in documents)
    out = merge(recipe, tmp_path / "out", Settings(workers=1))
    config = json.loads((out / "config.json").read_text())
    final = next(d for d in documents if "name" not in d)
    if "dtype" in final:
        assert config["dtype"] == final["dtype"]
    loaded: Any = hf.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_hidden_layers == {"orcamini-platy-44layer": 44, "bio-merge": 4, "multimerge": 4}.get(
        example.stem, 40
    )
    assert torch.isfinite(loaded(torch.arange(3, 9).unsqueeze(0)).logits.float()).all()
    assert (out / "tokenizer.json").exists()


def tensors(farm: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in load_file(farm / name / "model.safetensors").items()}


def test_the_linear_one_is_the_weighted_mean(farm: Path, tmp_path: Path) -> None:
    made = load_file(merge(load_recipe(farm / "linear.yml"), tmp_path / "out") / "model.safetensors")
    shares = {
        "psmathur/orca_mini_v3_13b": 1.0, "WizardLM/WizardLM-13B-V1.2": 0.3, "garage-bAInd/Platypus2-13B": 0.5,
    }  # fmt: skip
    models = {name: tensors(farm, name) for name in shares}
    for key, value in made.items():
        expected = sum(share * models[name][key] for name, share in shares.items()) / 1.8
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-6)


def test_the_stacked_one_is_its_layers(farm: Path, tmp_path: Path) -> None:
    made = load_file(merge(load_recipe(farm / "orcamini-platy-44layer.yml"), tmp_path / "out") / "model.safetensors")
    below, above = (tensors(farm, n) for n in ("psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B"))
    for key, value in made.items():
        _, _, rest = key.partition(".layers.")
        number = int(rest.partition(".")[0]) if rest else None
        if number is not None and number >= 24:
            expected = above[key.replace(f".layers.{number}.", f".layers.{number - 4}.")]
        else:
            expected = (below if number is not None or "embed" in key else above)[key]
        assert torch.equal(value, expected.half())


def test_both_spellings_of_the_slerp_are_one(farm: Path, tmp_path: Path) -> None:
    names = ("gradient-slerp", "gradient-slerp-models")
    one, other = (load_file(merge(load_recipe(farm / f"{n}.yml"), tmp_path / n) / "model.safetensors") for n in names)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
