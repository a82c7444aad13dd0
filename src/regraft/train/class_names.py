"""Classes of two classifiers, matched by their names: two models may number the same classes differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.errors import UserError
from regraft.inspect.classification import names_by_number

_NAMES = "names are id2label in config.json"


def class_names(config: Any) -> list[str] | None:
    """The names of a classifier's outputs in order; None where they are those that transformers makes up."""
    names = _all_names(config)
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def name_classes(model: Any, names: Sequence[str]) -> None:
    """Give the outputs of a classifier names, in their order."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}


def class_order(student: Any, teacher: Any) -> Tensor | None:
    """The number that each of the student's classes has in the teacher, (C,); None where both number them alike.

    Names that transformers makes up say nothing: they are matched by number, and with nothing but one another.

    Args:
        student, teacher: configurations of classifiers.

    Raises:
        UserError: RG207 for models that do not tell the same classes apart, or of which one alone names them.
    """
    own, other = _all_names(student), _all_names(teacher)
    if own == other:
        return None
    fix = f"take models of the same labels; {_NAMES}"
    if len(own) != len(other):
        what = f"the student tells {len(own)} classes apart and the teacher {len(other)}"
        raise UserError("RG207", what, fix=fix)
    nameless = [who for who, one in (("student", student), ("teacher", teacher)) if class_names(one) is None]
    if nameless:
        what = f"the {nameless[0]}'s classes have no names by which they could be found in the other model"
        raise UserError("RG207", what, fix=f"name them as the other model does; {_NAMES}")
    for who, names in (("student", own), ("teacher", other)):
        if len(set(names)) < len(names):
            raise UserError("RG207", f"two classes of the {who} have one name", fix=f"name them apart; {_NAMES}")
    if lacking := [name for name in own if name not in other]:
        what = f"the student has a class {lacking[0]!r}, and the teacher has none of that name"
        raise UserError("RG207", what, fix=fix)
    return torch.tensor([other.index(name) for name in own])


def need_one_class_each(model: Any) -> None:
    """Raise RG309 for a head whose outputs are no distribution over classes: one number, or several labels at once."""
    config = model.config
    count, kind = len(_all_names(config)), getattr(config, "problem_type", None)
    if count < 2 or kind in ("regression", "multi_label_classification"):
        what = f"a {type(model).__name__} with {count} output(s) does not choose one of several classes"
        raise UserError("RG309", what, fix="take a classifier of one label per example")


def _all_names(config: Any) -> list[str]:
    return list(names_by_number(config).values())
