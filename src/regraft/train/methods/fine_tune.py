"""Go on training with the model's own loss: masked or next tokens, hidden patches, classes, or images with texts.

What the model is decides what is learnt. A causal or masked language model goes on with its pre-training on `data`, as
does one that guesses hidden patches of images (ViT-MAE, or ViT, DeiT and Swin with a mask token); a classifier learns
the labels of `data`; a model with two towers learns which image belongs to which text. With
`head: sequence_classification` (or `image_classification`) and `labels` the model gets a new head first.

Any model that regraft loads can be trained, low-rank ones included; they stay low-rank.
"""

from __future__ import annotations

from regraft.errors import UserError
from regraft.objectives.own_loss import OwnLoss
from regraft.train.making import Made, Work, maker
from regraft.train.objective import Sum
from regraft.train.start import FitOptions, HeadOptions, fit, keeps_tensors, start


class FineTuneOptions(FitOptions, HeadOptions):
    """Options of fine_tune."""


@maker(room="train", summary="the model's own loss on data", options=FineTuneOptions, same_tensors=keeps_tensors)
def fine_tune(work: Work[FineTuneOptions]) -> Made:
    """Raises RG309 for a model without a loss of its own, or data without labels for it."""
    begun = start(work)
    if not begun.batches.has_loss:
        what = f"a {type(begun.model).__name__} with this data has no loss of its own"
        raise UserError("RG309", what, fix="give labels, or a head")
    return fit(work, begun, Sum(begun.batches.collate, [(1.0, OwnLoss())]))
