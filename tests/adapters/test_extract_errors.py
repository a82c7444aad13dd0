"""What cannot be extracted is refused with a sentence, before work starts and with nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import models
from regraft.adapters.extract import Wanted, factor_dtype
from regraft.adapters.publish import extract_lora
from regraft.checkpoint import open_checkpoint
from regraft.errors import UserError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    models.save_model(folder / "base", "llama")
    models.save_fine_tune(folder / "tuned", folder / "base", seed=1)
    models.save_model(folder / "stranger", "llama", seed=7)
    models.save_model(folder / "gpt2", "gpt2")
    models.save_model(folder / "theta", "llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    return folder


@pytest.fixture
def refused(family: Path, tmp_path: Path) -> Callable[..., str]:
    """The sentence that an extraction ends with; nothing is left then."""

    def run(code: str, model: Any = "tuned", base: Any = "base", **wanted: Any) -> str:
        given = {"exclude": ["norm", "embed"], **wanted}
        refs = [str(one) if "+" in str(one) else str(family / one) for one in (model, base)]
        opened = [open_checkpoint(ref) for ref in refs]
        with pytest.raises(UserError) as caught:
            extract_lora(opened[0], opened[1], tmp_path / "out", Wanted(**given))
        assert caught.value.code == code, caught.value
        assert not list(tmp_path.glob("*out*"))
        return str(caught.value)

    return run


def test_changes_that_are_not_of_low_rank(refused: Callable[..., str]) -> None:
    said = refused("RG309", exclude=[])
    assert "model.embed_tokens.weight, model.layers.0.input_layernorm.weight" in said
    assert "and 3 more" in said
    assert "--embeddings" in said
    said = refused("RG309", exclude=["layers", "embed"])
    assert said.startswith("model.norm.weight is new or changed")
    assert "--save-modules all" in said
    assert "--exclude" in said


def test_a_parameter_of_no_module_of_its_own(refused: Callable[..., str], tmp_path: Path, family: Path) -> None:
    folder = tmp_path / "clip"
    models.save_model(folder / "base", "clip")
    models.save_fine_tune(folder / "tuned", folder / "base", seed=1)
    said = refused("RG309", model=folder / "tuned", base=folder / "base", save=["all"], exclude=[])
    assert said.startswith("logit_scale is new or changed")
    assert "--save-modules" not in said


def test_another_base(refused: Callable[..., str]) -> None:
    assert "as far as an unrelated model" in refused("RG205", base="stranger")
    assert "the model is of type llama and the base of type gpt2" in refused("RG203", base="gpt2")
    said = refused("RG207", base="theta")
    assert "rope" in said
    assert "--force" in said


def test_a_stranger_by_force(family: Path, tmp_path: Path) -> None:
    one, other = (open_checkpoint(str(family / name)) for name in ("tuned", "stranger"))
    assert extract_lora(one, other, tmp_path / "out", Wanted(exclude=["norm"], embeddings=True), force=True).error > 0


def test_a_base_with_an_adapter(refused: Callable[..., str], family: Path, tmp_path: Path) -> None:
    base, tuned = (open_checkpoint(str(family / name)) for name in ("base", "tuned"))
    extract_lora(tuned, base, tmp_path / "one", Wanted(exclude=["norm", "embed"]))
    said = refused("RG309", base=f"{family}/base+{tmp_path}/one")
    assert "the base has an adapter" in said


def test_patterns_and_names_that_select_nothing(refused: Callable[..., str]) -> None:
    assert "'nrom' selects no tensor" in refused("RG308", exclude=["nrom"])
    assert "its names look like model.layers" in refused("RG308", include=["x"])
    assert "did you mean 'lm_head'" in refused("RG308", save=["lm_haed"])
    assert "is no regular expression" in refused("RG303", include=["("])


def test_a_dtype_that_factors_do_not_have() -> None:
    assert factor_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(UserError, match="did you mean 'float16'"):
        factor_dtype("float61")


def test_models_that_do_not_differ(refused: Callable[..., str]) -> None:
    assert "do not differ" in refused("RG309", model="base")


def changed(family: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the fine-tune with other tensors."""
    folder.mkdir()
    (folder / "config.json").write_bytes((family / "tuned" / "config.json").read_bytes())
    tensors = load_file(family / "tuned" / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_values_that_are_not_finite(refused: Callable[..., str], family: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = changed(family, tmp_path / "broken", lambda t: t[name].view(-1)[5:6].fill_(float("nan")))
    assert refused("RG206", model=broken).startswith(f"{name} holds values that are NaN")


def test_tensors_that_are_missing_or_have_no_place(refused: Callable[..., str], family: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = changed(family, tmp_path / "lacking", lambda t: t.pop(name))
    assert refused("RG202", model=lacking).startswith(f"the model has no tensor {name}")
    extra = changed(family, tmp_path / "extra", lambda t: t.update({"model.gate": torch.ones(2)}))
    assert refused("RG309", model=extra).startswith("model.gate has no place")
    short = changed(family, tmp_path / "short", lambda t: t.update({name: torch.ones(2, 2)}))
    assert "and config.json makes it [64, 32]" in refused("RG105", model=short)
    said = refused("RG201", base=short)
    assert said.startswith(f"{name} has shape [64, 32] in the model and [2, 2] in the base")


def add_words(folder: Path, count: int) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(models.VOCAB + count)
    model.save_pretrained(folder)


def test_a_vocabulary_that_grew(refused: Callable[..., str], family: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(family / "tuned", tmp_path / "grown")
    add_words(grown, 2)
    said = refused("RG309", model=grown, exclude=["norm"], embeddings=True)
    assert said.startswith("model.embed_tokens.weight has 98 rows in the model and 96 in the base")
    assert "--save-modules all" in said
    assert "--embeddings" not in said


def test_classes_that_transformers_does_not_have(refused: Callable[..., str], family: Path, tmp_path: Path) -> None:
    other = changed(family, tmp_path / "other", lambda t: None)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace("LlamaForCausalLM", "MyOwnForCausalLM"))
    assert "transformers has no class 'MyOwnForCausalLM'" in refused("RG309", model=other)
    (other / "config.json").write_text(text.replace('"silu"', '"no such thing"'))
    said = refused("RG207", model=other)
    assert "hidden_act" in said
    model, base = open_checkpoint(str(other)), open_checkpoint(str(family / "base"))
    with pytest.raises(UserError) as caught:
        extract_lora(model, base, tmp_path / "out", Wanted(), force=True)
    assert caught.value.code == "RG105"


def test_tied_in_the_configuration_and_separate_in_the_file(
    refused: Callable[..., str], family: Path, tmp_path: Path
) -> None:
    tied = changed(family, tmp_path / "tied", lambda t: None)
    text = (tied / "config.json").read_text()
    (tied / "config.json").write_text(text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert "config.json makes them one tensor" in refused("RG209", model=tied)


def test_licences_that_do_not_agree(family: Path, tmp_path: Path) -> None:
    for name, licence in (("base", "gpl-3.0"), ("tuned", "mit")):
        changed(family, tmp_path / name, lambda t: None)
        source = family / name / "model.safetensors"
        (tmp_path / name / "model.safetensors").write_bytes(source.read_bytes())
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    base, tuned = (open_checkpoint(str(tmp_path / name)) for name in ("base", "tuned"))
    wanted = Wanted(exclude=["norm", "embed"])
    with pytest.raises(UserError, match="--accept-licenses") as caught:
        extract_lora(tuned, base, tmp_path / "out", wanted)
    assert caught.value.code == "RG404"
    assert extract_lora(tuned, base, tmp_path / "out", wanted, accept_licenses=True).out.is_dir()


def test_an_output_that_is_taken(family: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    base, tuned = (open_checkpoint(str(family / name)) for name in ("base", "tuned"))
    for force in (False, True):
        with pytest.raises(UserError) as caught:
            extract_lora(tuned, base, tmp_path / "out", Wanted(exclude=["norm", "embed"]), force=force)
        assert caught.value.code == "RG401"
