"""Which modules of a loaded model are blocks, projections, norms, embeddings and heads: roles, read from tables.

A role is a dotted word, and a word stands for everything below it: "attention" for "attention.query". Roles within a
block are "attention" and "cross" (the modules that attend, to their own and to another sequence) with the projections
".query", ".key", ".value", ".output", or ".qkv" and ".kv" where one matrix gives several; "ffn" with ".up", ".down",
and ".gate" (which passes the activation in the place of ".up") where units are gated; and "norm". Outside: "embedding",
"norm", "head", "pooler", "projection" (into a space shared by towers), "downsample". A block has the role "block".

This module knows names only: it works for any tree of names, needs no torch, and methods ask it for names by role.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from regraft.axes.module_tables import CLASSIFIERS, MODULES, ModuleTable
from regraft.errors import UserError, nearest

T = TypeVar("T")

ROLES = (
    "attention", "attention.query", "attention.key", "attention.value", "attention.output", "attention.qkv",
    "cross", "cross.query", "cross.key", "cross.value", "cross.output", "cross.kv",
    "ffn", "ffn.up", "ffn.gate", "ffn.down", "norm", "embedding", "head", "pooler", "projection", "downsample", "block",
)  # fmt: skip


@dataclass(frozen=True)
class ModulePlace:
    """Where a module is.

    Attributes:
        role: see the module's docstring.
        stack: "" for the only stack, else "encoder", "decoder", "text", "vision".
        block: number of its block in the stack, from 0 at the input; None outside the blocks.
    """

    role: str
    stack: str = ""
    block: int | None = None

    def has(self, role: str) -> bool:
        """Whether the place has this role, or one below it."""
        return self.role == role or self.role.startswith(role + ".")


class ModuleMap:
    """The roles of all modules of one model; made by `module_map` or `modules_of`.

    Attributes:
        family: `model_type` of the configuration.
        blocks: stack -> names of its blocks, from the input on.
        places: name of a module -> its place, in the order of the model, for modules that have a role.
    """

    def __init__(self, family: str, table: ModuleTable, names: Iterable[str]) -> None:
        self.family, self._table = family, table
        self.blocks: dict[str, list[str]] = {}
        self.places: dict[str, ModulePlace] = {}
        known = list(names)
        numbered: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        for name in known:
            for stack, pattern in table.blocks.items():
                if (numbers := _match(pattern, table.prefixes, name)) is not None:
                    numbered.setdefault(stack, []).append((numbers, name))
        for stack, found in numbered.items():
            self.blocks[stack] = [name for _, name in sorted(found)]
        homes = {name: (stack, i) for stack, blocks in self.blocks.items() for i, name in enumerate(blocks)}
        for name in known:
            if (place := self._find(name, homes)) is not None:
                self.places[name] = place

    def find(self, role: str, *, stack: str | None = None, block: int | None = None) -> list[str]:
        """Names of the modules with a role or one below it, in the order of the model.

        Args:
            role: one of `ROLES`.
            stack: only in this stack.
            block: only in the block of this number; negative numbers count from the last one.
        """
        if block is not None and block < 0:
            block += len(self.blocks.get(stack or "", ()))
        return [
            name
            for name, place in self.places.items()
            if place.has(role) and stack in (None, place.stack) and block in (None, place.block)
        ]

    def part(self, block: str, role: str) -> str:
        """The name of the module with exactly this role in a block; "" if there is none."""
        inside = block + "."
        return next((n for n, p in self.places.items() if p.role == role and n.startswith(inside)), "")

    def causal(self, stack: str) -> bool:
        """Whether a position of this stack attends to those before it only."""
        return stack in self._table.causal

    @property
    def first_token(self) -> bool:
        """Whether images begin with a token that stands for the whole."""
        return self._table.first_token

    @property
    def head_dim(self) -> str:
        """The attribute of attention modules that says how wide a head is."""
        return self._table.head_dim

    @property
    def ffn_size(self) -> str:
        """The configuration's key of the width of feed-forward parts."""
        return self._table.ffn_size

    def depth(self, name: str) -> tuple[str, int | None] | None:
        """(stack, block) that a module or parameter lies in; (stack, None) for embeddings; None for anything else."""
        for stack, blocks in self.blocks.items():
            for i, block in enumerate(blocks):
                if name.startswith(block + "."):
                    return stack, i
        for path, place in self.places.items():
            if place.has("embedding") and (name == path or name.startswith(path + ".")):
                return place.stack, None
        return None

    def _find(self, name: str, homes: Mapping[str, tuple[str, int]]) -> ModulePlace | None:
        if name in homes:
            return ModulePlace("block", *homes[name])
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            home = homes.get(".".join(parts[:length]))
            if home is not None:
                role = _entry(self._table.inside, ".".join(parts[length:]))
                return ModulePlace(role, *home) if role else None
        for bare in _bare(self._table.prefixes, name):
            if (found := _entry(self._table.outside, bare)) is not None:
                return ModulePlace(*found)
        return None


