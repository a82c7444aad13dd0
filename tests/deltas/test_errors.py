"""What stands in the way of a delta is one sentence with a code, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import save_fine_tune, save_model
from regraft.checkpoint import open_checkpoint
from regraft.deltas.apply import apply, open_delta
from regraft.deltas.extract import extract
from regraft.errors import UserError


def refused(code: str, base: Path, tuned: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        extract(open_checkpoint(str(tuned)), open_checkpoint(str(base)), out, **options)
    assert caught.value.code == code
    assert not out.exists()
    return str(caught.value)


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse delta."""
    out = tmp_path_factory.mktemp("made") / "delta"
    extract(open_checkpoint(str(llama / "tuned")), open_checkpoint(str(llama / "base")), out, "sparse")
    return out


@pytest.mark.parametrize(
    ("code", "changes"),
    [("RG204", {"vocab_size": 90}), ("RG201", {"intermediate_size": 48}), ("RG203", {"num_hidden_layers": 3})],
)
def test_other_sizes_are_refused(code: str, changes: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "llama", **changes)
    refused(code, other, llama / "tuned", tmp_path / "out")


def test_another_architecture_is_refused(llama: Path, tmp_path: Path) -> None:
    refused("RG203", save_model(tmp_path / "gpt2", "gpt2"), llama / "tuned", tmp_path / "out")


def test_other_names_are_refused(llama: Path, tmp_path: Path) -> None:
    """A base without its head has all tensors under other names: nothing would be a difference."""
    bare = shutil.copytree(llama / "base", tmp_path / "bare")
    tensors = load_file(bare / "model.safetensors")
    names = {name: name.removeprefix("model.") for name in tensors if not name.startswith("lm_head")}
    save_file({names[name]: tensors[name] for name in names}, bare / "model.safetensors", {"format": "pt"})
    assert "same class" in refused("RG202", bare, llama / "tuned", tmp_path / "out")


def test_models_without_a_tensor_in_common_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({f"{name}.weight": torch.ones(3)}, tmp_path / name / "model.safetensors")
    assert "a and b have no tensor in common" in refused("RG202", tmp_path / "a", tmp_path / "b", tmp_path / "out")


