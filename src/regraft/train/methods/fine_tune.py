"""Go on training with the model's own loss: masked or next tokens, hidden patches, classes, or images with texts.

What the model is decides what is learnt. A causal or masked language model goes on with its pre-training on `data`, as
does one that guesses hidden patches of images (ViT-MAE, or ViT, DeiT and Swin with a mask token); an encoder-decoder
learns to write the column `target` for the column `text`; a classifier learns the labels of `data`; a model with two
towers learns which image belongs to which text. With `head: sequence_classification` (or `image_classification`) and
`labels` the model gets a new head first.

Any model that regraft loads can be trained, low-rank ones included; they stay low-rank.

With `lora_rank` a LoRA adapter is trained and the weights stay as they are; both factors of a low-rank layer get one.
What comes out is the model with the adapter merged into its weights, or, with `lora_output: adapter`, the adapter as
PEFT saves it, together with the head of a classifier. A rate of 1e-4 or more is usual for adapters.

Paper on adapters: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

from regraft.errors import UserError
from regraft.objectives.own_loss import OwnLoss
from regraft.train.lora import LoraOptions, adapted, makes_adapter
from regraft.train.making import Made, Work, chosen, maker
from regraft.train.objective import Sum
from regraft.train.start import FitOptions, HeadOptions, fit, keeps_tensors, start


class FineTuneOptions(FitOptions, HeadOptions, LoraOptions):
    """Options of fine_tune."""


@maker(
    room="train",
    summary="the model's own loss on data",
    options=FineTuneOptions,
    same_tensors=keeps_tensors,
    adapter=makes_adapter,
)
def fine_tune(work: Work[FineTuneOptions]) -> Made:
    """Raises RG309 for a model without a loss of its own, or data without labels for it."""
    o = work.options
    if makes_adapter(o) and o.init != "weights":
        what = f"with init: {o.init} there is no model that an adapter could be loaded on"
        raise UserError("RG303", what, fix="set lora_output: merged")
    begun = start(work)
    if not begun.batches.has_loss:
        what = f"a {type(begun.model).__name__} with this data has no loss of its own"
        raise UserError("RG309", what, fix="give labels or targets, or a head")
    objective = Sum(begun.batches.collate, [(1.0, OwnLoss())])
    if o.lora_rank is None:
        return fit(work, begun, objective)
    adapter = adapted(begun.model, chosen(o, LoraOptions), seed=o.seed)
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    work.message(f"{trained:,} of {sum(p.numel() for p in adapter.parameters()):,} parameters are trained")
    made = fit(work, begun, objective, adapter=adapter)
    made.diagnostics["trained_parameters"] = trained
    if makes_adapter(o):
        made.adapter = adapter
    else:
        made.model = adapter.merge_and_unload().to(begun.dtype).eval()
    return made
