"""Rules that give single tasks back (emr, tall masks): which one, by the model's name, and whole models made so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import regraft.merge as rules
from models import save_fine_tune, save_model
from regraft.checkpoint.lineage import Lineage
from regraft.errors import UserError
from regraft.recipe import load_recipe, parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import merge, run
from regraft.recipe.schema import schema
from regraft.recipe.settings import Settings

HEAD = "models: {base: ./base, maths: ./maths, code: ./code}\nsteps:\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of it, in bfloat16."""
    found = tmp_path_factory.mktemp("tasks")
    base = save_model(found / "base", "llama", dtype=torch.bfloat16)
    save_fine_tune(found / "maths", base, 1)
    save_fine_tune(found / "code", base, 2)
    return found


def recipe(folder: Path, body: str) -> Any:
    return parse_recipe(HEAD + body, path=folder / "recipe.yaml")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("emr", {}),
        ("emr", {"task": 1}),
        ("emr", {"task": 0, "rescaler": "tensor_means"}),
        ("tall_mask", {"task": 0}),
        ("tall_mask_ties", {"task": 1, "density": 0.5}),
        ("consensus_task_arithmetic", {"k": 1}),
        ("consensus_ties", {"k": 1}),
        ("bitdelta", {}),
    ],
)
def test_files_are_merged_as_tensors_are(rule: str, options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """With any number of workers and chunks, and transformers loads and runs the result."""
    base, *models = (weights(folder / name) for name in ("base", "maths", "code"))
    expected = getattr(rules, rule)(models, base=base, **options)
    written = {k: ["maths", "code"][v] if k == "task" else v for k, v in options.items()}
    step = {"merge": rule, "base": "base", "models": ["maths", "code"], **written}
    made = recipe(folder, f"  merged: {json.dumps(step)}\n")
    outputs = [
        merge(made, tmp_path / str(i), settings)
        for i, settings in enumerate((Settings(workers=1), Settings(workers=3, chunk=1)))
    ]
    for out in outputs:
        found = weights(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    loaded = hf.LlamaForCausalLM.from_pretrained(outputs[0], dtype="auto")
    assert loaded(torch.arange(8).unsqueeze(0)).logits.isfinite().all()


def test_plans_and_records_call_the_task_by_its_name(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, "  x: {merge: emr, base: base, models: {maths: {}, code: {}}, task: code}\n")
    (step,) = make_plan(made).to_dict()["steps"]
    assert {row["options"]["task"] for row in step["values"]} == {"code"}
    out = merge(made, tmp_path / "out")
    (group,) = Lineage.read(out).options
    assert group.options["task"] == "code"
    unified = recipe(folder, "  x: {merge: emr, base: base, models: [maths, code]}\n")
    assert make_plan(unified).to_dict()["steps"][0]["values"][0]["options"]["task"] is None


def test_a_sweep_over_tasks_gives_each_its_model(folder: Path, tmp_path: Path) -> None:
    body = "  x: {merge: emr, base: base, models: [maths, code], sweep: {task: [code, maths]}}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD.replace("./", f"{folder}/") + body, encoding="utf-8")
    run(load_recipe(path), tmp_path / "runs")
    base, *models = (weights(folder / name) for name in ("base", "maths", "code"))
    for i, task in enumerate(("maths", "code")):
        found = weights(tmp_path / "runs" / f"x@task={task}")
        expected = rules.emr(models, base=base, task=i)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_same_task_of_models_in_another_order_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    outs = []
    for i, order in enumerate(("maths, code", "code, maths")):
        made = recipe(folder, f"  x: {{merge: tall_mask, base: base, models: [{order}], task: maths}}\n")
        outs.append(weights(merge(made, tmp_path / str(i))))
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("merge: emr, base: base, models: [maths, code], task: maht", "RG303", "task is 'maht', which is not among"),
        ("merge: emr, base: base, models: [maths, code], task: base", "RG303", "task is 'base', which is not among"),
        ("merge: emr, base: base, models: [maths, code], task: 1", "RG303", "task is 1, which is not among"),
        ("merge: emr, base: base, models: [maths, code], sweep: {task: [maths, x]}", "RG303", "task is 'x'"),
        ("merge: emr, base: base, models: {maths: {task: maths}, code: {}}", "RG302", "one value for all models"),
        (
            "merge: emr, base: base, models: [maths, code], task: [{filter: mlp, value: maths}, {value: code}]",
            "RG303",
            "task varies: .*use one task$",
        ),
        ("merge: consensus_ties, base: base, models: [maths, code], k: 3", "RG303", "in 3 masks of 2 tasks"),
    ],
)
def test_obstacles(body: str, code: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        make_plan(recipe(folder, f"  x: {{{body}}}\n"))
    assert error.value.code == code


def test_slices_have_models_of_their_own(folder: Path, tmp_path: Path) -> None:
    def sliced(task: str) -> Any:
        first = "{model: maths, layers: [0, 1]}, {model: code, layers: [0, 1]}"
        second = "{model: code, layers: [1, 2]}, {model: maths, layers: [1, 2]}"
        slices = f"[{{models: [{first}]}}, {{models: [{second}], {task}}}]"
        return recipe(folder, f"  x: {{merge: tall_mask, base: base, slices: {slices}, task: maths}}\n")

    out = weights(merge(sliced("weight: 1"), tmp_path / "out"))
    base, *models = (weights(folder / name) for name in ("base", "maths", "code"))
    expected = rules.tall_mask(models, base=base, task=0)
    assert all(torch.equal(out[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match="task is 'base', which is not among"):
        sliced("task: base")


def test_the_schema_takes_names() -> None:
    option = schema()["$defs"]["merge.emr"]["properties"]["task"]
    assert option["anyOf"][0] == {"type": "string", "minLength": 1}
    assert "default" not in option
