"""What a name in a recipe stands for: a model of `models:`, a step before, or a path or Hub id written out.

Names have no `/`, `@` or `+` in them, so that a text with a `/`, or one that begins with `.` or `~`, is never a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from regraft.checkpoint.paths import WEIGHT_SUFFIXES, expanded, shown
from regraft.errors import nearest
from regraft.recipe.fields import Field

_NAME = re.compile(r"\w[\w.-]*")
_LONGEST = 100  # bytes; steps are folders, with the values of a sweep and a key behind the name
# What `regraft run` keeps beside the links that it names after steps.
_TAKEN = ("artefacts", "scores.json", "report.html")


@dataclass
class Names:
    """Everything that may be named at one point of a recipe.

    `models`: name -> reference. `later`: the steps of the whole recipe. `done`: members of the steps so far,
    step name -> names of its members (itself without a sweep). `scores`: the measuring steps so far.
    """

    models: Mapping[str, str]
    later: Collection[str] = ()
    done: dict[str, list[str]] = field(default_factory=dict)
    scores: set[str] = field(default_factory=set)

    def one(self, item: Field) -> str:
        """The single model that a text refers to, as the recipe's typed form names it.

        Raises:
            UserError: RG307 for a name that is not defined here, or that stands for a whole sweep.
        """
        text = item.text("the name of a model or step, or a reference")
        members = self.done.get(text)
        if members is not None and members != [text]:
            what = f"{text} is a sweep of {len(members)} models, and one is needed"
            raise item.error("RG307", what, f"name one of them: {_some(members)}")
        if text in self.models or members is not None or text in self.done.get(text.partition("@")[0], ()):
            return text
        head, separator, adapter = text.partition("+")
        if separator and head in self.models:
            return f"{self.models[head]}+{adapter}"
        if separator and head in self.done:
            what = f"an adapter or a delta on the result of the step {head}"
            raise item.error("RG309", what, "apply adapters and deltas before merging")
        if is_direct(text):
            return text
        raise self._unknown(item, text)

    def several(self, item: Field) -> list[str]:
        """As `one`, but the name of a sweep stands for all of its members."""
        text = item.text("the name of a model or step, or a reference")
        members = self.done.get(text)
        return list(members) if members is not None else [self.one(item)]

    def same(self, one: str, other: str) -> bool:
        """Whether two texts refer to one model, as far as texts tell."""
        return _normal(self.models.get(one, one)) == _normal(self.models.get(other, other))

    def repeated(self, references: Sequence[str]) -> int | None:
        """The place of the first reference that means the same as one before it, as far as texts tell."""
        seen: set[str] = set()
        for i, reference in enumerate(references):
            normal = _normal(self.models.get(reference, reference))
            if normal in seen:
                return i
            seen.add(normal)
        return None

    def _unknown(self, item: Field, text: str) -> Exception:
        head = re.split(r"[@+]", text)[0]
        if head == item.step:
            return item.error("RG307", f"the step {head} refers to itself", "name a model or a step before it")
        if head in self.done and text != head:
            return item.error("RG307", f"{text} is no model of the step {head}", nearest(text, self.done[head]))
        if head in self.scores:
            return item.error("RG307", f"the step {head} measures models and makes none", "name a merge step")
        if head in self.later and head not in self.done:
            return item.error("RG307", f"the step {head} comes after this one", "move it to before this step")
        known = [*self.models, *(name for members in self.done.values() for name in members)]
        what = f"nothing is called {text!r} here"
        fix = nearest(text, known) if known else "define it under models:"
        return item.error("RG307", what, f"{fix}; write ./{text} for a folder, or give a Hub id its name under models:")


def is_direct(text: str) -> bool:
    """Whether a text is a path or Hub id rather than a name."""
    return "/" in text or text.startswith((".", "~")) or text.split("+")[0].endswith(WEIGHT_SUFFIXES)


def check_name(item: Field, name: str, kind: str) -> None:
    """RG303 for a name that could be taken for a path, or that a run needs for itself."""
    if len(name.encode()) > _LONGEST:
        what = f"{shown(name, 40)} is too long to be the name of a {kind}"
        raise item.error("RG303", what, f"use at most {_LONGEST} letters")
    if not _NAME.fullmatch(name) or (kind == "step" and name in _TAKEN):
        what = f"{name!r} cannot be the name of a {kind}"
        raise item.error("RG303", what, "use letters, digits, dots, - and _, beginning with a letter or digit")


def _normal(reference: str) -> str:
    return os.path.normpath(expanded(reference)) if reference else reference


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
