"""MiniLM: the student's self-attention relations of one layer become those of the teacher's.

    relation of X and Y:   R = softmax(X Y^T / sqrt(width of a head)), over valid positions, causal where the model is
    loss of a relation:    mean over heads and valid rows of KL(R_teacher | R_student), per example; mean over examples

v1 (arXiv 2002.10957): queries with keys, and values with values, on the models' own heads, of the last layer of both;
the numbers of heads must agree. v2 (arXiv 2012.15828): queries, keys and values each with themselves; the heads are
joined and split again into `relation_heads`, whose number only has to divide both widths. No hidden states, no logits.
Widths and depths may differ, the inputs may not: both models read the same tokens.

Padding enters neither rows nor columns. With this loss alone, what lies behind the values of the student's last layer
(its output projection, feed-forward part and head) gets no gradient and stays at its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from regraft.axes.families import FAMILIES
from regraft.axes.module_map import modules_of
from regraft.errors import UserError
from regraft.train.masks import valid
from regraft.train.objective import Batch, Term
from regraft.train.tap import Seen, Signal


def relation_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    heads: int,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """The loss of one relation, a scalar.

    Args:
        student, teacher: the two sides of the relation, (B, T, width) each; the width may differ between the models.
        heads: into how many heads the widths are split.
        mask: (B, T), true where a position counts; None if all do.
        causal: a position has relations to itself and to those before it only.
    """
    length = student[0].shape[1]
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=student[0].device)
    if causal:
        seen = seen.tril()
    rows = torch.ones(student[0].shape[:2], dtype=torch.bool, device=student[0].device) if mask is None else mask
    seen = seen & rows[:, None, None, :]
    log_s, log_t = _relation(*student, heads, seen), _relation(*teacher, heads, seen)
    # Columns that are not seen have no probability in either model: exp(-inf) = 0, and 0 times their difference is 0.
    terms = torch.where(seen, log_t.exp() * (log_t - log_s), 0.0)
    per_row = terms.sum(-1).mean(1)  # (B, T)
    weights = rows.to(per_row.dtype)
    return ((per_row * weights).sum(1) / weights.sum(1).clamp(min=1)).mean()


def _relation(x: Tensor, y: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Logarithms of the relations, (B, heads, T, T), in float32."""
    one, other = (v.float().unflatten(-1, (heads, v.shape[-1] // heads)).transpose(1, 2) for v in (x, y))
    scores = one @ other.transpose(-1, -2) / math.sqrt(one.shape[-1])
    # A finite number instead of -inf: rows of padding see nothing, and would be NaN.
    logs: Tensor = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).log_softmax(-1)
    return logs


class MiniLM(Term):
    """The relations of MiniLM.

    Args:
        relation: "v1" or "v2".
        relation_heads: for v2; if None, the largest common divisor of the widths up to 48 (64 for 24-layer teachers).
        teacher_layer: number of the teacher's block, negative from the end.
    """

    name = "relations"
    needs_teacher = True

    def __init__(
        self, relation: Literal["v1", "v2"] = "v2", relation_heads: int | None = None, teacher_layer: int = -1
    ) -> None:
        self.relation, self.relation_heads, self.teacher_layer = relation, relation_heads, teacher_layer
        self._heads: dict[str, int] = {}
        self._causal = False

    def signals(self, model: Any) -> Sequence[Signal]:
        return [Signal(kind, _stack(model), -1) for kind in ("query", "key", "value")]

    def teacher_signals(self, teacher: Any) -> Sequence[Signal]:
        return [Signal(kind, _stack(teacher), self.teacher_layer) for kind in ("query", "key", "value")]

    def prepare(self, student: Any, teacher: Any | None) -> None:
        own, other = modules_of(student), modules_of(teacher)
        self._causal = own.causal(_stack(student))
        if self._causal != other.causal(_stack(teacher)):
            raise UserError("RG203", "one model sees what comes later and the other does not", fix="take two of a kind")
        depth = len(other.blocks[_stack(teacher)])
        if not -depth <= self.teacher_layer < depth:
            what = f"the teacher has no layer {self.teacher_layer}, it has {depth}"
            raise UserError("RG303", what, fix="change teacher_layer")
        if self.relation == "v1":
            self._prepare_v1(student, teacher)
            return
        largest = 64 if depth >= 24 else 48
        for kind in ("query", "key", "value"):
            one, two = _width(student, kind, -1), _width(teacher, kind, self.teacher_layer)
            common = [n for n in range(1, math.gcd(one, two) + 1) if math.gcd(one, two) % n == 0]
            heads = self.relation_heads or max(n for n in common if n <= largest)
            if heads not in common:
                what = f"{heads} relation heads do not divide the widths {one} and {two} of {kind} projections"
                raise UserError("RG303", what, fix=f"choose one of {', '.join(map(str, common))}")
            self._heads[kind] = heads

    def _prepare_v1(self, student: Any, teacher: Any) -> None:
        for model, who in ((student, "student"), (teacher, "teacher")):
            family = FAMILIES.get(model.config.model_type)
            if family is None or family.positions != "learned":
                what = f"the {who} turns or shifts attention by position, and v1 compares queries with keys"
                raise UserError("RG309", what, fix="use relation: v2")
        mine, theirs = _own_heads(student, -1), _own_heads(teacher, self.teacher_layer)
        if mine != theirs:
            what = f"the student has {mine} heads and the teacher {theirs}, and v1 needs equal numbers"
            raise UserError("RG201", what, fix=f"use relation: v2, or a student with {theirs} heads")
        self._heads = dict.fromkeys(("query", "key", "value"), mine)

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        assert teacher is not None
        own = {s.kind: student[s] for s in self.signals(student.model)}
        other = {s.kind: teacher[s] for s in self.teacher_signals(teacher.model)}
        mask = valid(batch, _stack(student.model), own["query"])
        pairs = [("query", "key"), ("value", "value")] if self.relation == "v1" else [(k, k) for k in own]
        losses = [
            relation_loss((own[a], own[b]), (other[a], other[b]), self._heads[a], mask, causal=self._causal)
            for a, b in pairs
        ]
        return torch.stack(losses).sum()


def _stack(model: Any) -> str:
    """The stack whose relations count: the only one, the encoder of two, or the text tower."""
    blocks = modules_of(model).blocks
    return next((stack for stack in ("", "encoder", "text") if stack in blocks), next(iter(blocks)))


def _projection(model: Any, kind: str, layer: int) -> tuple[Any, int]:
    """The module that gives queries, keys or values, and how many of the three it gives at once."""
    roles = modules_of(model)
    block = roles.blocks[_stack(model)][layer]
    own = roles.part(block, f"attention.{kind}")
    return (model.get_submodule(own), 1) if own else (model.get_submodule(roles.part(block, "attention.qkv")), 3)


def _width(model: Any, kind: str, layer: int) -> int:
    module, parts = _projection(model, kind, layer)
    out = getattr(module, "out_features", None) or module.nf  # Conv1D calls it nf
    return int(out) // parts


def _own_heads(model: Any, layer: int) -> int:
    roles = modules_of(model)
    attention = model.get_submodule(roles.part(roles.blocks[_stack(model)][layer], "attention"))
    return _width(model, "query", layer) // int(getattr(attention, roles.head_dim))
