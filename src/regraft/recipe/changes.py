"""Changes to a recipe from outside: `steps.merged.density=0.1`, as `--set` of the command line takes them.

A change replaces a value, or adds a key to a mapping that is there. It is made on the YAML tree before anything is
read, so that a changed value is checked as one in the file is. Lines in messages are those of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import yaml

from regraft.errors import UserError, nearest
from regraft.recipe.yaml_file import Node, parse_yaml, scalar


def apply_changes(root: Node, changes: Iterable[str]) -> Node:
    """The tree with every change made, in order.

    Args:
        root: the recipe's top-level mapping.
        changes: texts `key=value`; the key is a dotted path (list entries by number, from 0), the value is YAML.

    Raises:
        UserError: RG302 for a path that leads nowhere, RG303 for a text without `=`, RG306 for a value that is no YAML.
    """
    for change in changes:
        key, equals, value = change.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError("RG303", f"--set {change!r} has no key and value", fix="write --set key=value")
        entries = parse_yaml(f"value: {value}", f"--set {key}").value
        if set(entries) != {"value"}:
            raise UserError("RG306", "the value is more than one", where=f"--set {key}", fix="give one value")
        parts = [p for p in re.split(r"\.|\[(\d+)\]", key) if p]
        root = _changed(root, parts, entries["value"], key)
    return root


def dump(root: Node) -> str:
    """The tree as YAML that reads back as the same values."""
    return yaml.dump(
        root.plain(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120
    )


def _changed(node: Node, parts: list[str], value: Node, key: str) -> Node:
    if not parts:
        return replace(value, line=node.line)
    if isinstance(node.value, tuple):
        index = int(parts[0]) if parts[0].isdecimal() else -1
        if not 0 <= index < len(node.value):
            fix = f"give a number from 0 to {len(node.value) - 1}" if node.value else "the list is empty"
            raise UserError("RG302", f"the list has no entry {parts[0]!r}", where=f"--set {key}", fix=fix)
        changed = _changed(node.value[index], parts[1:], value, key)
        return replace(node, value=(*node.value[:index], changed, *node.value[index + 1 :]))
    if not isinstance(node.value, dict) and node.value is not None:
        what = f"{node.value!r} is a single value and has no {parts[0]!r} in it"
        raise UserError("RG302", what, where=f"--set {key}", fix="shorten the key, or set the whole value")
    entries: dict[str, Node] = node.value or {}
    # Names may have dots in them: the longest key that is there wins.
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in entries:
            return replace(node, value={**entries, name: _changed(entries[name], parts[length:], value, key)})
    if len(parts) > 1:
        raise UserError(
            "RG302", f"the recipe has no {parts[0]!r} there", where=f"--set {key}", fix=nearest(parts[0], entries)
        )
    return replace(node, value={**entries, parts[0]: replace(value, line=node.line)})


class _Dumper(yaml.SafeDumper):
    """Writes texts that YAML 1.2 takes for something else, such as '1e-3', in quotes; and no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    style = "|" if "\n" in data else "'" if scalar(data) != data else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _text)
