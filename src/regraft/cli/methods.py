"""`regraft methods`: what there is, and one method's card: what it does, its options, whom to cite."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.terminal import Terminal
from regraft.cli.words import value_in_words

if TYPE_CHECKING:
    from regraft.methods import Method


class Room(str, Enum):
    """Verbs of a recipe's steps."""

    merge = "merge"
    compress = "compress"
    train = "train"
    evaluate = "evaluate"


def methods(
    terminal: Terminal,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this method's card.")] = None,
    room: Annotated[Room | None, typer.Option("--room", help="Only methods of this kind.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """List the methods, or show one: what it does, its options and its paper."""
    from regraft.errors import UserError, nearest
    from regraft.methods import methods as registered

    found: list[Method] = registered(room.value if room else None)
    if name is not None:
        known = [m.name for m in found]
        found = [m for m in found if m.name == name]
        if not found:
            raise UserError("RG301", f"unknown method {name!r}", fix=nearest(name, known))
    if as_json:
        facts = [describe(m) for m in found]
        terminal.json(facts if name is None else facts[0])
    elif name is None:
        _show_table(terminal, found)
    else:
        for one in found:
            _show_card(terminal, one)


def describe(method: Method) -> dict[str, Any]:
    """A method as JSON-able data."""
    return {
        "name": method.name,
        "room": method.room,
        "summary": method.summary,
        "description": method.doc.strip(),
        "papers": [{"citation": p.cite(), "url": p.url, "number": p.number} for p in method.papers],
        "needs_base": getattr(method, "needs_base", False),
        "options": option_facts(method),
        **({"sources": dict(sources)} if (sources := getattr(method, "sources", None)) else {}),
    }


def option_facts(method: Method) -> list[dict[str, Any]]:
    """Name, allowed values, default and meaning of each option; `per_model`: whether each model may have its own."""
    from regraft.merge.rule import one_model_fields, per_model_fields

    schema = method.options.model_json_schema(by_alias=True)
    per_model, one_of = per_model_fields(method.options), one_model_fields(method.options)
    required = set(schema.get("required", ()))
    facts = []
    for name, value in schema.get("properties", {}).items():
        one = value.get("items", value) if name in per_model else value
        default = value.get("default")
        if name in per_model and isinstance(default, list) and len(default) == 1:
            default = default[0]
        facts.append(
            {
                "name": name,
                "values": "one of the models" if name in one_of else _values(one, schema.get("$defs", {})),
                "default": default,
                "required": name in required,
                "per_model": name in per_model,
                "description": value.get("description", ""),
            }
        )
    return facts


def _values(schema: dict[str, Any], shared: dict[str, Any]) -> str:
    """The allowed values in words: `number, > 0, at most 1`."""
    if "$ref" in schema:
        return _values(shared[schema["$ref"].rpartition("/")[2]], shared)
    if "const" in schema:
        return value_in_words(schema["const"])
    if "enum" in schema:
        return " | ".join(map(value_in_words, schema["enum"]))
    if "anyOf" in schema:
        return " | ".join(_values(part, shared) for part in schema["anyOf"])
    words = {"integer": "whole number", "boolean": "yes or no", "string": "text", "null": "none", "object": "mapping"}
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_values(schema.get('items', {}), shared)}"
    bounds = [
        f"{sign} {value_in_words(schema[key])}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in schema
    ]
    return ", ".join([words.get(kind, kind), *bounds])


def _show_table(terminal: Terminal, found: list[Method]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "kind", "what it does", "paper", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for one in found:
        table.add_row(*(Text(t) for t in (one.name, one.room, one.summary, _paper(one))))
    terminal.out.print(table)


def _paper(method: Method) -> str:
    return ", ".join(f"arXiv:{p.arxiv}" if p.arxiv else f"{p.authors}, {p.venue}" for p in method.papers)


def _show_card(terminal: Terminal, method: Method) -> None:
    from rich.table import Table
    from rich.text import Text

    terminal.out.print(f"{method.name} ({method.room}): {method.summary}\n", markup=False, style="bold")
    if method.doc.strip():
        terminal.out.print(method.doc.strip() + "\n", markup=False)
    facts = option_facts(method)
    if facts:
        table = Table("option", "values", "default", "meaning", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for one in facts:
            default = "required" if one["required"] else value_in_words(one["default"])
            meaning = one["description"] + (" (may differ per model)" if one["per_model"] else "")
            table.add_row(*(Text(t) for t in (one["name"], one["values"], default, meaning)))
        terminal.out.print(table)
    for name, what in getattr(method, "sources", {}).items():
        terminal.out.print(f"further data, {name}: {what}", markup=False)
    for paper in method.papers:
        url = f"\n  {paper.url}" if paper.url else ""
        terminal.out.print(f"\n{paper.cite()}{url}", markup=False)
