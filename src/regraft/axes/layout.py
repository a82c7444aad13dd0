"""Where each tensor of a model belongs: which layer of which stack, or which side of the layers, and as what.

A family that has a table (`regraft.axes.families`) is read from it. For any other, stacks of layers are inferred from
numbered groups of names, and `known` is False: what is inferred from names alone may be wrong, and says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from regraft.axes.families import FAMILIES, Family
from regraft.axes.infer import infer
from regraft.axes.place import Place, Scheme

T = TypeVar("T")


class Layout:
    """The places of all tensors of one model; made by `layout`.

    Attributes:
        family: `model_type` of the configuration, "" if that does not say.
        known: whether a table describes this family; if not, layers were inferred from names.
        stacks: name of each stack of layers -> how many layers the tensors have.
        tied: (alias, canonical) names of tensors that are one, because the configuration ties them.
        layer_count_key: stack -> the configuration's key of its number of layers (dotted if nested).
        tokens: name of the embedding of tokens, as this checkpoint would spell it; "" if there is none or not known.
        table: the family's table, None for a family without one.
    """

    def __init__(
        self,
        family: str,
        known: bool,
        scheme: Scheme,
        stacks: Mapping[str, int],
        tied: tuple[tuple[str, str], ...] = (),
        layer_count_key: Mapping[str, str] | None = None,
        tokens: str = "",
        table: Family | None = None,
    ) -> None:
        self.family, self.known, self.stacks, self.tied = family, known, dict(stacks), tied
        self.layer_count_key = dict(layer_count_key or {})
        self.tokens, self.table = tokens, table
        self._scheme = scheme
        self._places: dict[str, Place] = {}

    def place(self, name: str) -> Place:
        """Where the tensor `name` belongs. A name that nothing is known of is outside the layers, without a role."""
        found = self._places.get(name)
        if found is None:
            found = self._places[name] = self._find(name)
        return found

    def _find(self, name: str) -> Place:
        split = self._scheme.split(name)
        if split is None:
            if self._scheme.buffer(name):
                return Place(role="buffer")
            return self._scheme.outside(name) or Place()
        stack, _, layer, rest = split
        role = "buffer" if self._scheme.buffer(rest) else ""
        part, transposed = self._scheme.part(rest) or "", self._scheme.transposed(rest)
        return Place(layer, self.stacks.get(stack), stack, role, "inside", part, transposed)

    def renamed(self, name: str, layer: int) -> str:
        """The name of the same tensor in another layer.

        Raises:
            ValueError: if `name` is not in a layer.
        """
        split = self._scheme.split(name)
        if split is None:
            raise ValueError(f"{name} is outside the layers")
        _, head, _, rest = split
        return f"{head}{layer}.{rest}"

    def path(self, name: str) -> str:
        """Where the layers are that a tensor is in: what stands before the number.

        Raises:
            ValueError: if `name` is not in a layer.
        """
        split = self._scheme.split(name)
        if split is None:
            raise ValueError(f"{name} is outside the layers")
        return split[1].removesuffix(".")

    def of_the_stack(self, name: str) -> bool:
        """Whether a tensor lies in the first layer for all layers of its stack, which have none of their own."""
        split = self._scheme.split(name)
        return split is not None and self.table is not None and bool(_longest(self.table.of_the_stack, split[3]))

    def bare(self, name: str) -> str:
        """The name that this tensor has in a base model without a head, for a family with a table; else `name`."""
        return self._scheme.bare(name)

    def vocabulary_axis(self, name: str) -> int | None:
        """The dimension of a tensor that counts the tokens of the vocabulary; None if none of them does.

        Only the table of a family tells; where there is none, `known` is False and nothing is said of any tensor.
        """
        return self.table.vocabulary.get(self.bare(name)) if self.table is not None else None

    @property
    def vocabulary_key(self) -> str:
        """The configuration's key of the size of the vocabulary, dotted if nested."""
        return self.table.vocabulary_size if self.table is not None else "vocab_size"

    def unplaced(self, names: Collection[str]) -> list[str]:
        """The names among `names` that the family's table, or the inference, says nothing of."""
        return [name for name in names if not _explained(self._scheme, name)]


def layout(config: Mapping[str, Any], names: Collection[str]) -> Layout:
    """The places of a model's tensors.

    Args:
        config: config.json; may be empty, then a table is taken that explains every name, if there is one.
        names: the names of the stored tensors; without any, only what the configuration says is known.
    """
    kind = str(config.get("model_type") or "")
    if kind in FAMILIES:
        scheme = _Table(FAMILIES[kind], names)
        if scheme.stacks or not names:
            return scheme.layout(kind, names, scheme.tied(config, names))
    elif not kind:
        for family in FAMILIES.values():
            scheme = _Table(family, names)
            if scheme.stacks and all(_explained(scheme, name) for name in names):
                return scheme.layout("", names, ())
    inferred = infer(config, names)
    return Layout(kind, False, inferred, inferred.stacks, (), inferred.count_keys)


