"""Which value an option has for one tensor: filters, gradients over depth, precedence, dialects.

A setting is a list of conditions; the first whose filter is a substring of the tensor's name counts. A list as value
is a gradient: anchors evenly spaced over the depth of the (slice of the) layer stack, linear between them; texts and
booleans are picked by the nearest anchor below. Tensors before the layers have depth 0. Tensors after them have depth 1
in regraft's own recipes and depth 0 in mergekit's, as there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regraft.errors import UserError, nearest
from regraft.merge.rule import REQUIRED, Rule, field_names, one_model_fields, per_model_fields
from regraft.methods import Options
from regraft.recipe.document import Input, Setting

_MISSING: Any = object()


def interpolate(value: Any, depth: float) -> Any:
    """The value of a gradient at `depth` in [0, 1]; anything but a list is itself."""
    if not isinstance(value, (list, tuple)):
        return value
    position = depth * (len(value) - 1)
    low = min(int(position), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    if any(isinstance(v, (str, bool)) or v is None for v in value):
        return value[low]
    share = position - low
    if share == 0 or value[low] == value[high]:
        return value[low]
    # To the last bit as in mergekit: a count that is made of the value, such as of entries to keep, may depend on it.
    return (1 - share) * value[low] + share * value[high]


class Resolver:
    """Resolves the options of one merge step, and remembers which filters ever selected a tensor."""

    def __init__(self, rule: Rule[Any], *, dialect: str, where: str, seed: int) -> None:
        self.rule, self.where = rule, where
        self._dialect, self._seed = dialect, seed
        self._attributes = field_names(rule.options)
        self._per_model, self._one_of = per_model_fields(rule.options), one_model_fields(rule.options)
        self._resolved: dict[str, Options] = {}
        self._used: set[int] = set()
        self._filters: dict[int, str] = {}
        self._names: list[str] = []
        self._gradients: set[str] = set()

    def options(
        self,
        name: str,
        depth: float,
        inputs: Sequence[Input],
        levels: Sequence[Mapping[str, Setting]],
        theirs: Sequence[str] = (),
    ) -> Options:
        """Validated options for the tensor `name`; `levels` go from the closest (slice) to the widest (step).

        `theirs`: what each of the models calls the tensor, where layers have other numbers than in the result. In
        mergekit's recipes it is that name that filters of options per model are about.

        Raises:
            UserError: RG303 for a value out of range, or for one that a mergekit recipe has to give.
        """
        self._names.append(name)
        called = theirs if theirs and self._dialect == "mergekit" else [name] * len(inputs)
        values: dict[str, Any] = {}
        for option in self._attributes:
            if option in self._per_model:
                each = [
                    self._find(option, own, depth, [i.settings, *levels]) for own, i in zip(called, inputs, strict=True)
                ]
                if all(v is _MISSING for v in each):
                    each = [self._default(option)] * len(inputs)
                    if each[0] is _MISSING:
                        continue
                filled = [self._default(option) if v is _MISSING else v for v in each]
                self._require(option, name, inputs, filled)
                values[option] = [self._field_default(option) if v is _MISSING else v for v in filled]
                continue
            value = self._find(option, name, depth, [*(i.settings for i in inputs), *levels])
            if value is _MISSING:
                value = self._default(option)
            if value is _MISSING and option == "seed":
                value = self._seed
            if value is not _MISSING:
                self._require(option, name, inputs, [value])
                values[option] = self._place(option, name, value, inputs) if option in self._one_of else value
        key = repr((len(inputs), values))  # options that nobody set have one value per model, too
        if key not in self._resolved:
            self._resolved[key] = self.rule.resolve(len(inputs), values, where=f"{self.where}, {name}")
        return self._resolved[key]

    def check_filters(self, family: str) -> None:
        """Raise RG308 for a filter that selects no tensor of the model."""
        for identity, text in self._filters.items():
            if identity not in self._used:
                parts = {part for n in self._names for part in n.split(".") if not part.isdigit()}
                close = difflib.get_close_matches(text.strip("."), sorted(parts), n=1, cutoff=0.3)
                contained = sorted(p for p in parts if p in text or text in p)
                hint = (contained or close or [""])[0]
                fix = f"did you mean {hint!r}?" if hint else f"its names look like {self._names[len(self._names) // 2]}"
                what = f"the filter {text!r} selects no tensor of {family or 'this model'}"
                raise UserError("RG308", what, where=self.where, fix=fix)

    def remarks(self) -> list[str]:
        """What to tell where nothing is known of layers."""
        named = ", ".join(sorted(self._gradients))
        return [f"nothing is known of layers here, so that lists take their first value ({named})"] if named else []

    def _find(self, option: str, name: str, depth: float, levels: Iterable[Mapping[str, Setting]]) -> Any:
        found: Any = _MISSING
        for level in levels:
            for condition in level.get(option, ()):
                if condition.filter not in (None, "*"):
                    self._filters[id(condition)] = str(condition.filter)
                if condition.filter in (None, "*") or str(condition.filter) in name:
                    self._used.add(id(condition))
                    if isinstance(condition.value, (list, tuple)) and len(condition.value) > 1:
                        self._gradients.add(option)
                    if found is _MISSING:
                        found = self._translate(option, interpolate(condition.value, depth))
        return found

    def _place(self, option: str, name: str, model: str, inputs: Sequence[Input]) -> int:
        """Which of the models one is, from 0; RG303 if a slice does without it."""
        models = [i.model for i in inputs]
        if model not in models:
            what = f"{option} is {model!r}, which is not among the models here"
            raise UserError("RG303", what, where=f"{self.where}, {name}", fix=nearest(model, models))
        return models.index(model)

    def _translate(self, option: str, value: Any) -> Any:
        if self._dialect == "mergekit":
            table = self.rule.mergekit_values.get(option, {})
            if isinstance(value, (str, bool, int, float)) and value in table:
                return table[value]
        return value

    def _default(self, option: str) -> Any:
        if self._dialect == "mergekit":
            return self.rule.mergekit_defaults.get(option, _MISSING)
        return _MISSING

    def _field_default(self, option: str) -> Any:
        field = self.rule.options.model_fields[self._attributes[option]]
        default = field.get_default(call_default_factory=True)
        return default[0] if isinstance(default, tuple) else default

    def _require(self, option: str, name: str, inputs: Sequence[Input], values: Sequence[Any]) -> None:
        for i, value in enumerate(values):
            if value is REQUIRED or value == REQUIRED:
                who = f" for {inputs[i].model}" if option in self._per_model else ""
                what = f"{self.rule.name} needs {option!r}{who}"
                raise UserError("RG303", what, where=f"{self.where}, {name}", fix=f"give {option} in parameters")


def compile_patterns(patterns: Sequence[str], where: str) -> list[re.Pattern[str]]:
    """Regular expressions of `exclude`.

    Raises:
        UserError: RG303 if one is not a regular expression.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            what = f"{pattern!r} is no regular expression ({error})"
            raise UserError("RG303", what, where=f"{where}, exclude", fix="correct the pattern") from None
    return compiled
