"""The parts of a step: the whole model, or modules and slices of it, with the base and the options of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from regraft.axes import Layout, Modules
from regraft.checkpoint import Checkpoint
from regraft.errors import UserError
from regraft.merge.rule import Rule
from regraft.recipe.build import Builder, Part, Piece
from regraft.recipe.document import Input, MergeStep, Setting, Slice
from regraft.recipe.fit import Member, unexpected


def parts_of(step: MergeStep, rule: Rule[Any], members: Mapping[str, Member]) -> tuple[Part, ...]:
    """The whole model or its modules, each with its slices, or with all models as one."""
    if not step.modules:
        found = step.slices or (Slice(step.inputs, step.base),)
        pieces = tuple(_piece(piece, (piece.settings,), step, rule, members) for piece in found)
        return (Part(None, pieces, bool(step.slices), step.where),)
    parts = []
    for one in step.modules:
        found = one.slices or (Slice(one.inputs, step.base),)
        pieces = tuple(_piece(piece, (piece.settings, one.settings), step, rule, members) for piece in found)
        parts.append(Part(one.name, pieces, bool(one.slices), one.where))
    return tuple(parts)


def _piece(
    piece: Slice,
    levels: tuple[Mapping[str, Setting], ...],
    step: MergeStep,
    rule: Rule[Any],
    members: Mapping[str, Member],
) -> Piece:
    """A slice, or all models as one, with the base where the rule wants it.

    mergekit's recipes list the base among the models; rules with a base take it out again, and rules that only call
    their first model so (slerp) put it first.
    """
    base = members[piece.base] if piece.base is not None else None
    if rule.needs_base and base is None:
        fix = "add base: <the model that the others were fine-tuned from>"
        raise UserError("RG304", f"{rule.name} needs a base model", where=step.where, fix=fix)
    theirs = [i for i in piece.inputs if base is not None and same_model(members[i.model], base)]
    others = [i for i in piece.inputs if i not in theirs]
    if base is not None and rule.base_first:
        first = theirs or [Input(piece.base or "", {}, others[0].layers if others else None)]
        made = Piece((*first, *others), levels, piece.base)
    elif base is not None and rule.reads_base and theirs:
        if step.dialect == "regraft" and not step.slices:
            what = f"the base is also listed among the models ({theirs[0].model})"
            raise UserError("RG305", what, where=step.where, fix="list only its fine-tunes under models")
        made = Piece(tuple(others), levels, piece.base, theirs[0].layers)
    else:
        made = Piece(tuple(piece.inputs), levels, piece.base)
    rule.check_count(len(made.inputs), where=step.where)
    return made


def check_modules(
    builder: Builder,
    parts: Sequence[Part],
    others: Sequence[Member],
    members: Mapping[str, Member],
    layouts: Mapping[str, Layout],
    excluded: Sequence[re.Pattern[str]],
    step: MergeStep,
) -> None:
    """Every module of the recipe is one of the model's, and the other way round; no tensor of any model is dropped.

    Raises:
        UserError: RG307 for a module that the model does not have, RG309 for one that the recipe leaves out, RG202 for
            tensors that only another model has.
    """
    template, own, known = builder.template, builder.layout, builder.modules
    kind = template.checkpoint.model_type or template.name
    named = [part.module for part in parts if part.module is not None]
    for part in parts:
        if part.module is not None and part.module not in known.names:
            what = f"{kind} has no module {part.module}"
            raise UserError("RG307", what, where=part.where, fix=f"its modules are {', '.join(known.names)}")
    left = [name for name in known.names if named and name not in named]
    if left or (named and known.strays):
        lost = left[0] if left else known.strays[0]
        what = f"modules says nothing of {lost}, which the result would be without"
        fix = f"add {lost}: {{models: [...]}}" if left else "merge whole models with models: instead"
        raise UserError("RG309", what, where=step.where, fix=fix)
    for part in parts:
        if part.stacked:
            continue
        there = {m.name for m in (members[i.model] for p in part.pieces for i in p.inputs)}
        there |= {members[p.base].name for p in part.pieces if p.base is not None}
        for other in [m for m in others if m.name in there]:
            within = Modules(other.checkpoint.config, layouts[other.name], other.checkpoint.tensors)
            mine = (lambda _: True) if part.module is None else _in_module(within, part.module)
            unexpected(template, [other], excluded, layout=own, within=mine, where=step.where)


def _in_module(modules: Modules, module: str) -> Callable[[str], bool]:
    return lambda tensor: modules.of(tensor) == module


def same_model(a: Member, b: Member) -> bool:
    """Whether two names stand for one checkpoint."""
    one, other = a.checkpoint, b.checkpoint
    return one is other or (
        (one.path, one.stamps, one.revision, one.adapters) == (other.path, other.stamps, other.revision, other.adapters)
        and type(one) is type(other) is Checkpoint
    )
