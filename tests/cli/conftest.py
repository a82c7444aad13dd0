"""A runner for the command line in this process, and tiny models to run it on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from models import save_fine_tune, save_model
from regraft.cli.main import app


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`cli("merge", recipe, out)` -> exit_code, stdout, stderr."""
    monkeypatch.delenv("COLUMNS", raising=False)  # parallel test runners set it; tables would be cut
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and its fine-tunes `a` and `b`."""
    folder = tmp_path_factory.mktemp("family")
    save_model(folder / "base", "llama")
    for seed, name in enumerate("ab", start=1):
        save_fine_tune(folder / name, folder / "base", seed)
    return folder


@pytest.fixture
def recipe(family: Path, tmp_path: Path) -> Path:
    """A recipe with one merge of the family."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"models: {{base: {family}/base, a: {family}/a, b: {family}/b}}\n"
        "steps:\n"
        "  merged:\n"
        "    merge: ties\n"
        "    base: base\n"
        "    models: {a: {weight: 0.6}, b: {weight: 0.4}}\n"
        "    density: 0.2\n"
    )
    return path
