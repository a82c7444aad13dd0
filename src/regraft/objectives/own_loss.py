"""The loss that a model computes itself when it is given labels: what it was pre-trained or fine-tuned with.

Masked tokens, next tokens, hidden patches, classes, or pairs of images and texts: which of them is decided by the
batch, which `regraft.train.batches` makes for the model's architecture.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regraft.errors import UserError
from regraft.train.masked_images import guesses_patches
from regraft.train.objective import Batch, Term
from regraft.train.tap import Seen, accepted


class OwnLoss(Term):
    """The model's own loss."""

    name = "own"

    def prepare(self, student: Any, teacher: Any | None) -> None:
        if not {"labels", "return_loss"} & accepted(type(student)) and not guesses_patches(student):
            what = f"a {type(student).__name__} computes no loss of its own"
            raise UserError("RG309", what, fix="use a model with a head, or set the weight of its own loss to 0")

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        loss: Tensor | None = getattr(student.output, "loss", None)
        if loss is None:
            raise UserError("RG601", "the data has no labels that the model's own loss needs", fix="add a label column")
        return loss
