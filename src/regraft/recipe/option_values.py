"""Options of a method as a recipe writes them: read, and every single value checked while its line is known.

A value is a scalar, a list (a gradient over depth), or a list of `{filter, value}`. An option that is itself a list or
a mapping is kept as a gradient of one anchor, which `resolve` gives back as it is. What depends on several options at
once, or on the model, is checked by the plan.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from regraft.checkpoint.paths import shown
from regraft.errors import nearest
from regraft.merge.rule import Rule, field_names, one_model_fields, per_model_fields
from regraft.methods import Method, Options
from regraft.recipe.document import Condition, Setting
from regraft.recipe.fields import Field


@dataclass(frozen=True, eq=False)
class OptionReader:
    """Reads settings of one method, in one dialect. `models` are those of the merge, by the names it gives them."""

    method: Method
    dialect: str = "regraft"
    models: Collection[str] = ()

    @property
    def names(self) -> dict[str, str]:
        """Public name of each option -> attribute."""
        return field_names(self.method.options)

    @property
    def per_model(self) -> set[str]:
        return per_model_fields(self.method.options)

    def settings(self, items: Mapping[str, Field], n: int, *, of_model: bool = False) -> dict[str, Setting]:
        """Settings of one level, for a merge of `n` models.

        Args:
            items: option name -> what the recipe says.
            n: number of models besides the base.
            of_model: the level belongs to one model, so that options of the whole merge have no place there.

        Raises:
            UserError: RG302 for an unknown option or one in the wrong place, RG303 for a value out of range.
        """
        found = {}
        for name, item in items.items():
            if name not in self.names:
                what = f"{self.method.name} has no option {name!r}"
                raise item.error("RG302", what, nearest(name, self.names))
            if of_model and name not in self.per_model:
                what = f"{name} is one value for all models, and stands here for one model"
                fix = "move it to the step" if self.dialect == "regraft" else "move it to the top-level parameters"
                raise item.error("RG302", what, fix)
            found[name] = self.setting(name, item, n)
        return found

    def setting(self, name: str, item: Field, n: int) -> Setting:
        """One option's conditions, every value in them checked; RG303."""
        if item.is_mapping and not self._is_container(name, dict):
            return (self._condition(name, item, n),)
        if item.is_list and all(e.is_mapping for e in item.entries()):
            entries = item.entries()
            conditions = tuple(self._condition(name, e, n) for e in entries)
            for i, condition in enumerate(conditions[:-1]):
                if self.dialect == "regraft" and condition.filter in (None, "*"):
                    what = f"this entry of {name} holds for all tensors, so those behind it never count"
                    raise entries[i].error("RG303", what, "move it to the end")
            return conditions
        return (Condition(self._value(name, item, n)),)

    def check(self, name: str, item: Field, n: int) -> Any:
        """One value, validated as the option's own; returned as it was written.

        Raises:
            UserError: RG303.
        """
        value = item.value
        if value is None:
            raise item.error("RG303", f"{name} has no value", "give one, or leave the key out")
        if isinstance(value, float) and not math.isfinite(value):
            raise item.error("RG303", f"{name} is {value}", "give a finite number")
        if name in one_model_fields(self.method.options):
            if value not in self.models:
                what = f"{name} is {shown(value, 60)}, which is not among the models of this merge"
                raise item.error("RG303", what, nearest(str(value), self.models))
            return value
        translated = self._translated(name, value)
        if isinstance(translated, bool) and bool not in value_types(self.method.options, self.names[name]):
            raise item.error("RG303", f"{name} is {value}", "give a value, not true or false")
        given = (translated,) * n if name in self.per_model else translated
        try:
            self.method.options(**{name: given})
        except ValidationError as error:
            for problem in error.errors():
                if problem["loc"] and problem["loc"][0] in (name, self.names[name]):
                    detail = problem["msg"].removeprefix("Value error, ")
                    what = f"{name} is {shown(value, 60)}: {detail[0].lower()}{detail[1:]}"
                    raise item.error("RG303", what, f"change {name}") from None
        return value

    def _condition(self, name: str, item: Field, n: int) -> Condition:
        items = item.check_keys(("filter", "value"), f"an entry of {name}")
        if "value" not in items:
            raise item.error("RG303", f"an entry of {name} has no value", "write {filter: ..., value: ...}")
        selector = items.get("filter")
        text = None if selector is None or selector.is_null else selector.text("a part of tensor names")
        return Condition(self._value(name, items["value"], n), text)

    def _value(self, name: str, item: Field, n: int) -> Any:
        if self._is_container(name, list) or self._is_container(name, dict):
            return [self.check(name, item, n)]
        if item.is_list:
            return [self.check(name, anchor, n) for anchor in item.entries("numbers from the first to the last layer")]
        return self.check(name, item, n)

    def _translated(self, name: str, value: Any) -> Any:
        if self.dialect == "mergekit" and isinstance(self.method, Rule) and isinstance(value, (str, bool, int, float)):
            return self.method.mergekit_values.get(name, {}).get(value, value)
        return value

    def _is_container(self, name: str, kind: type) -> bool:
        return name not in self.per_model and kind in value_types(self.method.options, self.names[name])


def value_types(options: type[Options], attribute: str) -> set[type]:
    """The types that an option's values can have; tuples and sets count as list."""
    found: set[type] = set()
    _collect(options.model_fields[attribute].annotation, found)
    return found


def _collect(annotation: Any, found: set[type]) -> None:
    origin = get_origin(annotation)
    if origin is Literal:
        found.update(type(v) for v in get_args(annotation))
        return
    kind = origin or annotation
    if isinstance(kind, type):
        if issubclass(kind, (list, tuple, set, frozenset)):
            kind = list
        elif issubclass(kind, Mapping):
            kind = dict
        found.add(kind)
    for argument in get_args(annotation):
        if argument is not Ellipsis:
            _collect(argument, found)
