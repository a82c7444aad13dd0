"""Alignment with descriptions: features of images, projected, become those of the embeddings of their descriptions.

    v_i = q(f_i) / |q(f_i)|                       f_i: what goes into the classifier, q: the projector
    t_i                                           the unit vector of the description of image i
    S_ij = v_i . t_j / temperature
    ctr:   mean_i CE(S_i., i)                     each image finds its description among those of the batch
    clip:  (mean_i CE(S_i., i) + mean_j CE(S_.j, j)) / 2          and each description its image
    byol:  mean_i 2 - 2 v_i . t_i                 without negatives

Images without a description are left out, as rows and as columns. Equal descriptions within a batch are positives of
one another: the target is spread evenly over them (with `identical: negatives` only the own one counts, as in the
published code). With `mask_same_class` other images of the same class are no negatives. In several processes the rows
of all of them are compared.

The projector hangs on the model while it is trained, and is taken off when training ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft.axes.module_map import classifier_of
from regraft.errors import UserError
from regraft.train import heads
from regraft.train.gather import gathered, whole_gradient
from regraft.train.objective import Batch, Collate, Term
from regraft.train.tap import Seen, Signal
from regraft.train.text_embeddings import MISSING, TextEmbeddings

Alignment: TypeAlias = Literal["clip", "ctr", "byol"]

EMBEDDINGS, NUMBERS = "description_embeddings", "description_numbers"
FEATURES = Signal("features")


def alignment_loss(
    images: Tensor,
    texts: Tensor,
    kind: Alignment = "clip",
    temperature: float = 0.2,
    *,
    same: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """The loss of a batch, a scalar.

    Args:
        images: projected features (B, D), of any length.
        texts: unit vectors (B, D), row i belonging to image i.
        temperature: for clip and ctr.
        same: (B, B), true where text j belongs to image i; the diagonal if None.
        left_out: (B, B), true where text j is no negative of image i; none if None.
    """
    units = functional.normalize(images.float(), dim=-1)
    if kind == "byol":
        return (2 - 2 * (units * texts).sum(-1)).mean()
    same = torch.eye(len(units), dtype=torch.bool, device=units.device) if same is None else same
    logits = units @ texts.T / temperature
    if left_out is not None:
        logits = logits.masked_fill(left_out & ~same, torch.finfo(logits.dtype).min)
    loss = _cross_entropy(logits, same)
    return (loss + _cross_entropy(logits.T, same.T)) / 2 if kind == "clip" else loss


def _cross_entropy(logits: Tensor, same: Tensor) -> Tensor:
    """Mean over rows, of which each has its target spread evenly over the true entries of `same`."""
    logs = torch.where(same, logits.log_softmax(-1), 0.0)
    return -(logs.sum(-1) / same.sum(-1)).mean()


def projector(
    width: int, dimension: int, kind: Literal["mlp", "linear"] = "mlp", *, batch_norm: bool = True, seed: int = 0
) -> nn.Module:
    """A projector of features (B, width) to (B, dimension), initialised as in the published code.

    Args:
        kind: "mlp", with a hidden layer of twice the dimension, or "linear", a matrix without bias.
        batch_norm: normalise the hidden layer, and start as the code for residual networks does; else as that for
            vision transformers.
        seed: of the initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "linear":
            made: nn.Module = nn.Linear(width, dimension, bias=False)
        else:
            hidden = 2 * dimension
            norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
            layers = [nn.Linear(width, hidden, bias=not batch_norm), *norm, nn.ReLU(), nn.Linear(hidden, dimension)]
            made = nn.Sequential(*layers)
        for module in made.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=1024**-0.5 if batch_norm else 0.02)
    return made


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model is of the kind that the published code gives the defaults of residual networks."""
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


class Descriptions(Term):
    """Alignment with descriptions; batches need what `with_descriptions` adds.

    Args:
        dimension: of the embeddings.
        alignment: see the module's docstring.
        temperature: None for what the published code takes, 0.2 for models with batch norm, 0.05 for others.
        kind: of the projector, "mlp" or "linear".
        batch_norm: in the projector; None to have it where the model has it.
        identical: what equal descriptions in a batch are to one another.
        mask_same_class: other images of the same class are no negatives; needs labels.
        seed: of the projector's initial weights.
    """

    name = "descriptions"

    def __init__(
        self,
        dimension: int,
        alignment: Alignment = "clip",
        temperature: float | None = None,
        *,
        kind: Literal["mlp", "linear"] = "mlp",
        batch_norm: bool | None = None,
        identical: Literal["positives", "negatives"] = "positives",
        mask_same_class: bool = False,
        seed: int = 0,
    ) -> None:
        self.dimension, self.alignment, self.temperature = dimension, alignment, temperature
        self.kind, self.batch_norm, self.identical = kind, batch_norm, identical
        self.mask_same_class, self.seed = mask_same_class, seed
        self.used: dict[str, Any] = {}  # the temperature and the projector of the model that was prepared last

    def signals(self, model: Any) -> Sequence[Signal]:
        return (FEATURES,)

    def prepare(self, student: Any, teacher: Any | None) -> None:
        head = classifier_of(student)
        linear = next((m for m in student.get_submodule(head).modules() if isinstance(m, nn.Linear)), None)
        if not head or linear is None:
            what = f"a {type(student).__name__} has no linear classifier whose features could be aligned"
            raise UserError("RG309", what, fix="use an image classifier, or give it a new head")
        normed = has_batch_norm(student)
        batch_norm = normed if self.batch_norm is None else self.batch_norm
        made = projector(linear.in_features, self.dimension, self.kind, batch_norm=batch_norm, seed=self.seed)
        temperature = self.temperature or (0.2 if normed else 0.05)
        named = f"{self.kind} with batch norm" if self.kind == "mlp" and batch_norm else self.kind
        self.used = {"projector": named}
        if self.alignment != "byol":
            self.used["temperature"] = temperature
        heads.attach(student, self.name, made)

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        features = student[FEATURES].float()
        if features.flatten(1).shape[1:] != features.shape[1:2]:
            what = f"the classifier looks at features of shape {tuple(features.shape[1:])}, not at one vector"
            raise UserError("RG309", what, fix="use a classifier of pooled features")
        projected = heads.attached(student.model, self.name)(features.flatten(1))
        images, texts, numbers = (gathered(rows) for rows in (projected, batch[EMBEDDINGS], batch[NUMBERS]))
        there = numbers != MISSING
        if not bool(there.any()):
            return images.sum() * 0.0
        same = None
        if self.identical == "positives":
            same = (numbers[:, None] == numbers)[there][:, there]
        left_out = None
        if self.mask_same_class:
            labels = gathered(batch["labels"])
            left_out = (labels[:, None] == labels)[there][:, there]
        temperature = self.used.get("temperature", 1.0)
        loss = alignment_loss(images[there], texts[there], self.alignment, temperature, same=same, left_out=left_out)
        return whole_gradient(loss)


def with_descriptions(collate: Collate, embeddings: TextEmbeddings, column: str = "text") -> Collate:
    """Batches that also hold the embeddings of the examples' descriptions, which stand in a column."""

    def collating(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Batch:
        vectors, numbers = embeddings([example.get(column) for example in examples])
        return {**collate(examples, seeds), EMBEDDINGS: vectors, NUMBERS: numbers}

    return collating
