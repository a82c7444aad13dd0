"""`regraft methods` and `regraft schema`: what is registered is what is shown."""

from __future__ import annotations

import json

import pytest

from regraft.cli.methods import Room, option_facts
from regraft.methods import ROOMS, method, methods


def test_rooms_are_those_of_the_registry() -> None:
    assert [r.value for r in Room] == list(ROOMS)


def test_the_table_lists_every_method_with_its_paper(cli) -> None:
    shown = cli("methods")
    assert shown.exit_code == 0
    for one in methods():
        assert one.name in shown.stdout
        assert one.summary in shown.stdout
    assert "arXiv:2306.01708" in shown.stdout


def test_room_and_json(cli) -> None:
    listed = json.loads(cli("methods", "--room", "evaluate", "--json").stdout)
    assert [m["name"] for m in listed] == [m.name for m in methods("evaluate")]
    one = json.loads(cli("methods", "ties", "--json").stdout)
    assert one["needs_base"] is True
    assert one["papers"][0]["url"] == "https://arxiv.org/abs/2306.01708"


@pytest.mark.parametrize("name", [m.name for m in methods()])
def test_every_card_has_the_description_and_all_options(cli, name: str) -> None:
    card = cli("methods", name)
    assert card.exit_code == 0
    one = next(m for m in methods() if m.name == name)
    assert one.doc.strip().splitlines()[0] in card.stdout
    for public in option_facts(one):
        assert public["name"] in card.stdout
        assert public["description"], f"{name}.{public['name']} says nothing about itself"
    assert all(p.cite() in card.stdout for p in one.papers)


def test_options_say_values_default_and_per_model() -> None:
    facts = {f["name"]: f for f in option_facts(method("merge", "ties"))}
    assert facts["density"] == {
        "name": "density",
        "values": "number, > 0, ≤ 1",
        "default": 0.2,
        "required": False,
        "per_model": True,
        "description": "share of each task vector that is kept, in (0, 1]",
    }
    assert facts["trim_scope"]["values"] == "model | tensor"
    assert facts["normalize"]["values"] == "yes or no"
    assert "lambda" in facts


def test_an_unknown_method_gets_the_nearest_name(cli) -> None:
    done = cli("methods", "tie")
    assert done.exit_code == 2
    assert done.stderr.startswith("RG301: unknown method 'tie': did you mean 'ties'?")


@pytest.mark.parametrize("dialect", ["regraft", "mergekit", "both"])
def test_schema_prints_json(cli, dialect: str) -> None:
    shown = json.loads(cli("schema", "--dialect", dialect).stdout)
    assert shown["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_schema_of_both_takes_files_of_either() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from regraft.recipe.schema import schema

    both = jsonschema.Draft202012Validator(schema("both"))
    theirs = {"merge_method": "linear", "models": [{"model": "a/b", "parameters": {"weight": 1}}]}
    ours = {"steps": {"merged": {"merge": "linear", "models": ["./a", "./b"]}}}
    assert both.is_valid(theirs)
    assert both.is_valid(ours)
    assert not both.is_valid(theirs | {"merge_method": "lineal"})
    assert not both.is_valid({"steps": {"merged": {"merge": "linear", "models": ["./a", "./b"], "wight": 1}}})
