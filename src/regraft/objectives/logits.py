"""Logit distillation: the student's distribution over classes or tokens becomes that of the teacher.

    kl:       T^2 sum_c p_t log(p_t / p_s)                      p = softmax(logits / T)
    soft_ce:  - T^2 sum_c p_t log p_s                           the same gradient, another value
    sym_kl:   T^2 (KL(p_t | p_s) + KL(p_s | p_t)) / 2           what the code of SSLD calls JS divergence
    js:       T^2 (KL(p_t | m) + KL(p_s | m)) / 2               m = (p_t + p_s) / 2
    mse:      mean_c (z_s - z_t)^2                              of the logits themselves

Mean over examples, or over the tokens that count: those with a label where the batch has labels per token, else those
that are no padding. Everything is computed in float32.

Classes are matched by their names, in whatever order the two models number them (`regraft.train.class_names`).
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from regraft.errors import UserError
from regraft.train.class_names import class_order, need_one_class_each
from regraft.train.objective import Batch, Term
from regraft.train.tap import Seen

Kind: TypeAlias = Literal["kl", "soft_ce", "sym_kl", "js", "mse"]


def logit_loss(student: Tensor, teacher: Tensor, kind: Kind = "kl", temperature: float = 1.0) -> Tensor:
    """The loss of each row of logits (..., C) -> (...)."""
    if kind == "mse":
        return (student.float() - teacher.float()).square().mean(-1)
    log_s = (student.float() / temperature).log_softmax(-1)
    log_t = (teacher.float() / temperature).log_softmax(-1)
    square = temperature**2
    if kind == "soft_ce":
        return -square * (log_t.exp() * log_s).sum(-1)
    if kind == "js":
        log_m = torch.logaddexp(log_s, log_t) - math.log(2.0)
        return square * 0.5 * (_kl(log_t, log_m) + _kl(log_s, log_m))
    if kind == "sym_kl":
        return square * 0.5 * (_kl(log_t, log_s) + _kl(log_s, log_t))
    return square * _kl(log_t, log_s)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class Logits(Term):
    """Logit distillation; see the module's docstring."""

    name = "logits"
    needs_teacher = True

    def __init__(self, kind: Kind = "kl", temperature: float = 1.0) -> None:
        self.kind, self.temperature = kind, temperature
        self._order: Tensor | None = None  # the teacher's number of each of the student's classes

    def prepare(self, student: Any, teacher: Any) -> None:
        self._order = None
        if tells_tokens(student) or tells_tokens(teacher):
            _need_same_tokens(student, teacher)
            return
        if self.kind != "mse":
            need_one_class_each(student)
            need_one_class_each(teacher)
        self._order = class_order(student.config, teacher.config)

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        assert teacher is not None
        taught = teacher.logits
        if self._order is not None:
            taught = taught[..., self._order.to(taught.device)]
        losses = logit_loss(student.logits, taught, self.kind, self.temperature)
        if losses.ndim == 1:
            return losses.mean()
        mask = _counted(batch, losses, shifted=predicts_next(student.model))
        if mask is None:
            return losses.mean()
        weights = mask.to(losses.dtype)
        return (losses * weights).sum() / weights.sum().clamp(min=1)


def _counted(batch: Batch, losses: Tensor, *, shifted: bool) -> Tensor | None:
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == losses.shape:
        counted = labels != -100
        if shifted:  # the logits of a position are about the next one
            counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], 1)
        return counted
    if isinstance(mask, Tensor) and mask.shape == losses.shape:
        return mask.bool()
    return None


def predicts_next(model: Any) -> bool:
    return "CausalLM" in type(model).__name__ or type(model).__name__.endswith("LMHeadModel")


def tells_tokens(model: Any) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None


def _need_same_tokens(student: Any, teacher: Any) -> None:
    """Raise RG204 for two models of which one tells other tokens apart, or none."""
    mine, theirs = (
        int(model.config.get_text_config().vocab_size) if tells_tokens(model) else 0 for model in (student, teacher)
    )
    if mine != theirs:
        what = f"the student tells {mine} tokens apart and the teacher {theirs}"
        raise UserError("RG204", what, fix="take two language models with one vocabulary, or two classifiers")