def test_a_stranger_is_refused_unless_forced(llama: Path, tmp_path: Path, there_and_back: Any) -> None:
    refused("RG205", llama / "base", llama / "stranger", tmp_path / "out")
    back = there_and_back(llama / "base", llama / "stranger", force=True)
    wanted = load_file(llama / "stranger" / "model.safetensors")
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["model.norm.weight", "only_here.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(name: str, value: float, llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(llama / "tuned", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.setdefault(name, torch.zeros(4))[3] = value
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    said = refused("RG206", llama / "base", broken, tmp_path / "out")
    assert said.startswith(f"{name} holds values that are NaN or infinite (the model): repair that model")
    if name == "model.norm.weight":
        assert "(the base)" in refused("RG206", broken, llama / "tuned", tmp_path / "out")


def test_a_model_has_no_delta_to_itself(llama: Path, tmp_path: Path) -> None:
    said = refused("RG212", llama / "base", llama / "base", tmp_path / "out")
    assert said.startswith("the model and the base have the same weights")


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan")])
def test_a_density_is_a_share(density: float, llama: Path, tmp_path: Path) -> None:
    said = refused("RG303", llama / "base", llama / "tuned", tmp_path / "out", kind="sparse", density=density)
    assert said.startswith(f"the density is {density} and must be above 0")


def test_a_density_is_for_sparse_deltas(llama: Path, tmp_path: Path) -> None:
    said = refused("RG303", llama / "base", llama / "tuned", tmp_path / "out", kind="bits", density=0.1)
    assert said.startswith("a bits delta has no density")


def test_another_base_is_refused_and_with_force_measured(made: Path, llama: Path, tmp_path: Path) -> None:
    delta, near = open_delta(made), save_fine_tune(tmp_path / "near", llama / "base", 5)
    for base, words in ((near, "as near as a fine-tune"), (llama / "stranger", "as far as an unrelated model")):
        checkpoint = open_checkpoint(str(base))
        with pytest.raises(UserError, match=words) as caught:
            apply(delta, checkpoint, tmp_path / "out")
        assert caught.value.code == "RG211"
        assert not (tmp_path / "out").exists()
    lineage = apply(delta, checkpoint, tmp_path / "out", force=True)
    assert "as far as an unrelated model" in lineage.warnings[0]
    assert "as far as an unrelated model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("code", "changes"),
    [("RG201", {"intermediate_size": 48}), ("RG202", {"num_hidden_layers": 1})],
)
def test_a_base_that_does_not_fit_is_refused_even_with_force(
    code: str, changes: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    base = open_checkpoint(str(save_model(tmp_path / "other", "llama", **changes)))
    with pytest.raises(UserError) as caught:
        apply(open_delta(made), base, tmp_path / "out", force=True)
    assert caught.value.code == code


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_base_of_another_dtype_is_refused_even_with_force(
    dtype: torch.dtype, made: Path, llama: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(llama / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"model.norm.weight is {dtype} in the base and torch.float32 in the") as caught:
        apply(open_delta(made), open_checkpoint(str(base)), tmp_path / "out", force=True)
    assert caught.value.code == "RG211"


def test_a_base_that_differs_where_no_sample_is_is_refused(made: Path, llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    origin = open_checkpoint(str(base))
    with pytest.raises(UserError, match="although all values sampled are equal") as caught:
        apply(open_delta(made), origin, tmp_path / "out")
    assert caught.value.code == "RG211"
    assert "although" in apply(open_delta(made), origin, tmp_path / "out", force=True).warnings[0]


def test_a_scale_that_leaves_the_dtype_is_refused(made: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        apply(open_delta(made), open_checkpoint(str(llama / "base")), tmp_path / "out", scale=1e39)
    assert caught.value.code == "RG206"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_delta_is_refused(llama: Path, tmp_path: Path) -> None:
    for folder, code in ((tmp_path / "none", "RG101"), (llama / "base", "RG105")):
        with pytest.raises(UserError) as caught:
            open_delta(folder)
        assert caught.value.code == code


EDITS: list[Any] = [
    lambda record: record.update(format=2),
    lambda record: record.update(kind="wavelets"),
    lambda record: record.update(tensors={}),
    lambda record: record["tensors"]["model.norm.weight"].update(shape=[-1]),
    lambda record: record["tensors"]["model.norm.weight"].update(dtype="F4"),
    lambda record: record["tensors"].update(__metadata__=record["tensors"]["model.norm.weight"]),
]


@pytest.mark.parametrize("edit", EDITS)
def test_a_record_that_cannot_be_is_refused(edit: Any, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "delta")
    record = json.loads((folder / "delta.json").read_text())
    edit(record)
    (folder / "delta.json").write_text(json.dumps(record))
    with pytest.raises(UserError) as caught:
        open_delta(folder)
    assert caught.value.code == "RG105"


@pytest.mark.parametrize("name", ["delta.json", "files"])
def test_a_link_out_of_the_folder_is_refused(name: str, made: Path, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "delta")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to((made / name) if name == "delta.json" else llama / "base")
    with pytest.raises(UserError) as caught:
        apply(open_delta(folder), open_checkpoint(str(llama / "base")), tmp_path / "out")
    assert caught.value.code == "RG104"
    assert not (tmp_path / "out").exists()


DAMAGES: list[Any] = [
    lambda parts: parts.pop("marks/model.norm.weight"),
    lambda parts: parts.update({"values/model.norm.weight": torch.ones(2)}),
    lambda parts: parts.update({"values/model.norm.weight": torch.ones(20)}),
    lambda parts: parts.update({"values/model.norm.weight": torch.ones(3, dtype=torch.float64)}),
    lambda parts: parts.update({"marks/model.norm.weight": torch.ones(5, dtype=torch.uint8)}),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_the_record_are_refused(damage: Any, made: Path, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "delta")
    parts = load_file(folder / "model.safetensors")
    damage(parts)
    save_file(parts, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        apply(open_delta(folder), open_checkpoint(str(llama / "base")), tmp_path / "out")
    assert caught.value.code == "RG112"
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_taken_is_refused(made: Path, llama: Path) -> None:
    for out in (made, llama / "base", llama):
        for force in (False, True):
            with pytest.raises(UserError) as caught:
                apply(open_delta(made), open_checkpoint(str(llama / "base")), out, force=force)
            assert caught.value.code == "RG401"