def module_map(family: str, names: Iterable[str]) -> ModuleMap:
    """The roles of modules.

    Args:
        family: `model_type` of the configuration.
        names: the names of all modules, as `named_modules` gives them.

    Raises:
        UserError: RG208 for a family without a table, or names that hold no block of it.
    """
    if family not in MODULES:
        what = f"which modules of a {family or 'nameless'} model are blocks and projections is not known"
        raise UserError("RG208", what, fix=nearest(family, MODULES))
    found = ModuleMap(family, MODULES[family], names)
    if not found.blocks:
        raise UserError("RG208", f"the model has no block of a {family} model", fix="check model_type in its config")
    return found


def modules_of(model: Any) -> ModuleMap:
    """The roles of the modules of a transformers model, seen through wrappers that put a prefix before its names.

    Raises:
        UserError: RG208 as `module_map`.
    """
    family = str(getattr(getattr(model, "config", None), "model_type", "") or "")
    return module_map(family, [name for name, _ in model.named_modules()])


def classifier_of(model: Any) -> str:
    """The name of the module that makes logits of a classifier's features, of any family; "" if there is none."""
    children = {name for name, _ in model.named_children()}
    return next((name for name in CLASSIFIERS if name in children), "")


def check_roles(roles: Iterable[str], *, where: str = "") -> tuple[str, ...]:
    """The roles, if all are known. Raises RG303 with the nearest one for another."""
    chosen = tuple(roles)
    for role in chosen:
        if role not in ROLES:
            raise UserError("RG303", f"{role!r} is no role of a module", where=where, fix=nearest(role, ROLES))
    return chosen


# What wrappers (compilation, distributed training, checkpointing, PEFT) put into the names of modules.
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|module)(?=\.)"
)


def _bare(prefixes: tuple[str, ...], name: str) -> list[str]:
    plain = _WRAPPERS.sub("", name).removeprefix(".")
    return [plain, *(plain[len(p) :] for p in prefixes if plain.startswith(p))]


def _match(pattern: str, prefixes: tuple[str, ...], name: str) -> tuple[int, ...] | None:
    """The numbers at the places of "*" if a name is one of the pattern, else None."""
    wanted = pattern.split(".")
    for bare in _bare(prefixes, name):
        parts = bare.split(".")
        if _fits(wanted, parts):
            return tuple(int(p) for w, p in zip(wanted, parts, strict=True) if w == "*")
    return None


def _entry(table: Mapping[str, T], name: str) -> T | None:
    """What a table has for exactly this name; "*" is any number."""
    if name in table:
        return table[name]
    parts = name.split(".")
    return next(
        (found for pattern, found in table.items() if "*" in pattern and _fits(pattern.split("."), parts)), None
    )


def _fits(wanted: list[str], parts: list[str]) -> bool:
    return len(wanted) == len(parts) and all(
        p.isdecimal() if w == "*" else w == p for w, p in zip(wanted, parts, strict=True)
    )
