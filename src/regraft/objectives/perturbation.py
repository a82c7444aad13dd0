"""Weight perturbation: the largest deviation of a low-rank layer from the matrix that it stands for is kept near eps.

    target:  mean over layers of (max_ij |(B A - W)_ij| - eps)^2        the code published with PELA
    hinge:   mean over layers of max(0, max_ij |(B A - W)_ij| - eps)^2  what the paper's text says: within eps

With `target` a deviation smaller than eps is pulled up, too. W is the teacher's matrix. A product of O x r x I is taken
for each layer, and the gradient reaches one entry of it per layer: `every` takes it in every k-th step only.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from regraft.errors import UserError
from regraft.resize.low_rank import LowRankLinear, weight_of
from regraft.train.objective import Batch, Term
from regraft.train.tap import Seen


def perturbation_loss(product: Tensor, weight: Tensor, eps: float, mode: str = "target") -> Tensor:
    """The penalty of one layer: `product` is B A and `weight` W, both (O, I)."""
    excess = (product - weight).abs().max() - eps
    return (excess.clamp(min=0) if mode == "hinge" else excess).square()


class Perturbation(Term):
    """The penalty over all low-rank layers of the student.

    Args:
        eps: where the largest deviation is to be.
        mode: "target" or "hinge".
        every: steps between two that take it; its weight should grow alike.
    """

    name = "perturbation"
    needs_teacher = True
    reads_weights = True

    def __init__(self, eps: float = 1e-3, mode: Literal["target", "hinge"] = "target", every: int = 1) -> None:
        self.eps, self.mode, self.every = eps, mode, every
        self._step = 0

    def at(self, step: int) -> None:
        self._step = step

    def prepare(self, student: Any, teacher: Any | None) -> None:
        names = [name for name, module in student.named_modules() if isinstance(module, LowRankLinear)]
        there = dict(teacher.named_modules()) if teacher is not None else {}
        if not names:
            raise UserError("RG309", "the student has no low-rank layer", fix="factorise it first")
        lacking = [name for name in names if name not in there]
        if lacking:
            raise UserError("RG203", f"the teacher has no {lacking[0]}", fix="take the model that was factorised")

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        assert teacher is not None
        modules = [(n, m) for n, m in student.model.named_modules() if isinstance(m, LowRankLinear)]
        if self._step % self.every:
            return modules[0][1].up.weight.new_zeros(())
        there = dict(teacher.model.named_modules())
        losses = []
        for name, module in modules:
            weight = weight_of(there[name]).detach().to(module.up.weight.device)
            losses.append(perturbation_loss(module.dense(), weight, self.eps, self.mode))
        return torch.stack(losses).mean()
