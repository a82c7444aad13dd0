"""Merging bare state dicts (`output: state-dict`): tensors by name, of models that need no configuration.

What mergekit-pytorch does: a rule is applied to each name, nothing is known of layers, and the result is the tensors
alone. Names that share one tensor in a pickled file are merged one by one, since a module that loads the result asks
for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from regraft.errors import UserError
from regraft.recipe.document import MergeStep
from regraft.recipe.fit import Member


def bare(member: Member) -> Member:
    """The model as its tensors alone, each under all of its names."""
    own = member.checkpoint
    tensors = {**own.tensors, **{name: own.tensors[canonical] for name, canonical in own.aliases.items()}}
    return Member(member.name, replace(own, tensors=tensors, aliases={}, config={}, files={}))


def refuse_more(step: MergeStep) -> None:
    """Raise RG309 for what only a model has."""
    given = {
        "slices": bool(step.slices),
        "modules": bool(step.modules),
        "config_from": step.config_from is not None,
        "a tokenizer": step.tokenizer_from is not None or step.vocabulary is not None,
        "chat_template": step.chat_template is not None,
    }
    for name, there in given.items():
        if there:
            what = f"a state dict is tensors by name, and {name} is for models"
            raise UserError("RG309", what, where=step.where, fix="leave it out, or output: state-dict")


def names_to_merge(
    template: Member,
    models: Sequence[Member],
    base: Member | None,
    tensors: str,
    excluded: Sequence[re.Pattern[str]],
    *,
    where: str,
) -> list[str]:
    """The names of the result, in the order in which the models have them.

    Args:
        template: the model that tensors to be copied come from; others that are `excluded` go where they are lacking.
        models: without the base, unless the rule takes it for one of them.
        base: the base, if there is one.
        tensors: what becomes of a tensor that some lack, one of `document.TENSORS`. Rules that read a base need it for
            every tensor.

    Raises:
        UserError: RG202 for tensors that some of the models lack, unless `tensors` allows them, and if none are left.
    """
    everyone = list(dict.fromkeys([*models, *([base] if base is not None else [])]))
    found = []
    for name in dict.fromkeys(name for m in everyone for name in m.checkpoint.tensors):
        lacking = [m for m in everyone if m.find(name) is None]
        if any(pattern.search(name) for pattern in excluded):
            wanted = template.find(name) is not None
        else:
            wanted = not lacking or (tensors == "any" and any(m.find(name) is not None for m in models))
            if not wanted and tensors == "same":
                owner = next(m for m in everyone if m not in lacking)
                what = f"{owner.name} has a tensor {name} that {lacking[0].name} lacks"
                fix = "take the tensors that all have by tensors: common (--tensor-intersection), "
                fix += "or those that any model has by tensors: any (--tensor-union)"
                raise UserError("RG202", what, where=where, fix=fix)
        if wanted:
            found.append(name)
    if not found:
        raise UserError("RG202", "the state dicts have no tensor in common", where=where, fix="check the files")
    return found
