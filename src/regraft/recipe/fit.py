"""Do these models fit together? Every obstacle is one sentence, found from headers and configs before work starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from regraft.axes import Layout
from regraft.checkpoint import Checkpoint, TensorSource
from regraft.checkpoint.dtypes import is_float
from regraft.checkpoint.tensor import stored_dtype
from regraft.errors import UserError
from regraft.inspect.config_keys import config_differences
from regraft.inspect.obstacles import LABEL_KEYS, Model, of_architecture, of_config, of_vocabulary
from regraft.inspect.tokenizer import TokenizerFacts, tokenizer

_CHOOSE = "say by tokenizer whose vocabulary the result gets, such as tokenizer: union"


@dataclass(frozen=True)
class Member:
    """A model of a merge, under the name that the recipe gives it."""

    name: str
    checkpoint: Checkpoint

    def find(self, tensor: str) -> TensorSource | None:
        """The tensor of this name, or the one that it is tied to."""
        own = self.checkpoint
        return own.tensors.get(tensor) or own.tensors.get(own.aliases.get(tensor, ""))


def check_architecture(
    template: Member, others: Sequence[Member], layouts: Mapping[str, Layout], *, where: str
) -> None:
    """Raise RG203 for another model type or another number of layers."""
    mine = _compared(template, layouts)
    for other in others:
        for obstacle in of_architecture(mine, _compared(other, layouts)):
            raise UserError(obstacle.code, obstacle.reason, where=where, fix=obstacle.fix)


def check_config(
    template: Member,
    others: Sequence[Member],
    layouts: Mapping[str, Layout],
    *,
    decided: bool,
    excluded: Sequence[re.Pattern[str]],
    settled: Collection[str] = (),
    where: str,
) -> list[str]:
    """Remarks on configurations under which the same weights compute something else.

    Args:
        decided: the recipe says whose configuration the output takes. Label maps are no matter of choice while the
            head is merged, and none at all while it is not.
        settled: keys that other parts of the plan see to.

    Raises:
        UserError: RG207 for such configurations unless `decided`, RG204 for vocabularies of different sizes.
    """
    remarks = []
    mine = _compared(template, layouts)
    heads = [n for n in template.checkpoint.tensors if mine.layout.place(n).role == "head"]
    head_merged = any(not any(p.search(n) for p in excluded) for n in heads)
    for other in others:
        for difference in config_differences(template.checkpoint.config, other.checkpoint.config):
            labels = difference.key in LABEL_KEYS
            if labels and not head_merged:
                continue
            for obstacle in of_config(mine, _compared(other, layouts), [difference], ignore=frozenset(settled)):
                if difference.key == mine.layout.vocabulary_key and not decided:
                    raise UserError("RG204", obstacle.reason, where=where, fix=_CHOOSE)
                if labels or not decided:
                    raise UserError(obstacle.code, obstacle.reason, where=where, fix=obstacle.fix)
                remarks.append(obstacle.reason)
    return remarks


def check_tokenizers(
    template: Member, others: Sequence[Member], layouts: Mapping[str, Layout], *, decided: bool, where: str
) -> list[str]:
    """Remarks on tokenizers that give one number to different tokens.

    Args:
        decided: the recipe says whose tokenizer the output takes, or does not merge the embedding.

    Raises:
        UserError: RG204 for such tokenizers unless `decided`.
    """
    remarks = []
    mine = _compared(template, layouts)
    for other in others:
        for obstacle in of_vocabulary(mine, _compared(other, layouts)):
            if not decided:
                fix = f"{obstacle.fix}, {_CHOOSE}, or by tokenizer_from whose files"
                raise UserError(obstacle.code, obstacle.reason, where=where, fix=fix)
            remarks.append(obstacle.reason)
    return remarks


def _compared(member: Member, layouts: Mapping[str, Layout]) -> Model:
    return Model(member.name, member.checkpoint, layouts[member.name], _tokenizer(member.checkpoint))


@lru_cache(maxsize=128)  # by identity: the steps of a recipe share their inputs
def _tokenizer(checkpoint: Checkpoint) -> TokenizerFacts | None:
    return tokenizer(checkpoint)


def matching(name: str, reference: TensorSource, member: Member, *, layout: Layout, where: str) -> TensorSource:
    """The tensor `name` of a member.

    Raises:
        UserError: RG202 if it has no such tensor, RG209 if it is tied there, RG201 or RG204 if its shape differs.
    """
    source = member.find(name)
    if source is None:
        raise missing(name, member, layout, where)
    if source.shape != reference.shape:
        raise _other_shape(name, source, reference, member, layout, where)
    return source


def missing(name: str, member: Member, layout: Layout, where: str) -> UserError:
    """The error for a tensor that a member lacks."""
    tied = dict(layout.tied)
    if name in tied and member.find(tied[name]) is not None:
        what = f"{member.name} has no {name}: it is tied to {tied[name]} there, and separate in another model"
        fix = f"untie it in {member.name} (save it with tie_word_embeddings=False), or exclude {name}"
        return UserError("RG209", what, where=where, fix=fix)
    close = [n for n in member.checkpoint.tensors if n.endswith(f".{name}") or name.endswith(f".{n}")]
    if close:
        fix = f"it has {close[0]}: load and save both models with the same class first"
    else:
        fix = "exclude it, or merge models of one architecture"
    return UserError("RG202", f"{member.name} has no tensor {name}", where=where, fix=fix)


def _other_shape(
    name: str, source: TensorSource, reference: TensorSource, member: Member, layout: Layout, where: str
) -> UserError:
    shapes = f"{name} has shape {list(source.shape)} in {member.name} and {list(reference.shape)} in the others"
    role = layout.place(name).role
    vocabulary = member.checkpoint.config.get("vocab_size")
    words = role == "embedding" or (role == "head" and source.shape[0] == vocabulary)
    if words and len(source.shape) == 2 and source.shape[1:] == reference.shape[1:]:
        what = f"the vocabularies differ: {shapes}"
        return UserError("RG204", what, where=where, fix=_CHOOSE)
    return UserError("RG201", shapes, where=where, fix="exclude it, or merge models of one architecture")


def unexpected(
    template: Member,
    others: Sequence[Member],
    excluded: Sequence[re.Pattern[str]],
    *,
    layout: Layout,
    within: Callable[[str], bool] = lambda _: True,
    where: str,
) -> None:
    """Raise RG202 for a float tensor that only another model has: dropping it would change that model.

    `within`: says of which names of the others that is asked.
    """
    known = set(template.checkpoint.tensors) | set(template.checkpoint.aliases)
    for other in others:
        for name, source in other.checkpoint.tensors.items():
            if name in known or not is_float(stored_dtype(source)) or any(p.search(name) for p in excluded):
                continue
            if layout.place(name).role == "buffer" or not within(name):
                continue
            tied = dict(layout.tied)
            if name in tied and template.find(tied[name]) is not None:
                what = f"{other.name} has a separate {name}, which {template.name} ties to {tied[name]}"
                fix = f"untie it in {template.name} (save it with tie_word_embeddings=False), or exclude {name}"
                raise UserError("RG209", what, where=where, fix=fix)
            prefixed = [n for n in known if n.endswith(f".{name}") or name.endswith(f".{n}")]
            what = f"{other.name} has a tensor {name} that {template.name} lacks"
            if prefixed:
                fix = f"there it is {prefixed[0]}: load and save both models with the same class first"
            else:
                fix = "exclude it, or take that model as the template by config_from"
            raise UserError("RG202", what, where=where, fix=fix)
