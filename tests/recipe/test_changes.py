"""Changes from the command line: they are made where they say, and read as the file would be."""

from __future__ import annotations

from pathlib import Path

import pytest

from regraft.errors import UserError
from regraft.recipe import load_recipe, parse_recipe
from regraft.recipe.changes import apply_changes, dump
from regraft.recipe.yaml_file import parse_yaml

RECIPE = """\
models:
  base: ./base
  a: ./a
  v1.5: ./b
steps:
  merged:
    merge: ties
    base: base
    models:
      a: {weight: 0.6}
      v1.5:
    density: 0.2
  second.try: {merge: linear, models: [a, merged]}
"""


def _changed(*changes: str) -> dict:
    return apply_changes(parse_yaml(RECIPE), changes).plain()


def test_a_value_is_replaced_and_keeps_its_line() -> None:
    tree = apply_changes(parse_yaml(RECIPE), ["steps.merged.density=1e-1"])
    density = tree.value["steps"].value["merged"].value["density"]
    assert (density.value, density.line) == (0.1, 12)


def test_paths_go_through_names_with_dots_lists_and_empty_entries() -> None:
    changed = _changed("steps.second.try.models[0]=base", "steps.merged.models.v1.5.weight=0.4", "models.v1.5=./c")
    assert changed["steps"]["second.try"]["models"] == ["base", "merged"]
    assert changed["steps"]["merged"]["models"] == {"a": {"weight": 0.6}, "v1.5": {"weight": 0.4}}
    assert changed["models"]["v1.5"] == "./c"


def test_values_are_yaml_and_later_changes_see_earlier_ones() -> None:
    changed = _changed("steps.merged.models.a={weight: [0, 1]}", "steps.merged.models.a.weight.1=0.5", "seed = 7")
    assert changed["steps"]["merged"]["models"]["a"] == {"weight": [0, 0.5]}
    assert changed["seed"] == 7


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("steps.merged.density", "RG303", "has no key and value"),
        ("=3", "RG303", "has no key and value"),
        ("steps.mergd.density=1", "RG302", "did you mean 'merged'?"),
        ("steps.merged.density.value=1", "RG302", "0.2 is a single value"),
        ("steps.second.try.models[2]=a", "RG302", "no entry '2'"),
        ("steps.second.try.models.x=a", "RG302", "no entry 'x'"),
        ("steps.merged.density=[0.1", "RG306", "--set steps.merged.density"),
        ("steps.merged.density=1\nother: 2", "RG306", "more than one"),
    ],
)
def test_changes_that_lead_nowhere(change: str, code: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        _changed(change)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_a_changed_value_is_checked_as_one_in_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with pytest.raises(UserError) as caught:
        load_recipe(path, changes=["steps.merged.density=7"])
    assert caught.value.code == "RG303"
    assert "recipe.yaml with --set, line 12, step merged, density" in str(caught.value)


def test_the_text_of_a_changed_recipe_is_the_recipe_that_runs() -> None:
    changed = parse_recipe(RECIPE, changes=["steps.merged.density=0.5", "seed=3"])
    again = parse_recipe(changed.text)
    assert again.steps[0].settings["density"][0].value == 0.5
    assert again.steps[0].seed == 3
    assert parse_recipe(RECIPE).text == RECIPE


def test_dump_quotes_texts_that_would_read_back_as_something_else() -> None:
    text = "{a: '1e-3', b: 'true', c: 'no', d: '~', e: 'x: y', f: \"one\\ntwo\", g: 1e-3, h: [1, '2']}"
    tree = parse_yaml(text)
    assert parse_yaml(dump(tree)).plain() == tree.plain()
