"""The README's list of rules and commands is what the program itself lists; nobody has to remember to change it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from regraft.cli.main import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def listed() -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["methods", "--room", "merge", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert isinstance(found, list)
    return found


def rows() -> dict[str, list[str]]:
    """Name of the rule -> what it does, models, base, papers, as the README has them."""
    assert README.count("<!-- rules -->") == README.count("<!-- /rules -->") == 1
    table = README.partition("<!-- rules -->")[2].partition("<!-- /rules -->")[0].strip().splitlines()
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]
    return {name.strip(" `"): rest for name, *rest in found}


def test_the_table_has_the_rules_that_methods_lists() -> None:
    assert list(rows()) == [rule["name"] for rule in listed()]


@pytest.mark.parametrize("rule", listed(), ids=lambda r: r["name"])
def test_a_row_says_what_methods_says(rule: dict[str, Any]) -> None:
    what, _, base, papers = rows()[rule["name"]]
    assert what == rule["summary"]
    assert (base == "required") is rule["needs_base"]
    linked = re.findall(r"\]\((https://[^)]+)\)", papers)
    assert linked == [p["url"] for p in rule["papers"] if p["url"]]
    if not rule["papers"]:
        assert papers == "—"


def test_every_command_has_its_line() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^\| `regraft ([\w-]+)", README, re.MULTILINE)) == commands


def test_the_first_recipe_is_short() -> None:
    """What a reader sees first has to fit into one glance."""
    recipe = re.search(r'```yaml title="recipe.yaml"\n(.*?)```', README, re.DOTALL)
    assert recipe is not None
    assert len(recipe[1].splitlines()) <= 12
