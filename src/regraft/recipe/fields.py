"""A place in a recipe: a value that knows its file, line, step and path, and raises errors that say so.

Both dialects are read through `Field`, so that every message has the same form: `recipe.yaml, line 12, step merged,
models.maths.weight`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from regraft.checkpoint.paths import shown
from regraft.errors import UserError, nearest
from regraft.recipe.yaml_file import Node

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, eq=False)
class Field:
    """A node with its place. `path` is relative to the step, if there is one."""

    node: Node
    file: str
    path: tuple[str | int, ...] = ()
    step: str = ""

    @property
    def where(self) -> str:
        parts = [self.file, f"line {self.node.line}", f"step {self.step}" if self.step else ""]
        return ", ".join([*(p for p in parts if p), *([dotted] if (dotted := self._dotted()) else [])])

    def _dotted(self) -> str:
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text

    @property
    def key(self) -> str:
        """The last part of the path that is a name."""
        return next((p for p in reversed(self.path) if isinstance(p, str)), self.step or "the recipe")

    @property
    def value(self) -> Any:
        """The plain value: dicts, lists and scalars."""
        return self.node.plain()

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node.value, dict)

    @property
    def is_list(self) -> bool:
        return isinstance(self.node.value, tuple)

    @property
    def is_null(self) -> bool:
        return self.node.value is None

    def error(self, code: str, what: str, fix: str = "") -> UserError:
        return UserError(code, what, where=self.where, fix=fix)

    def in_step(self, name: str) -> Field:
        """The same node as a step's body."""
        return replace(self, step=name, path=())

    def items(self, expected: str = "a mapping") -> dict[str, Field]:
        """The entries of a mapping.

        Raises:
            UserError: RG303 if it is none; `expected` says what belongs here.
        """
        if not isinstance(self.node.value, dict):
            raise self._mistyped(expected)
        return {k: replace(self, node=n, path=(*self.path, k)) for k, n in self.node.value.items()}

    def entries(self, expected: str = "a list") -> list[Field]:
        """The entries of a list that has some.

        Raises:
            UserError: RG303 if it is none, or empty.
        """
        if not isinstance(self.node.value, tuple):
            raise self._mistyped(expected)
        if not self.node.value:
            raise self.error("RG303", f"{self.key} is empty", f"give {expected}")
        return [replace(self, node=n, path=(*self.path, i)) for i, n in enumerate(self.node.value)]

    def text(self, expected: str = "a text") -> str:
        """A scalar as it is written; null and the empty text are none.

        Raises:
            UserError: RG303.
        """
        if isinstance(self.node.value, (dict, tuple)) or self.is_null or not self.node.text.strip():
            raise self._mistyped(expected)
        return self.node.text.strip()

    def exact_text(self, expected: str = "a text") -> str:
        """As `text`, with the spaces at its ends.

        Raises:
            UserError: RG303.
        """
        if isinstance(self.node.value, (dict, tuple)) or self.is_null or not self.node.text:
            raise self._mistyped(expected)
        return self.node.text

    def boolean(self) -> bool:
        """true or false; RG303 otherwise."""
        if not isinstance(self.node.value, bool):
            raise self._mistyped("true or false")
        return self.node.value

    def integer(self, low: int, high: int) -> int:
        """A whole number in [low, high]; RG303 otherwise."""
        number = self.node.value
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            raise self._mistyped(f"a whole number from {low} to {high}")
        return number

    def layers(self) -> tuple[int, int]:
        """A range of layers [first, last); RG303 if it is none."""
        numbers = self.value
        whole = isinstance(numbers, list) and len(numbers) == 2 and all(type(n) is int for n in numbers)
        if not whole or not 0 <= numbers[0] < numbers[1]:
            expected = "[first, last], the first layer (from 0) and the one behind the last"
            raise self._mistyped(expected)
        return numbers[0], numbers[1]

    def dtype(self) -> str:
        """The name of a float dtype; RG303 for another."""
        name = self.text(f"one of {', '.join(DTYPES)}").removeprefix("torch.")
        if name not in DTYPES:
            raise self.error("RG303", f"{self.key} is {name!r}", nearest(name, DTYPES))
        return name

    def check_keys(self, known: Collection[str], what: str) -> dict[str, Field]:
        """The entries of a mapping; RG302 with the nearest name for a key that is not among `known`."""
        items = self.items()
        for key, item in items.items():
            if key not in known:
                raise item.error("RG302", f"{what} has no key {key!r}", nearest(key, known))
        return items

    def _mistyped(self, expected: str) -> UserError:
        if self.is_null:
            return self.error("RG303", f"{self.key} has no value", f"give {expected}")
        return self.error("RG303", f"{self.key} is {shown(self.value, 60)}", f"give {expected}")
