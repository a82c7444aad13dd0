"""Bare state dicts, as for mergekit-pytorch: tensors by name, from files without a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import save_fine_tune, save_model
from regraft.checkpoint.lineage import Lineage
from regraft.errors import UserError
from regraft.merge.jobs import default_chunk
from regraft.recipe import MergeStep, parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import merge, run, with_output
from regraft.recipe.settings import Settings

WEIGHTS = {"a.safetensors": 0.25, "b.pt": 0.5, "c.bin": 1.0}
LINEAR = "merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.pt}]\nparameters: {weight: 0.5}\n"


def state(seed: int) -> dict[str, torch.Tensor]:
    """What a network of no known family keeps: a stack of convolutions, a normalisation with its counter, a scalar."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"net.0.weight": (8, 3, 3, 3), "net.0.bias": (8,), "net.1.weight": (8, 8, 3, 3), "norm.running_mean": (8,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**tensors, "scale": torch.tensor(1.5 + seed), "norm.num_batches_tracked": torch.tensor(7)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    save_file(state(1), tmp_path / "in" / "a.safetensors")
    torch.save(state(2), tmp_path / "in" / "b.pt")
    torch.save({"state_dict": state(3), "epoch": 4}, tmp_path / "in" / "c.bin")
    return tmp_path / "in"


def read(folder: Path, text: str) -> Any:
    return parse_recipe(text, path=folder / "m.yaml")


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def refused(folder: Path, text: str, settings: Settings | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        make_plan(read(folder, text), settings)
    return caught.value


def test_files_of_every_format_become_one_state_dict(folder: Path, tmp_path: Path) -> None:
    models = ", ".join(f"{{model: ./{name}, parameters: {{weight: {w}}}}}" for name, w in WEIGHTS.items())
    recipe = read(folder, f"merge_method: linear\nmodels: [{models}]\nparameters: {{normalize: false}}\n")
    out = merge(recipe, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.safetensors", "regraft.json"]
    made = weights(out)
    assert made.keys() == state(1).keys()
    for name, value in made.items():
        if value.is_floating_point():
            expected = sum(w * state(i)[name].double() for i, w in enumerate(WEIGHTS.values(), 1))
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, state(1)[name])
    assert Lineage.read(out).settings["output"] == "state-dict"
    card = (out / "README.md").read_text()
    assert "from_pretrained" not in card
    assert "library_name" not in card
    used = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(out))
    names: dict[str, Any] = {}
    exec(used, names)
    assert names["state_dict"].keys() == made.keys()


def test_a_task_vector_rule_with_a_base(folder: Path, tmp_path: Path) -> None:
    text = (
        "merge_method: task_arithmetic\nbase_model: a.safetensors\ndtype: float64\nout_dtype: float32\n"
        "models: [{model: b.pt, parameters: {weight: [{filter: bias, value: 2}, {value: 0.5}]}}]\n"
    )
    made = weights(merge(read(folder, text), tmp_path / "out", Settings(force=True)))
    for name in ("net.0.weight", "net.0.bias", "scale"):
        factor = 2 if "bias" in name else 0.5
        expected = state(1)[name].double() + factor * (state(2)[name].double() - state(1)[name])
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert {value.dtype for value in made.values() if value.is_floating_point()} == {torch.float32}


def test_lists_over_depth_take_their_first_value_and_say_so(folder: Path, tmp_path: Path) -> None:
    listed = make_plan(read(folder, LINEAR.replace("0.5", "[3, 1]")))
    (planned,) = listed.merges
    assert {job.options.weight for job in planned.jobs if job.options} == {(3.0, 3.0)}  # type: ignore[attr-defined]
    assert any("lists take their first value (weight)" in warning for warning in listed.warnings)
    assert not make_plan(read(folder, LINEAR)).warnings


