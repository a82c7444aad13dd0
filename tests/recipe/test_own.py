"""regraft's own recipes: what they become, and one sentence with line and step for each mistake."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import UserError
from regraft.recipe import EvaluateStep, MergeStep, Recipe, load_recipe, parse_recipe

HEAD = """
models: {base: org/base@main, maths: org/maths, code: ./code+./lora}
steps:
"""


def parse(body: str, head: str = HEAD) -> Recipe:
    return parse_recipe(head.lstrip() + textwrap.indent(textwrap.dedent(body).lstrip(), "  "), path=Path("r.yaml"))


def merge_of(body: str) -> MergeStep:
    (step,) = parse(body).steps
    assert isinstance(step, MergeStep)
    return step


def refused(body: str, head: str = HEAD) -> UserError:
    with pytest.raises(UserError) as caught:
        parse(body, head)
    return caught.value


def values(settings: Any, option: str) -> list[tuple[Any, str | None]]:
    return [(c.value, c.filter) for c in settings[option]]


def test_a_whole_recipe() -> None:
    recipe = parse(
        """
        merged:
          merge: ties
          base: base
          models:
            maths: {weight: 0.6}
            code: {weight: [{filter: mlp, value: [0.2, 0.8]}, {value: 0.4}]}
          density: 0.2
          out_dtype: bfloat16
          exclude: [embed, '\\.norm']
          seed: 3
        score: {evaluate: accuracy, models: [base, merged], data: test.parquet, limit: 10}
        """
    )
    assert recipe.models == {"base": "org/base@main", "maths": "org/maths", "code": "./code+./lora"}
    merged, score = recipe.steps
    assert isinstance(merged, MergeStep)
    assert (merged.name, merged.method, merged.base, merged.seed) == ("merged", "ties", "base", 3)
    assert [i.model for i in merged.inputs] == ["maths", "code"]
    assert values(merged.inputs[0].settings, "weight") == [(0.6, None)]
    assert values(merged.inputs[1].settings, "weight") == [([0.2, 0.8], "mlp"), (0.4, None)]
    assert values(merged.settings, "density") == [(0.2, None)]
    assert merged.out_dtype == "bfloat16"
    assert merged.exclude == ("embed", "\\.norm")
    assert (merged.dialect, merged.where) == ("regraft", "r.yaml, line 3, step merged")
    assert isinstance(score, EvaluateStep)
    assert (score.metric, score.models, score.data) == ("accuracy", ("base", "merged"), "test.parquet")
    assert score.options == {"limit": 10}


def test_models_as_a_list_and_direct_references() -> None:
    step = merge_of("m: {merge: linear, models: [maths, org/other@v1, ./here, maths+./lora], weight: [0, 1]}")
    assert [i.model for i in step.inputs] == ["maths", "org/other@v1", "./here", "org/maths+./lora"]
    assert values(step.settings, "weight") == [([0, 1], None)]


def test_steps_build_on_steps_and_the_seed_of_the_recipe_holds_for_all() -> None:
    recipe = parse_recipe(
        "seed: 9\nsteps:\n"
        "  one: {merge: linear, models: [./a, ./b]}\n"
        "  two: {merge: linear, models: [one, ./c], seed: 1}\n"
    )
    assert [s.seed for s in recipe.steps if isinstance(s, MergeStep)] == [9, 1]


def test_slices() -> None:
    step = merge_of(
        """
        tall:
          merge: passthrough
          slices:
            - {models: [{model: maths, layers: [0, 3]}]}
            - {models: [{model: code, layers: [2, 4], scale: 0.5}], base: maths}
        """
    )
    assert [(i.model, i.layers) for s in step.slices for i in s.inputs] == [("maths", (0, 3)), ("code", (2, 4))]
    assert values(step.slices[1].inputs[0].settings, "scale") == [(0.5, None)]
    assert (step.inputs, step.base) == ((), "maths")


def test_slerp_may_call_its_first_model_the_base() -> None:
    step = merge_of("m: {merge: slerp, base: base, models: [maths], t: 0.3}")
    assert [i.model for i in step.inputs] == ["base", "maths"]


def test_a_setting_may_be_a_single_condition() -> None:
    step = merge_of("m: {merge: linear, models: [maths, code], weight: {filter: mlp, value: 2}}")
    assert values(step.settings, "weight") == [(2, "mlp")]


@pytest.mark.parametrize(
    ("body", "code", "where", "says"),
    [
        ("m: {merge: tise, base: base, models: [maths]}", "RG301", "m, merge", "'ties'"),
        ("m: {merge: ties, base: base, models: [maths], densty: 0.2}", "RG302", "m, densty", "'density'"),
        ("m: {merge: ties, base: base, models: {maths: {wieght: 1}}}", "RG302", "m, models.maths.wieght", "'weight'"),
        ("m: {merge: ties, base: base, models: {maths: {normalize: true}}}", "RG302", "normalize", "move it"),
        ("m: {evaluate: accuracy, merge: linear, models: [maths]}", "RG302", "step m", "several verbs"),
        ("m: {models: [maths], method: linear}", "RG302", "step m", "merge"),
        ("m: {}", "RG302", "step m", "empty"),
        ("m: linear", "RG303", "step m", "mapping"),
        ("m: {merge: sce, base: base, models: [maths, code], select_topk: 2}", "RG303", "m, select_topk", "2"),
        ("m: {merge: sce, base: base, models: [maths, code], select_topk: [0.1, 1.5]}", "RG303", "topk[1]", "1.5"),
        ("m: {merge: linear, models: {maths: {weight: much}, code: }}", "RG303", "models.maths.weight", "'much'"),
        ("m: {merge: linear, models: {maths: {weight: true}}}", "RG303", "models.maths.weight", "true or false"),
        ("m: {merge: linear, models: {maths: {weight: }}}", "RG303", "models.maths.weight", "no value"),
        ("m: {merge: linear, models: [maths], weight: []}", "RG303", "m, weight", "empty"),
        ("m: {merge: linear, models: [maths], weight: .nan}", "RG303", "m, weight", "finite"),
        ("m: {merge: linear, models: [maths], weight: .inf}", "RG303", "m, weight", "finite"),
        ("m: {merge: linear, models: [maths], weight: [{filter: a}]}", "RG303", "m, weight[0]", "no value"),
        ("m: {merge: linear, models: [maths], weight: [{value: 1}, {filter: a, value: 2}]}", "RG303", "[0]", "end"),
        ("m: {merge: linear, models: [maths], weight: [{filtr: a, value: 2}]}", "RG302", "[0].filtr", "'filter'"),
        ("m: {merge: linear, models: [maths], normalize: maybe}", "RG303", "m, normalize", "maybe"),
        ("m: {merge: linear, models: [maths], out_dtype: bfloat}", "RG303", "m, out_dtype", "'bfloat16'"),
        ("m: {merge: linear, models: [maths], seed: -1}", "RG303", "m, seed", "whole number"),
        ("m: {merge: linear, models: [maths], chat_template: chat}", "RG303", "chat_template", "Jinja"),
        ("m: {merge: linear}", "RG303", "step m", "neither models nor slices"),
        ("m: {merge: linear, models: [maths], slices: [{models: []}]}", "RG303", "step m", "both models and slices"),
        ("m: {merge: ties, models: [maths]}", "RG304", "step m", "base"),
        ("m: {merge: slerp, models: [maths, code, ./c]}", "RG305", "m, models", "not 3"),
        ("m: {merge: model_stock, base: base, models: [maths]}", "RG305", "m, models", "not 1"),
        ("m: {merge: ties, base: base, models: [maths, base]}", "RG305", "m, models[1]", "also listed"),
        ("m: {merge: ties, base: ./x/, models: [maths, ./x]}", "RG305", "m, models[1]", "also listed"),
        ("m: {merge: linear, models: [maths, org/maths]}", "RG305", "m, models[1]", "twice"),
        ("m: {merge: linear, models: [math]}", "RG307", "m, models[0]", "'maths'"),
        ("m: {merge: linear, models: {math: {weight: 1}}}", "RG307", "m, models.math", "'maths'"),
        ("m: {merge: linear, models: [m]}", "RG307", "m, models[0]", "itself"),
        ("m: {merge: linear, models: [later]}\nlater: {merge: linear, models: [maths]}", "RG307", "m, ", "after"),
        ("m: {merge: linear, models: [maths], config_from: cod}", "RG307", "m, config_from", "'code'"),
        ("maths: {merge: linear, models: [code]}", "RG307", "maths", "rename"),
        ("a/b: {merge: linear, models: [maths]}", "RG303", "a/b", "name of a step"),
        ("artefacts: {merge: linear, models: [maths]}", "RG303", "artefacts", "name of a step"),
        ("s: {evaluate: accuracy, data: d, limit: 3}", "RG303", "step s", "models"),
        ("s: {evaluate: acuracy, models: [base], data: d}", "RG301", "s, evaluate", "'accuracy'"),
        ("s: {evaluate: accuracy, models: [base], data: d, limt: 3}", "RG302", "s, limt", "'limit'"),
        ("s: {evaluate: accuracy, models: [bse], data: d}", "RG307", "s, models[0]", "'base'"),
    ],
)
def test_mistakes(body: str, code: str, where: str, says: str) -> None:
    error = refused(body)
    assert error.code == code, str(error)
    assert "r.yaml, line 3" in error.where or "r.yaml, line 4" in error.where, str(error)
    assert where in error.where, str(error)
    assert says in str(error)


@pytest.mark.parametrize(
    ("slices", "code", "says"),
    [
        ("[{models: [{model: maths}]}]", "RG303", "'layers'"),
        ("[{models: [{layers: [0, 2]}]}]", "RG303", "'model'"),
        ("[{models: [{model: maths, layers: [2, 2]}]}]", "RG303", "[first, last]"),
        ("[{models: [{model: maths, layers: [0, 1.5]}]}]", "RG303", "[first, last]"),
        ("[{models: [{model: maths, layers: [0, 2], weigth: 1}]}]", "RG302", "'weight'"),
        ("[{models: [{model: maths, layers: [0, 2]}, {model: code, layers: [0, 3]}]}]", "RG303", "2, 3"),
        ("[{sources: []}]", "RG302", "'sources'"),
        ("[{base: maths}]", "RG303", "no models"),
        ("[{models: [{model: a/b, layers: [0, 1]}], base: a/b}]", "RG309", "two bases"),
        ("[]", "RG303", "empty"),
        (
            "[{models: [{model: maths, layers: [0, 2]}]}, {models: [{model: maths, layers: [0, 2]},"
            " {model: code, layers: [0, 2]}]}]",
            "RG305",
            "1, 2",
        ),
    ],
)
def test_mistakes_in_slices(slices: str, code: str, says: str) -> None:
    error = refused(f"m: {{merge: linear, base: base, slices: {slices}}}")
    assert error.code == code, str(error)
    assert says in str(error)
    assert "r.yaml, line 3, step m, slices" in error.where


def test_the_line_is_that_of_the_key() -> None:
    error = refused(
        "m:\n  merge: ties\n  base: base\n  models:\n    maths:\n      weight: 1\n    code:\n      weight: x\n"
    )
    assert error.where == "r.yaml, line 10, step m, models.code.weight"


def test_the_result_of_a_step_takes_no_adapter() -> None:
    body = "m: {merge: linear, models: [maths]}\nn: {merge: linear, models: [m+./lora]}"
    assert refused(body).code == "RG309"


def test_a_measurement_is_no_model() -> None:
    body = "s: {evaluate: accuracy, models: base, data: d}\nm: {merge: linear, models: [s]}"
    assert "measures models and makes none" in refused(body).what


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("steps: {}\n", "RG303", "no steps"),
        ("models: {}\n", "RG303", "no steps"),
        ("step: {}\n", "RG302", "'steps'"),
        ("steps: [a]\n", "RG303", "mapping"),
        ("models: {a: }\nsteps: {m: {merge: linear, models: [a]}}\n", "RG303", "no value"),
        ("models: {a+b: x}\nsteps: {m: {merge: linear, models: [a]}}\n", "RG303", "name of a model"),
        ("seed: x\nsteps: {m: {merge: linear, models: [./a]}}\n", "RG303", "seed"),
    ],
)
def test_mistakes_at_the_top(text: str, code: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_files_are_loaded_with_their_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: {m: {merge: linear, models: [./a]}}\n", encoding="utf-8")
    recipe = load_recipe(file)
    assert recipe.path == file
    assert recipe.text == file.read_text(encoding="utf-8")
    assert recipe.steps[0].where == "mine.yaml, line 1, step m"
