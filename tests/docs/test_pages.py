"""The generated pages: one for each command and method, and every error code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer

from regraft.cli.main import app
from regraft.errors import CODES
from regraft.methods import methods

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    sys.path.insert(0, str(DOCS))
    try:
        import generate

        return generate.pages()
    finally:
        sys.path.remove(str(DOCS))


def test_every_command_has_a_page_with_its_options(pages: dict[str, str]) -> None:
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        page = pages[f"commands/{name}.md"]
        for one in [command, *getattr(command, "commands", {}).values()]:
            assert one.help.split(". ")[0].split()[0] in page
            for parameter in one.params:
                if getattr(parameter, "hidden", False):
                    continue  # mergekit's switches have a table of their own
                for flag in parameter.opts:
                    assert flag in page or str(parameter.metavar).strip("[].") in page


def test_commands_within_a_command_have_their_sections(pages: dict[str, str]) -> None:
    for verb in ("extract", "apply", "show"):
        assert f"## regraft delta {verb}\n" in pages["commands/delta.md"]
    assert "regraft delta extract [OPTIONS] MODEL OUT" in pages["commands/delta.md"]


def test_every_method_has_a_page_with_its_options_and_papers(pages: dict[str, str]) -> None:
    for method in methods():
        page = pages[f"methods/{method.name}.md"]
        for name, option in method.options.model_fields.items():
            assert f"`{option.alias or name}`" in page
        for paper in method.papers:
            assert paper.title in page


def test_every_error_code_is_explained(pages: dict[str, str]) -> None:
    for code, (title, meaning) in CODES.items():
        assert code in pages["errors.md"]
        assert title in pages["errors.md"]
        assert meaning in pages["errors.md"]
