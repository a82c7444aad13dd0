"""Where a tensor sits in its model: in which layer of which stack, before or after it, and in which role.

Families are described by tables (`families.py`); a model of a family without a table is described by what its tensor
names show, a numbered group that repeats, which is enough to place tensors in layers but not to change the number of
layers. Names are matched whether or not the checkpoint has the prefix of a bare base model ("model.", "bert.").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from regraft.axes.families import FAMILIES, Family, Stack

Position = Literal["before", "inside", "after"]


@dataclass(frozen=True)
class Place:
    """Where a tensor sits.

    Attributes:
        layer: index from the input, 0-based, within its stack; None outside the layers.
        num_layers: layers of that stack (of the main stack for tensors outside); None where none are known.
        stack: "" if the model has one stack, else "encoder", "decoder", "text", "vision".
        role: "embedding", "head", "norm" (outside the layers), "buffer" (computed from the config, no weights) or "".
        position: before the layers, inside or after them.
    """

    layer: int | None = None
    num_layers: int | None = None
    stack: str = ""
    role: str = ""
    position: Position = "before"


@dataclass(frozen=True)
class Layout:
    """The layers of one model; made by `layout`.

    Attributes:
        family: the table used, "" if the names alone were used; `known` says which.
        stacks: stack name -> number of layers.
        tied: pairs (alias, canonical) that the configuration ties.
        layer_count_key: stack name -> key of config.json that holds its number of layers.
    """

    family: str
    stacks: Mapping[str, int]
    tied: tuple[tuple[str, str], ...] = ()
    layer_count_key: Mapping[str, str] = field(default_factory=dict)
    _table: Family | None = field(default=None, repr=False)

    @property
    def known(self) -> bool:
        return self._table is not None

    def place(self, name: str) -> Place:
        """The place of a tensor; tensors that no table mentions sit before the layers, without a role."""
        stack, found = self._layer(name)
        if found is not None and stack is not None:
            return Place(int(found["layer"]), self.stacks.get(stack.name), stack.name, self._role(name), "inside")
        role = self._role(name)
        main, position = self._outside(name, role)
        return Place(None, self.stacks.get(main), main, role, position)

    def renamed(self, name: str, layer: int) -> str:
        """The name of the same tensor in another layer; names outside the layers stay."""
        _, found = self._layer(name)
        if found is None:
            return name
        return f"{name[: found.start('layer')]}{layer}{name[found.end('layer') :]}"

    def _layer(self, name: str) -> tuple[Stack | None, re.Match[str] | None]:
        if self._table is None:
            found = _numbered(name, tuple(self.stacks))
            return (
                (Stack(found["stack"] if len(self.stacks) > 1 else next(iter(self.stacks)), "", ""), found)
                if found
                else (None, None)
            )
        for stack in self._table.stacks:
            found = _compiled(stack.layers).search(name)
            if found:
                return stack, found
        return None, None

    def _role(self, name: str) -> str:
        if name.endswith(_BUFFERS):
            return "buffer"
        if self._table is None:
            return ""
        for role in ("embedding", "head", "norm"):
            if any(_compiled(p).search(name) for p in getattr(self._table, role)):
                return role
        return ""

    def _outside(self, name: str, role: str) -> tuple[str, Position]:
        if self._table is None:
            return (next(iter(self.stacks)) if len(self.stacks) == 1 else ""), "before"
        after = any(_compiled(p).search(name) for p in self._table.after)
        names = [s for s in self._table.stacks if s.prefix and _compiled(s.prefix).search(name)]
        main = names[0].name if names else self._table.stacks[-1 if after else 0].name
        return main, "after" if after else "before"


# Computed from the config when the model is built; old checkpoints store them.
_BUFFERS = ("inv_freq", "masked_bias", "position_ids")
_NUMBERED = re.compile(r"(?P<stack>(?:^|.*?\.)[A-Za-z_][\w]*)\.(?P<layer>\d+)\.")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _numbered(name: str, stacks: tuple[str, ...]) -> re.Match[str] | None:
    found = _NUMBERED.match(name)
    return found if found and (found["stack"] in stacks or stacks == ("",)) else None


def layout(config: Mapping[str, Any], names: Collection[str]) -> Layout:
    """The layout of a model.

    Args:
        config: config.json, {} if there is none.
        names: names of its stored tensors.
    """
    table = FAMILIES.get(str(config.get("model_type") or ""))
    if table is None:
        return _inferred(names)
    counts = {s.name: 0 for s in table.stacks}
    for name in names:
        for stack in table.stacks:
            found = _compiled(stack.layers).search(name)
            if found:
                counts[stack.name] = max(counts[stack.name], int(found["layer"]) + 1)
                break
    present = {s: n for s, n in counts.items() if n}
    if not present:
        return _inferred(names)
    tied = _tied(table, config, names)
    keys = {s.name: s.count_key for s in table.stacks if s.name in present}
    return Layout(str(config["model_type"]), present, tied, keys, table)


def _tied(table: Family, config: Mapping[str, Any], names: Collection[str]) -> tuple[tuple[str, str], ...]:
    flag = config.get("tie_word_embeddings")
    if flag is None:
        flag = table.ties
    if not flag:
        return ()
    pairs = []
    for alias, canonical in table.tied:
        # The names as this checkpoint has them, with or without the prefix of the bare model.
        real_alias = next((n for n in names if n == alias or n.endswith(f".{alias}")), alias)
        real = next((n for n in names if n == canonical or n.endswith(f".{canonical}")), canonical)
        pairs.append((real_alias, real))
    return tuple(pairs)


def _inferred(names: Collection[str]) -> Layout:
    """Stacks from the numbered groups with the most tensors; small groups, such as two norms of a head, are none."""
    groups: Counter[str] = Counter()
    layers: dict[str, int] = {}
    for name in names:
        found = _NUMBERED.match(name)
        if found:
            groups[found["stack"]] += 1
            layers[found["stack"]] = max(layers.get(found["stack"], 0), int(found["layer"]) + 1)
    if not groups:
        return Layout("", {})
    most = max(groups.values())
    stacks = {prefix: layers[prefix] for prefix, count in groups.items() if count * 4 >= most}
    return Layout("", stacks)
