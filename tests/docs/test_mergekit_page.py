"""What the page on mergekit says of defaults and refusals is what the registry and the reader do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from regraft.errors import UserError
from regraft.merge.rule import REQUIRED, Rule, field_names
from regraft.methods import methods
from regraft.recipe import parse_recipe
from regraft.recipe.yaml_file import scalar

PAGE = (Path(__file__).parents[2] / "docs" / "mergekit.md").read_text(encoding="utf-8")
MODELS = "models: [{model: org/a, parameters: {weight: 1}}, {model: org/b, parameters: {weight: 1}}]\n"
TIES = f"merge_method: ties\nbase_model: org/base\n{MODELS}"
SLICE = "{{{base}sources: [{{model: org/a, layer_range: [0, 1]}}, {{model: org/b, layer_range: [0, 1]}}]{more}}}"
LINEAR_SLICES = "merge_method: linear\nslices: [{}]\nparameters: {{weight: 1}}\n"


def rows(text: str) -> list[list[str]]:
    """The body of the first table in `text`."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def between(start: str, end: str) -> str:
    assert PAGE.count(start) == PAGE.count(end) == 1
    return PAGE.partition(start)[2].partition(end)[0]


def cell_value(cell: str) -> Any:
    return scalar(cell.strip("`"))


def own_default(rule: Rule[Any], option: str) -> Any:
    value = rule.options.model_fields[field_names(rule.options)[option]].get_default(call_default_factory=True)
    return value[0] if isinstance(value, tuple) else value


def test_two_defaults_are_those_of_the_registry() -> None:
    written = {}
    for rule, option, own, theirs in rows(between("<!-- two-defaults -->", "<!-- /two-defaults -->")):
        key = rule.strip("`"), option.strip("`")
        ours = re.search(r"\(our (`[^`]+`)\)", theirs)
        spelt = cell_value(theirs.partition(" (")[0])
        written[key] = (cell_value(own), spelt, cell_value(ours[1]) if ours else spelt)
    registered = {}
    for method in methods("merge"):
        assert isinstance(method, Rule)
        for option, theirs in method.mergekit_defaults.items():
            if method.in_mergekit and theirs != own_default(method, option):
                spellings = {ours: given for given, ours in method.mergekit_values.get(option, {}).items()}
                spelt = "required" if theirs is REQUIRED else spellings.get(theirs, theirs)
                registered[method.name, option] = (own_default(method, option), spelt, theirs)
    assert written == registered
    assert len(written) > 10


REFUSED = {
    "`merge_method: pcb`": [TIES.replace("ties", name) for name in ("pcb", "layer_swap")],
    "`merge_method` in a slice": [LINEAR_SLICES.format(SLICE.format(base="", more=", merge_method: slerp"))],
    "`residual_weight`": [LINEAR_SLICES.format(SLICE.format(base="", more=", residual_weight: 0.1"))],
    "`override_architecture`": [
        TIES.replace("model: org/a", "model: {model: org/a, override_architecture: LlamaForCausalLM}")
    ],
}
# Every key of the classes that mergekit 0.1.5 reads its files into, and `name` of mergekit-multi.
MERGEKIT_KEYS = {
    "MergeConfiguration": "merge_method base_model models slices modules dtype out_dtype parameters tokenizer_source"
    " tokenizer chat_template name",
    "OutputModuleDefinition": "slices models parameters",
    "OutputSliceDefinition": "sources base_model residual_weight parameters",
    "InputSliceDefinition": "model layer_range parameters",
    "InputModelDefinition": "model parameters",
    "ModelReference": "model lora override_architecture",
    "ModelPath": "path revision",
    "ConditionalParameter": "value filter",
    "TokenizerConfig": "source tokens pad_to_multiple_of",
    "TokenEmbeddingConfig": "source force",
    "ModelTokenEmbedding": "kind model token_id token",
}
MODEL = "{model: {path: org/a, revision: v1}, lora: {path: org/l, revision: v2}, override_architecture: null}"
WITH_ALL = f"""
merge_method: linear
name: mine
base_model: {MODEL}
modules:
  default:
    slices:
      - sources: [{{model: {MODEL}, layer_range: [0, 1], parameters: {{weight: [{{value: 1, filter: mlp}}]}}}}]
        base_model: org/a
        residual_weight: null
        parameters: {{weight: 1}}
    models: null
    parameters: {{weight: 1}}
models: null
slices: null
parameters: {{normalize: true}}
dtype: float32
out_dtype: float16
tokenizer_source: null
tokenizer:
  source: union
  tokens: {{x: {{source: {{kind: model_token, model: org/a, token_id: 3, token: null}}, force: true}}}}
  pad_to_multiple_of: 8
chat_template: auto
"""


def test_every_key_of_mergekit_is_in_the_table_and_read() -> None:
    table = "".join(line for row in rows(PAGE.partition("## Every key")[2]) for line in row)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", table))))
    every = {key for keys in MERGEKIT_KEYS.values() for key in keys.split()}
    assert every <= named
    assert all(re.search(rf"\b{key}:\s", WITH_ALL) for key in every)
    (step,) = parse_recipe(WITH_ALL).steps
    assert step.modules[0].slices[0].inputs[0].model == "org/a@v1+org/l@v2"  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["merge_method", "sources", "layer_range", "filter", "revision", "force", "kind"])
def test_a_slip_in_any_of_them_is_an_error(key: str) -> None:
    text = re.sub(rf"\b{key}: ", f"{key}_: ", WITH_ALL, count=1)
    with pytest.raises(UserError) as caught:
        parse_recipe(text)
    assert caught.value.code in ("RG302", "RG303"), str(caught.value)


def refused_rows() -> list[str]:
    return [row[0] for row in rows(PAGE.partition("## What is refused")[2])]


@pytest.mark.parametrize("row", refused_rows())
def test_what_the_page_says_is_refused_is_refused(row: str) -> None:
    files = next(files for start, files in REFUSED.items() if row.startswith(start))
    for text in files:
        with pytest.raises(UserError) as caught:
            parse_recipe(text)
        assert caught.value.code == "RG309", text


def test_the_files_are_refused_for_nothing_else() -> None:
    """Without what is refused, they are read."""
    assert len(refused_rows()) == len(REFUSED)
    for text in (TIES, LINEAR_SLICES.format(SLICE.format(base="", more=""))):
        assert parse_recipe(text).steps[0].dialect == "mergekit"  # type: ignore[union-attr]
