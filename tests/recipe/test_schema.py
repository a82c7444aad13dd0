"""The JSON schemas say what the parsers do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from regraft.errors import UserError
from regraft.merge.rule import per_model_fields
from regraft.methods import methods
from regraft.recipe import parse_recipe
from regraft.recipe.schema import schema


def validator() -> Any:
    return pytest.importorskip("jsonschema").Draft202012Validator


def valid(text: str, dialect: str = "regraft") -> bool:
    return bool(validator()(schema(dialect)).is_valid(yaml.safe_load(text)))


@pytest.mark.parametrize("dialect", ["regraft", "mergekit"])
def test_the_schema_is_one_and_is_json(dialect: str) -> None:
    made = json.loads(json.dumps(schema(dialect)))
    validator().check_schema(made)
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_other_dialects_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'mergekit'") as caught:
        schema("mergekitt")
    assert caught.value.code == "RG303"


def test_every_option_of_every_method_is_in_it_with_its_description() -> None:
    steps = schema()["$defs"]
    for rule in methods("merge"):
        keys = steps[f"merge.{rule.name}"]["properties"]
        for name, value in rule.options.model_json_schema(by_alias=True)["properties"].items():
            if name == "seed":
                continue
            assert keys[name]["description"] == value["description"], (rule.name, name)
            per_model = name in per_model_fields(rule.options)
            assert keys[name].get("default") == (value["default"][0] if per_model else value.get("default"))
    for metric in methods("evaluate"):
        assert set(metric.options.model_fields) < set(steps[f"evaluate.{metric.name}"]["properties"])


def test_the_defaults_of_a_dialect_are_those_of_its_tool() -> None:
    theirs = schema("mergekit")["$defs"]["ties.parameters"]["properties"]
    assert theirs["density"]["default"] == 1.0
    assert "default" not in theirs["weight"]
    assert schema()["$defs"]["merge.ties"]["properties"]["weight"]["default"] == 1.0
    assert schema("mergekit")["$defs"]["dare_ties.parameters"]["properties"]["rescale"]["default"] is True


TOP = "models: {base: o/base, a: o/a, b: o/b}\nsteps:\n  m: "


@pytest.mark.parametrize(
    ("body", "good"),
    [
        ("{merge: ties, base: base, models: [a, b]}", True),
        ("{merge: ties, base: base, models: {a: {weight: 0.5}, b: }, density: [0.1, 0.2]}", True),
        ("{merge: sce, base: base, models: [a, b], sweep: {select_topk: [0.1, [0, 1]], seed: [1]}}", True),
        ("{merge: linear, models: {a: {weight: [{filter: mlp, value: [0, 1]}, {value: 1}]}}}", True),
        ("{merge: passthrough, slices: [{models: [{model: a, layers: [0, 2], scale: 2}]}]}", True),
        ("{merge: linear, models: [a], dtype: float32, exclude: norm, seed: 4, chat_template: '{{x}}'}", True),
        ("{evaluate: accuracy, models: [a, b], data: d, limit: 5}", True),
        ("{merge: linear, models: [a, b], tokenizer: union}", True),
        ("{merge: linear, models: [a, b], tokenizer: {source: a, tokens: {x: {source: {kind: zero}}}}}", True),
        ("{merge: linear, models: [a, b], tokenizer: {tokens: {x: {source: a}}}}", False),
        ("{merge: linear, models: [a, b], tokenizer: {source: a, pad_to_multiple_of: 0}}", False),
        ("{merge: tise, base: base, models: [a]}", False),
        ("{merge: ties, base: base, models: [a], densty: 1}", False),
        ("{merge: ties, base: base, models: {a: {normalize: true}}}", False),
        ("{merge: ties, models: [a]}", False),
        ("{merge: sce, base: base, models: [a, b], select_topk: 2}", False),
        ("{merge: linear, models: [a], weight: much}", False),
        ("{merge: linear, models: [a], sweep: {weigth: [1]}}", False),
        ("{merge: linear}", False),
        ("{merge: linear, models: [a], dtype: int8}", False),
        ("{evaluate: accuracy, models: [a], limt: 5}", False),
        ("{merge: linear, models: [a, b], output: state-dict, tensors: common}", True),
        ("{merge: linear, models: [a, b], output: state-dict, tensors: all}", False),
        ("{models: [a]}", False),
    ],
)
def test_schema_and_parser_agree_on_own_recipes(body: str, good: bool) -> None:
    assert valid(TOP + body) is good
    if good:
        parse_recipe(TOP + body)
    else:
        with pytest.raises(UserError):
            parse_recipe(TOP + body)


PAIR = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: [0, 1]}}]\n"


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("merge_method: linear\n" + PAIR, True),
        ("merge_method: ties\nbase_model: c\nparameters: {int8_mask: true, lambda: 2}\n" + PAIR, True),
        ("merge_method: dare_ties\nbase_model: c\nparameters: {rescale: false}\ndtype: bfloat16\n" + PAIR, True),
        ("merge_method: task_arithmetic\nbase_model: c\nparameters: {density: 0.2}\n" + PAIR, True),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]\n", True),
        ("merge_method: linear\nchat_template: auto\ntokenizer: {source: a}\n" + PAIR, True),
        ("merge_method: tise\n" + PAIR, False),
        ("merge_method: linear\nparameters: {normalise: true}\n" + PAIR, False),
        ("merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]\n", False),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]\n", False),
        ("merge_method: linear\nmodules: {}\n", False),
        (f"merge_method: linear\nmodules: {{default: {{{PAIR.strip()}}}}}\n", True),
        (f"merge_method: linear\nmodules: {{default: {{{PAIR.strip()}, weight: 1}}}}\n", False),
        ("merge_method: linear\nmodules: {default: {parameters: {weight: 1}}}\n", False),
        ("merge_method: linear\nmodules: {default: {models: [{model: a}], parameters: {wieght: 1}}}\n", False),
        (f"merge_method: linear\nname: mine\n{PAIR}", True),
        ("merge_method: linear\nslices: [{residual_weight: 1, sources: [{model: a, layer_range: [0, 1]}]}]\n", False),
        ("merge_method: linear\ntokenizer_source: union\n" + PAIR, True),
        ("merge_method: linear\ntokenizer: {source: {model: a}, pad_to_multiple_of: 8}\n" + PAIR, True),
        ("merge_method: linear\ntokenizer: {tokens: {x: {source: {kind: zero}, force: true}}}\n" + PAIR, True),
        ("merge_method: linear\ntokenizer: {tokens: {x: {source: {model: a}}}}\n" + PAIR, True),
        ("merge_method: linear\ntokenizer: {tokens: {x: {force: true}}}\n" + PAIR, False),
        ("merge_method: linear\ntokenizer: {tokens: {x: {source: {kind: mean}}}}\n" + PAIR, False),
        ("merge_method: linear\ntokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}\n" + PAIR, False),
        ("merge_method: linear\ntokenizer: union\n" + PAIR, False),
        ("merge_method: linear\nchat_template: chatml\n" + PAIR, True),
        ("merge_method: slerp\nparameters: {t: 0.5}\nmodels: [{model: a}, {model: b}]\n", False),
        ("merge_method: linear\n", False),
    ],
)
def test_schema_and_parser_agree_on_mergekit_recipes(text: str, good: bool) -> None:
    assert valid(text, "mergekit") is good
    if good:
        parse_recipe(text)
    else:
        with pytest.raises(UserError):
            parse_recipe(text)


def test_conditions_have_a_value() -> None:
    bad = {"filter": "mlp"}
    assert not valid(TOP + json.dumps({"merge": "linear", "models": ["a"], "weight": [bad]}))
