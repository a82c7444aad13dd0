"""Whatever stands at whatever place of a recipe, the answer is a recipe or one sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import UserError
from regraft.recipe import parse_recipe

OWN: dict[str, Any] = {
    "seed": 1,
    "models": {"base": "org/base", "a": "org/a"},
    "steps": {
        "m": {
            "merge": "ties",
            "base": "base",
            "models": {"a": {"weight": [{"filter": "mlp", "value": [0, 1]}]}, "./b": None},
            "density": 0.2,
            "dtype": "float32",
            "exclude": ["x"],
            "config_from": "a",
            "chat_template": "{{x}}",
            "sweep": {"lambda": [1, [0, 1]]},
        },
        "p": {"merge": "passthrough", "slices": [{"models": [{"model": "a", "layers": [0, 2], "scale": 1}]}]},
        "s": {"evaluate": "accuracy", "models": ["m", "p"], "data": "d", "limit": 3},
    },
}
MERGEKIT: dict[str, Any] = {
    "merge_method": "dare_ties",
    "base_model": "org/base",
    "slices": [
        {
            "sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1, "density": [0.1, 1]}}],
            "base_model": "org/base",
            "parameters": {"rescale": False},
        }
    ],
    "parameters": {"normalize": True, "weight": [{"filter": "x", "value": 1}]},
    "dtype": "bfloat16",
    "tokenizer": {"source": {"model": {"path": "x", "revision": "y"}, "lora": "z"}},
    "chat_template": "auto",
}


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


words = ["", " ", "a", "m", "m@lambda=1", "+", "@", "a+", "./x", "ties", "base", "union", "{{", "\u00e9", "-1"]
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=True) | st.sampled_from(words)
keys = st.sampled_from(["model", "models", "weight", "filter", "value", "base", "path", "density", "x", ""])
anything = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3), max_leaves=6)


def test_the_recipes_that_are_changed_below_are_good() -> None:
    assert len(parse_recipe(yaml.safe_dump(OWN, sort_keys=False)).steps) == 4
    assert parse_recipe(yaml.safe_dump(MERGEKIT)).steps[0].name == "merged"


@pytest.mark.parametrize("recipe", [OWN, MERGEKIT], ids=["own", "mergekit"])
@settings(max_examples=250)
@given(data=st.data())
def test_nothing_but_user_errors(recipe: dict[str, Any], data: st.DataObject) -> None:
    changed = copy.deepcopy(recipe)
    path = data.draw(st.sampled_from(places(recipe)[1:]))
    value = data.draw(anything)
    parent = changed
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    error = refusal(text)
    assert error is None or error.where, str(error)


def refusal(text: str) -> UserError | None:
    try:
        parse_recipe(text)
    except UserError as error:
        return error
    return None
