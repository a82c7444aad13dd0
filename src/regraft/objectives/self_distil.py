"""Self-distillation: what a student makes of a whole input becomes what a frozen teacher makes of it.

    loss = mean over examples of |f_student(x) - f_teacher(x)|^2        x is not masked, whatever else the batch hides

f is the encoder's last hidden state, behind its last norm: of the first token, which stands for the whole input in
models that have such a token (`cls`, as in the code published with the paper); its mean over the input's tokens
(`mean`); or each token's own, the distances being averaged over the tokens of an input (`tokens`). A distance is the
sum of squares over the width, as in the paper, or their mean. Everything is computed in float32.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from torch import Tensor

from regraft.errors import UserError
from regraft.train.masked_images import showing_all
from regraft.train.masks import valid
from regraft.train.objective import Batch, Term
from regraft.train.tap import LAST, Seen, look
from regraft.train.teacher import Teacher

Target: TypeAlias = Literal["cls", "mean", "tokens"]
Reduction: TypeAlias = Literal["sum", "mean"]
WHOLE = "whole"  # the entry of a batch with its inputs as they are, unmasked


def representation_loss(
    student: Tensor, teacher: Tensor, target: Target = "cls", reduction: Reduction = "sum", mask: Tensor | None = None
) -> Tensor:
    """The loss of a batch, a scalar.

    Args:
        student, teacher: last hidden states, (B, T, width).
        target: what represents an input.
        reduction: over the width.
        mask: (B, T), true where a token is no padding; None if none is.
    """
    student, teacher = student.float(), teacher.float()
    weights = student.new_ones(student.shape[:2]) if mask is None else mask.to(student.dtype)
    if target == "cls":
        student, teacher, weights = student[:, :1], teacher[:, :1], weights[:, :1]
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1)  # (B, T)
    difference = student - teacher
    if target == "mean":  # the difference of means is the mean of differences
        difference, shares = (difference * shares[..., None]).sum(1, keepdim=True), shares.new_ones(len(shares), 1)
    squares = difference.square()
    distances = squares.sum(-1) if reduction == "sum" else squares.mean(-1)
    return (distances * shares).sum(1).mean()


class SelfDistillation(Term):
    """The distance to a teacher that has the student's architecture.

    The student passes through `batch["whole"]` a second time, after the pass that the other terms share; both passes
    are with its dropout.

    Args:
        teacher: runs the encoder of the teacher.
    """

    name = "representation"

    def __init__(self, teacher: Teacher, target: Target = "cls", reduction: Reduction = "sum") -> None:
        self.teacher, self.target, self.reduction = teacher, target, reduction
        teacher.signals = (LAST,)

    def prepare(self, student: Any, teacher: Any | None) -> None:
        own, other = student.base_model, self.teacher.model
        mine, theirs = ({n: tuple(p.shape) for n, p in model.named_parameters()} for model in (own, other))
        if mine.keys() != theirs.keys():
            name = sorted(mine.keys() ^ theirs.keys())[0]
            what = f"only one of student and teacher has {name} in its encoder"
            raise UserError("RG203", what, fix="take a teacher that was trained from the model itself")
        for name, shape in mine.items():
            if shape != theirs[name]:
                what = f"{name} has shape {list(shape)} in the student and {list(theirs[name])} in the teacher"
                raise UserError("RG201", what, fix="take a teacher that was trained from the model itself")

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        encoder, inputs = student.model.base_model, batch[WHOLE]
        with showing_all(encoder):
            own = look(encoder, inputs, (LAST,))[LAST]
        with showing_all(self.teacher.model):
            other = self.teacher(inputs)[LAST]
        return representation_loss(own, other, self.target, self.reduction, valid(inputs, "", own))