def flat_layout() -> Layout:
    """The layout of a bare state dict: tensors by name, of which nothing is known."""
    return Layout("", False, _Flat(), {})


class _Flat:
    """No stacks, no roles, no buffers."""

    def split(self, name: str) -> None:
        return None

    def outside(self, name: str) -> None:
        return None

    def part(self, rest: str) -> None:
        return None

    def transposed(self, rest: str) -> bool:
        return False

    def buffer(self, name: str) -> bool:
        return False

    def bare(self, name: str) -> str:
        return name


def _explained(scheme: Scheme, name: str) -> bool:
    split = scheme.split(name)
    if split is None:
        return scheme.buffer(name) or scheme.outside(name) is not None
    return scheme.buffer(split[3]) or scheme.part(split[3]) is not None


class _Table:
    """A family's table, applied to the names of one checkpoint."""

    def __init__(self, family: Family, names: Collection[str]) -> None:
        self._family = family
        self._prefixes = (*family.prefixes, "")
        self._prefix = ""
        self.stacks: dict[str, int] = {}
        for name in names:
            if (split := self.split(name)) is not None:
                stack, head, layer, _ = split
                self.stacks[stack] = max(self.stacks.get(stack, 0), layer + 1)
                self._prefix = next(p for p in self._prefixes if head.startswith(p))
        self.stacks = {stack: self.stacks[stack] for stack in family.stacks if stack in self.stacks}
        self.count_keys = {stack: family.stacks[stack].count for stack in self.stacks}

    def layout(self, kind: str, names: Collection[str], tied: tuple[tuple[str, str], ...]) -> Layout:
        tokens = self._full(self._family.tokens, names) if self._family.tokens else ""
        return Layout(kind, True, self, self.stacks, tied, self.count_keys, tokens, self._family)

    def split(self, name: str) -> tuple[str, str, int, str] | None:
        for prefix, bare in self._bare(name):
            for stack, where in self._family.stacks.items():
                for path in where.paths:
                    if bare.startswith(path + "."):
                        number, _, rest = bare[len(path) + 1 :].partition(".")
                        if number.isdecimal() and rest:
                            return stack, f"{prefix}{path}.", int(number), rest
        return None

    def outside(self, name: str) -> Place | None:
        for _, bare in self._bare(name):
            found = _longest(self._family.outside, bare)
            if found is not None:
                return Place(None, None, found.stack, found.role, found.position)
        return None

    def part(self, rest: str) -> str | None:
        return _longest(self._family.inside, rest)

    def buffer(self, name: str) -> bool:
        return any(bare in self._family.buffers for _, bare in self._bare(name))

    def transposed(self, rest: str) -> bool:
        return rest in self._family.transposed

    def tied(self, config: Mapping[str, Any], names: Collection[str]) -> tuple[tuple[str, str], ...]:
        """The pairs that are one tensor here. Where only the alias is stored, the pair is the other way round."""
        pairs = list(self._family.always_tied)
        if config.get("tie_word_embeddings", self._family.ties_by_default):
            pairs += self._family.tied
        stored = set(names)
        found = []
        for alias, canonical in pairs:
            one, other = self._full(alias, stored), self._full(canonical, stored)
            found.append((other, one) if one in stored and other not in stored else (one, other))
        return tuple(found)

    def bare(self, name: str) -> str:
        return name[len(self._prefix) :] if self._prefix and name.startswith(self._prefix) else name

    def _full(self, bare: str, stored: Collection[str]) -> str:
        for prefix in self._prefixes:
            if prefix + bare in stored:
                return prefix + bare
        outside = _longest(self._family.outside, bare)
        return bare if outside is not None and outside.role == "head" else self._prefix + bare

    def _bare(self, name: str) -> Iterator[tuple[str, str]]:
        for prefix in self._prefixes:
            if name.startswith(prefix):
                yield prefix, name[len(prefix) :]


def _longest(table: Mapping[str, T], name: str) -> T | None:
    """The value of the longest entry that `name` equals or lies below; "*" is any one component."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        plain = ".".join(parts[:length])
        if plain in table:
            return table[plain]
        for pattern in table:
            if "*" in pattern:
                wanted = pattern.split(".")
                if len(wanted) == length and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False)):
                    return table[pattern]
    return None
