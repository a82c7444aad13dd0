"""General knowledge transfer: learn from a teacher where that knows better, and from the former self elsewhere.

    z_s, z_t, z_0     logits of the student, of a teacher, and of the student as it was before the transfer (frozen)
    supervised:       the teacher teaches where p_t(label) > p_0(label)
    confidence:       the teacher teaches where max p_t > max p_0; needs no labels
    none:             the teacher teaches everywhere: plain distillation
    self:             the former self teaches everywhere: a control, from which nothing is to be learnt
    L = alpha T^2 KL(softmax(target / T) | softmax(z_s / T)) + (1 - alpha) CE(z_s, label)

The target of an example is z_t where the teacher teaches and z_0 elsewhere; ties go to the former self. Who teaches is
decided by frozen models at temperature 1, so it never changes while the student learns. Of several teachers at once,
the one teaches that is surest of all, the former self included; among equals the first.

Mean over examples, or for language models over the tokens that have a label. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from regraft.errors import UserError
from regraft.objectives.logits import logit_loss, predicts_next
from regraft.train.classes import Source
from regraft.train.objective import Batch, Collate, Objective
from regraft.train.tap import look, unwrapped
from regraft.train.teacher import batch_norms
from regraft.train.views import seen_by_all, views

Partition: TypeAlias = Literal["supervised", "confidence", "none", "self"]


def who_teaches(
    former: Tensor, teachers: Sequence[Tensor], partition: Partition, labels: Tensor | None = None
) -> Tensor:
    """Which model teaches each row: 0 for the former self, i for the i-th teacher, (N,).

    Args:
        former, teachers: logits (N, C).
        labels: (N,), for "supervised".
    """
    if partition in ("none", "self"):
        return torch.full(former.shape[:1], int(partition == "none"), device=former.device)
    sure = []
    for logits in (former, *teachers):
        p = logits.float().softmax(-1)
        if partition == "supervised":
            assert labels is not None
            sure.append(p.gather(-1, labels[:, None]).squeeze(-1))
        else:
            sure.append(p.amax(-1))
    return torch.stack(sure).argmax(0)  # the first of equals


def targets(former: Tensor, teachers: Sequence[Tensor], source: Tensor) -> Tensor:
    """The logits (N, C) that rows learn from, by `who_teaches`."""
    found = former
    for i, logits in enumerate(teachers, 1):
        found = torch.where((source == i)[:, None], logits.to(found.dtype), found)
    return found


def transfer_loss(student: Tensor, target: Tensor, temperature: float = 1.0, among: Tensor | None = None) -> Tensor:
    """The divergence of each row, (N,).

    Args:
        student, target: logits (N, C).
        among: (N, k), the classes that are looked at; all if None.
    """
    if among is not None:
        student, target = student.gather(-1, among), target.gather(-1, among)
    return logit_loss(student, target, "kl", temperature)


class Transfer(Objective):
    """The objective; see the module's docstring.

    Args:
        collate: examples and seeds -> the student's batch, with labels where something needs them.
        former: the student as it was; None for a partition that does not ask it.
        teachers: one, or several that teach at once.
        alpha: share of the divergence; what is left is that of the cross-entropy with labels.
        top_k: only the classes that are likeliest to the teacher are looked at, so many; all if None.
        skip_negative_flips: examples on which the student (as it is now) is right and the teacher wrong teach nothing;
            for partition "none".
        double_softmax: the cross-entropy takes probabilities for logits, as the code published with the paper does.
        freeze_batch_norm: batch norms keep their statistics.
    """

    def __init__(
        self,
        collate: Collate,
        former: Source | None,
        teachers: Sequence[Source],
        *,
        partition: Partition = "supervised",
        alpha: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        skip_negative_flips: bool = False,
        double_softmax: bool = False,
        freeze_batch_norm: bool = False,
    ) -> None:
        if len(teachers) > 1 and (partition in ("none", "self") or top_k is not None):
            what = "several teachers at once without a choice between them"
            raise UserError("RG309", what, fix="set partition to supervised or confidence, and leave top_k out")
        if former is None and partition != "none":
            raise ValueError(f"{partition} needs the former self")
        self._collate = seen_by_all(collate, [None if one.shares else one.collate for one in teachers])
        self.former, self.teachers = former, teachers
        self.partition, self.alpha, self.temperature, self.top_k = partition, alpha, temperature, top_k
        self.skip_negative_flips, self.double_softmax = skip_negative_flips, double_softmax
        self.freeze_batch_norm = freeze_batch_norm

    def collate(self, examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Batch:
        return self._collate(examples, seeds)

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        bare = unwrapped(model)
        if self.freeze_batch_norm:
            for module in batch_norms(bare):
                module.eval()
        own, theirs = views(batch, len(self.teachers))
        labels = own.pop("labels", None)
        student = look(model, own).logits
        asked = zip(self.teachers, theirs, strict=True) if self.partition != "self" else ()
        said = [teacher.logits(inputs) for teacher, inputs in asked]
        former = self.former.logits(own) if self.former is not None and self.partition != "none" else None
        if student.ndim == 3:
            mask, labels = _tokens(labels, shifted=predicts_next(bare))
            cut = slice(None, -1) if predicts_next(bare) else slice(None)
            student = student[:, cut][mask]
            said = [logits[:, cut][mask] for logits in said]
            former = former[:, cut][mask] if former is not None else None
        if not len(student):  # a batch of texts that are too short for a label
            return student.sum(), {}
        source = who_teaches(former if former is not None else student, said, self.partition, labels)
        target = targets(former if former is not None else said[0], said, source)
        among = said[0].topk(min(self.top_k, said[0].shape[-1]), -1).indices if self.top_k and said else None
        rows = transfer_loss(student, target, self.temperature, among)
        if self.skip_negative_flips:
            assert labels is not None
            lost = (student.argmax(-1) == labels) & (said[0].argmax(-1) != labels)
            rows = rows[~lost]
        divergence = rows.sum() / max(len(rows), 1)
        metrics = {"kl": divergence.detach(), "taught": (source > 0).float().mean()}
        if self.alpha == 1:
            return divergence, metrics
        assert labels is not None
        logits = student.float()
        entropy = functional.cross_entropy(logits.softmax(-1) if self.double_softmax else logits, labels)
        metrics["ce"] = entropy.detach()
        return self.alpha * divergence + (1 - self.alpha) * entropy, metrics


def _tokens(labels: Tensor | None, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Which positions have a label, and these labels; `shifted` where a position's logits are about the next one."""
    if labels is None:
        raise UserError("RG601", "the data has no labels of tokens", fix="use a masked or causal language model")
    after = labels[:, 1:] if shifted else labels
    mask = after != -100
    return mask, after[mask]
