"""Feature distillation: the student's hidden states become those of the teacher, block by block.

    mse:     mean over blocks l of mean over valid tokens and features of (h_l^student - h_l^teacher)^2
    cosine:  mean over blocks l of mean over valid tokens of 1 - cos(h_l^student, h_l^teacher)

h_l are the token features behind block l. Padding is left out, where the code published with PELA averages over it too:
what stands there is never used. Both models must have the same width and, unless only the last block is matched, the
same number of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from regraft.axes.module_map import modules_of
from regraft.errors import UserError
from regraft.train.masks import masked_mean, valid
from regraft.train.objective import Batch, Term
from regraft.train.tap import Seen, Signal, every_block


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor | None, kind: str = "mse") -> Tensor:
    """The distance of hidden states (B, T, width) of two models.

    Args:
        mask: (B, T), true where a position counts; None if all do.
        kind: "mse" or "cosine".
    """
    student, teacher = student.float(), teacher.float()
    if kind == "cosine":
        return masked_mean(1 - functional.cosine_similarity(student, teacher, dim=-1), mask)
    return masked_mean((student - teacher).square(), mask)


class Features(Term):
    """Feature distillation.

    Args:
        blocks: "all", or "last" for the last block of each stack.
        kind: "mse" or "cosine".
    """

    name = "features"
    needs_teacher = True

    def __init__(self, blocks: Literal["all", "last"] = "all", kind: Literal["mse", "cosine"] = "mse") -> None:
        self.blocks, self.kind = blocks, kind

    def signals(self, model: Any) -> Sequence[Signal]:
        if self.blocks == "last":
            return [Signal("block", stack, -1) for stack in modules_of(model).blocks]
        return every_block(model)

    def teacher_signals(self, teacher: Any) -> Sequence[Signal]:
        return self.signals(teacher)

    def prepare(self, student: Any, teacher: Any | None) -> None:
        own, other = modules_of(student).blocks, modules_of(teacher).blocks
        mine, theirs = ({s: len(b) for s, b in blocks.items()} for blocks in (own, other))
        if self.blocks == "all" and mine != theirs:
            what = f"the student has blocks {mine} and the teacher {theirs}"
            raise UserError("RG203", what, fix="match the last block only, or take models of equal depth")
        if own.keys() != other.keys():
            what = f"the student has the stacks {list(own)} and the teacher {list(other)}"
            raise UserError("RG203", what, fix="take models of one kind")

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        assert teacher is not None
        losses = []
        for signal in self.signals(student.model):
            one, other = student[signal], teacher[signal]
            if one.shape != other.shape:
                what = f"the student's features are {tuple(one.shape[1:])} and the teacher's {tuple(other.shape[1:])}"
                raise UserError("RG201", what, fix="take models of equal width and equal inputs")
            losses.append(feature_loss(one, other, valid(batch, signal.stack, one), self.kind))
        return torch.stack(losses).mean()
