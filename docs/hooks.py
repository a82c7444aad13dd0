"""Hands the generated pages to MkDocs, and fills in the tables that hand-written pages ask for."""

from __future__ import annotations

from typing import Any

import generate
from mkdocs.structure.files import File

# `<!-- table: NAME -->` in a page stands for one of these.
TABLES = {
    "rules": lambda: generate.rule_table("methods/{}.md"),
    "families": generate.families,
    "performance": generate.performance,
    "parity": generate.parity,
    "latency": generate.latency,
    "overhead": generate.overhead,
    "minilm": generate.minilm,
    "zoo": generate.zoo,
}


def on_config(config: Any) -> Any:
    """Adds the generated pages to the navigation, before its last entry."""
    config.nav[-1:-1] = generate.nav()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages themselves."""
    for path, text in generate.pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts tables in place of their markers."""
    for name, table in TABLES.items():
        marker = f"<!-- table: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, table())
    return markdown
