"""Which tensor of a fine-tune belongs to which of its base, and why two models have no delta.

Integer and boolean tensors that differ, and tensors that only the fine-tune has (a new head, an untied one), are stored
whole: there is nothing to scale in them. Tensors that only the base has are left out. A head that is stored beside the
embedding that it is tied to is one tensor with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from regraft.axes import layout
from regraft.checkpoint import Checkpoint, TensorSource
from regraft.checkpoint.distance import relative_distance
from regraft.checkpoint.licences import short_name
from regraft.errors import UserError
from regraft.inspect.obstacles import Model, of_architecture, of_tensors, of_vocabulary
from regraft.inspect.tokenizer import tokenizer


@dataclass(frozen=True)
class Pair:
    """A tensor of the fine-tune, and the base's of the same name if there is one."""

    name: str
    model: TensorSource
    base: TensorSource | None

    @property
    def subtractable(self) -> bool:
        """Whether there is a difference of floats."""
        return self.base is not None and self.model.dtype.is_floating_point and self.base.dtype.is_floating_point


def pairs(base: Checkpoint, model: Checkpoint, *, force: bool = False) -> tuple[list[Pair], list[str]]:
    """The tensors of a fine-tune beside those of its base, and the names that only the base has.

    Args:
        force: go on although the model does not look like a fine-tune of the base.

    Raises:
        UserError: RG201, RG202, RG203, RG204 for models that do not fit, RG205 for unrelated ones unless `force`.
    """
    one, other = (
        Model(name, checkpoint, layout(checkpoint.config, checkpoint.tensors), tokenizer(checkpoint))
        for name, checkpoint in (("the base", base), ("the model", model))
    )
    found = [*of_architecture(one, other), *of_tensors(one, other), *of_vocabulary(one, other)]
    # That one side lacks a tensor, or has its head apart, is no obstacle here.
    for obstacle in found:
        if obstacle.code not in ("RG202", "RG209"):
            raise UserError(obstacle.code, obstacle.reason, where=model.ref, fix="name the base that it comes from")
    bare = {one.layout.bare(name): name for name in base.tensors}
    copies = {
        alias
        for alias, canonical in other.layout.tied
        if alias in model.tensors and canonical in model.tensors and model.same_bytes(alias, canonical)
    }
    matched = []
    for name, source in model.tensors.items():
        if name in copies:
            continue
        theirs = base.source(name) if name in base.tensors or name in base.aliases else None
        renamed = bare.get(other.layout.bare(name))
        if theirs is None and renamed is not None and renamed not in model.tensors:
            what = f"{name} of the model is called {renamed} in the base"
            raise UserError("RG202", what, where=model.ref, fix="load and save both models with the same class")
        matched.append(Pair(name, source, theirs))
    if not any(pair.subtractable for pair in matched):
        what = f"{short_name(base)} and {short_name(model)} have no tensor in common"
        raise UserError("RG202", what, where=model.ref, fix="name the base that it comes from")
    distance = relative_distance(base, model)
    if distance.verdict == "unrelated" and not force:
        what = f"the model does not look like a fine-tune of the base: {distance.sentence()}"
        raise UserError("RG205", what, where=model.ref, fix="name the base that it comes from, or go on with --force")
    kept = {pair.name for pair in matched} | copies | set(model.aliases)
    return matched, [name for name in base.tensors if name not in kept]