def test_tied_tensors_are_all_there(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        shared = torch.full((4, 2), float(i))
        torch.save({"embed": shared, "head": shared}, tmp_path / f"{name}.pt")
    made = weights(merge(read(tmp_path, LINEAR.replace("a.safetensors", "a.pt")), tmp_path / "out"))
    assert {name: value.unique().tolist() for name, value in made.items()} == {"embed": [0.5], "head": [0.5]}


def differing(folder: Path) -> None:
    """`b.pt` has no norm, and a head that `a.safetensors` has not."""
    tensors = {name: value for name, value in state(2).items() if not name.startswith("norm")}
    torch.save({**tensors, "head": torch.ones(3)}, folder / "b.pt")


@pytest.mark.parametrize("by", ["settings", "recipe"])
def test_tensors_that_only_some_have(folder: Path, tmp_path: Path, by: str) -> None:
    differing(folder)
    error = refused(folder, LINEAR)
    assert (error.code, error.what) == ("RG202", "a.safetensors has a tensor norm.num_batches_tracked that b.pt lacks")

    def made(tensors: str) -> dict[str, torch.Tensor]:
        if by == "settings":
            return weights(merge(read(folder, LINEAR), tmp_path / tensors, Settings(tensors=tensors)))
        body = f"{{merge: linear, models: [a.safetensors, b.pt], output: state-dict, tensors: {tensors}}}"
        return weights(merge(read(folder, f"steps:\n  merged: {body}\n"), tmp_path / tensors))

    common, union = made("common"), made("any")
    assert common.keys() == {"net.0.weight", "net.0.bias", "net.1.weight", "scale"}
    assert union.keys() == {*state(1), "head"}
    assert torch.equal(union["head"], torch.ones(3))  # of the only model that has it, with all of the weight
    assert torch.equal(union["norm.running_mean"], state(1)["norm.running_mean"])
    assert all(torch.equal(common[name], union[name]) for name in common)


def test_a_base_that_lacks_a_tensor_is_no_base_for_it(folder: Path) -> None:
    differing(folder)
    text = (
        "merge_method: task_arithmetic\nbase_model: a.safetensors\nmodels: [{model: b.pt, parameters: {weight: 1}}]\n"
    )
    error = refused(folder, text, Settings(tensors="any", force=True))
    assert (error.code, error.what) == ("RG202", "a.safetensors has no tensor head")


def test_which_recipes_are_of_state_dicts() -> None:
    def output(text: str) -> str:
        (step,) = parse_recipe(text).steps
        assert isinstance(step, MergeStep)
        return step.output

    assert output(LINEAR) == "state-dict"
    assert output(LINEAR + "base_model: b.pt\n") == "state-dict"
    assert output(LINEAR.replace("b.pt", "org/b")) == "model"
    assert output(LINEAR + "tokenizer_source: b.pt\n") == "model"


def test_a_model_may_be_merged_as_its_tensors_alone(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gpt2")
    save_fine_tune(tmp_path / "a", base, 1)
    text = (
        "steps:\n  merged: {merge: linear, models: [./base, ./a], output: state-dict, exclude: wte, dtype: bfloat16}\n"
    )
    out = merge(read(tmp_path, text), tmp_path / "out")
    assert not (out / "config.json").exists()
    made, one, other = weights(out), weights(base), weights(tmp_path / "a")
    assert made.keys() == one.keys()
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(made[name], ((one[name].double() + other[name]) / 2).to(torch.bfloat16))
    assert torch.equal(made["transformer.wte.weight"], one["transformer.wte.weight"].bfloat16())
    plain = text.replace(", output: state-dict", "")
    recipe = with_output(read(tmp_path, plain), "state-dict", None, None, None)
    again = merge(recipe, tmp_path / "again")
    assert all(torch.equal(value, made[n]) for n, value in weights(again).items())
    as_model = merge(read(tmp_path, plain), tmp_path / "model")
    assert (as_model / "config.json").exists()
    assert Lineage.read(as_model).key != Lineage.read(out).key


def test_the_result_does_not_depend_on_how_it_is_cut_and_is_not_made_twice(folder: Path, tmp_path: Path) -> None:
    one = merge(read(folder, LINEAR), tmp_path / "one", Settings(chunk=100, workers=3, shard_bytes=1500))
    assert (one / "model.safetensors.index.json").exists()
    other = weights(merge(read(folder, LINEAR), tmp_path / "other", Settings(chunk=default_chunk("cpu"))))
    pieces = {k: v for path in one.glob("*.safetensors") for k, v in load_file(path).items()}
    assert pieces.keys() == other.keys()
    assert all(torch.equal(pieces[name], other[name]) for name in other)
    before = (tmp_path / "other" / "model.safetensors").stat().st_mtime_ns
    merge(read(folder, LINEAR), tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").stat().st_mtime_ns == before


def test_a_step_may_use_the_state_dict_of_another(folder: Path, tmp_path: Path) -> None:
    text = """
steps:
  half: {merge: linear, models: [a.safetensors, b.pt], output: state-dict}
  whole: {merge: linear, models: [half, c.bin], output: state-dict}
"""
    made = weights(run(read(folder, text), tmp_path / "out").artefacts["whole"])
    expected = ((state(1)["net.0.bias"].double() + state(2)["net.0.bias"]) / 2 + state(3)["net.0.bias"]) / 2
    torch.testing.assert_close(made["net.0.bias"].double(), expected, rtol=1e-6, atol=1e-7)


TWO = "models: [a.safetensors, b.pt]"
SLICES = "slices: [{models: [{model: a.safetensors, layers: [0, 1]}]}]"
BARE = "output: state-dict"


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (f"{TWO}, {BARE}, tokenizer_from: b.pt", "RG309", "a tokenizer is for models"),
        (f"{TWO}, {BARE}, config_from: b.pt", "RG309", "config_from is for models"),
        (f"{TWO}, {BARE}, chat_template: chatml", "RG309", "chat_template is for models"),
        (f"{SLICES}, {BARE}", "RG309", "slices is for models"),
        (f"{TWO}, tensors: any", "RG303", "tensors is for state dicts"),
        (f"{TWO}, {BARE}, tensors: al", "RG303", "tensors is 'al'"),
        (f"{TWO}, output: state_dict", "RG303", "did you mean 'state-dict'"),
        (f"{TWO}, {BARE}, weight: [{{filter: x, value: 1}}]", "RG308", "'x'"),
        (f"{TWO}, {BARE}, rank: 4", "RG303", "rank is for adapters"),
    ],
)
def test_mistakes(folder: Path, text: str, code: str, says: str) -> None:
    error = refused(folder, f"steps:\n  merged: {{merge: linear, {text}}}\n")
    assert error.code == code, str(error)
    assert says in str(error), str(error)


def test_models_have_no_tensors_to_choose(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gpt2")
    text = f"merge_method: linear\nmodels: [{{model: {base}}}]\nparameters: {{weight: 1}}\n"
    error = refused(tmp_path, text, Settings(tensors="any"))
    assert (error.code, error.what) == ("RG309", "any tensors can be asked for of state dicts only")


def test_shapes_that_differ_and_nothing_in_common(folder: Path) -> None:
    torch.save({**state(2), "scale": torch.ones(2)}, folder / "b.pt")
    assert refused(folder, LINEAR).code == "RG201"
    torch.save({"other": torch.ones(2)}, folder / "b.pt")
    error = refused(folder, LINEAR, Settings(tensors="common"))
    assert (error.code, error.what) == ("RG202", "the state dicts have no tensor in common")


def test_a_pickle_with_code_is_not_read(folder: Path) -> None:
    torch.save({"weight": torch.ones(2), "odd": Path}, folder / "b.pt")
    assert refused(folder, LINEAR).code == "RG107"
