"""GPT4Image: an image classifier learns its labels, and the embeddings of descriptions of its training images.

    L = CE(h(f_i), y_i) + text_weight L_text
    L_text: v_i = q(f_i) / |q(f_i)| finds the embedding t_i of its description among those of the batch, and t_i its
            image: the mean of the two cross-entropies of v_i . t_j / temperature over j and over i (`alignment: clip`)

f_i is what goes into the classifier h, q a projector: a hidden layer of twice the width of the embeddings, ReLU, with
batch norm where the model has it. The data has an image, a label and a description (column `text`) per row: of a
multimodal model, of a captioner, or made of metadata. `teacher` is the text encoder, any that transformers loads: CLIP,
a sentence encoder, BERT, T5. It reads each description once, before the training, and its embeddings stay in regraft's
cache for other runs. When the model is used there is no text and no projector: what is saved is the classifier alone.

Losses and projector, with their defaults, are those of the published code: text_weight 0.3; temperature 0.2 for
residual networks and 0.05 for vision transformers, told apart by batch norm; the last batch of an epoch, which is
smaller, left out; AdamW at 5e-4 with weight decay 0.05 as for DeiT (residual networks have gradient descent there). How
long to train is yours to say: the paper's 300 and 120 epochs are for models from scratch. Its mixup and cutmix are not
done here. A batch is what an image is told apart from, so small batches teach less; gradient_accumulation_steps makes
no batch larger.

Departures: equal descriptions within a batch are positives of one another (`identical_texts: negatives` is the
published code); an image without description learns its label alone; `mask_same_class`, which few classes need, takes
images of the same class out of the negatives. Descriptions belong to images by standing in the same row.

Encoders that never saw images may find all descriptions alike: the result's `mean_cosine` says how much, and `centre`
takes the common part away. Descriptions that are longer than the encoder's context are cut, counted and reported, or
read sentence by sentence (`long_texts: sentences`).
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Literal

from pydantic import Field, model_validator

from regraft.errors import UserError
from regraft.methods import Paper
from regraft.objectives.descriptions import Alignment, Descriptions, has_batch_norm, with_descriptions
from regraft.objectives.own_loss import OwnLoss
from regraft.train.data import values_of
from regraft.train.making import Made, Work, maker
from regraft.train.objective import Sum
from regraft.train.start import FitOptions, HeadOptions, Start, fit, keeps_tensors, start
from regraft.train.tap import accepted
from regraft.train.text_embeddings import TextEmbeddings, embed_texts
from regraft.train.text_encoder import Pooling, TextEncoder

ALIKE = 0.9  # mean cosine of two descriptions above which an encoder hardly tells them apart


class Gpt4imageOptions(FitOptions, HeadOptions):
    """Options of gpt4image."""

    learning_rate: float = Field(5e-4, gt=0, le=10, description="the highest learning rate of AdamW")
    weight_decay: float = Field(0.05, ge=0, description="decay of matrices; biases and norms do not decay")
    per_device_train_batch_size: int = Field(128, ge=1, description="examples per pass and device")
    drop_last: bool = Field(True, description="leave out the last examples of an epoch that fill no batch")
    text: str = Field("text", description="column with descriptions of the images")
    max_length: int | None = Field(
        None, ge=2, description="cut descriptions at this many tokens; else at what the text encoder takes"
    )
    text_weight: float = Field(0.3, gt=0, description="of the alignment with descriptions (lambda)")
    temperature: float | None = Field(
        None, gt=0, description="of the similarities (tau); 0.2 for models with batch norm, else 0.05, if not given"
    )
    alignment: Alignment = Field(
        "clip", description="images find descriptions and these images, only the first (ctr), or no negatives (byol)"
    )
    projector: Literal["mlp", "linear"] = Field("mlp", description="a hidden layer, or one matrix")
    projector_norm: Literal["auto", "batch", "none"] = Field(
        "auto", description="batch norm in the hidden layer; where the model has it (auto), always, or never"
    )
    identical_texts: Literal["positives", "negatives"] = Field(
        "positives", description="what equal descriptions in a batch are to each other's images"
    )
    mask_same_class: bool = Field(False, description="images of the same class are no negatives")
    pooling: Pooling = Field("auto", description="how the text encoder's states become one vector")
    long_texts: Literal["cut", "sentences"] = Field(
        "cut", description="cut long descriptions, or take the mean over sentences"
    )
    centre: bool = Field(False, description="take the mean of all descriptions from each")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Gpt4imageOptions:
        if self.text_pair is not None:
            raise ValueError("a description is one text, so text_pair has no place")
        if self.projector == "linear" and self.projector_norm == "batch":
            raise ValueError("a linear projector has no hidden layer to normalise")
        for name in ("temperature", "identical_texts", "mask_same_class"):
            if self.alignment == "byol" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no place with alignment: byol, which has no negatives")
        return self


@maker(
    room="train",
    summary="an image classifier learns from descriptions of its training images",
    options=Gpt4imageOptions,
    roles={"teacher": True},
    same_tensors=keeps_tensors,
    papers=(
        Paper(
            title="GPT4Image: Large Pre-trained Models Help Vision Models Learn Better on Perception Task",
            authors="Ding et al.",
            venue="2023",
            arxiv="2306.00693",
            number=4,
        ),
    ),
)
def gpt4image(work: Work[Gpt4imageOptions]) -> Made:
    """Raises RG309 and RG601 for models and data that have no labels or descriptions, RG303 for batches of one."""
    o = work.options
    begun = start(work)
    _check(o, begun)
    encoder = TextEncoder(
        work.models["teacher"], o.pooling,
        max_length=o.max_length, by_sentence=o.long_texts == "sentences", device=work.device,
    )  # fmt: skip
    embeddings = embed_texts(encoder, values_of(begun.data, o.text), centre=o.centre)
    pooling = encoder.pooling
    del encoder  # its work is done, and its memory is needed
    term = Descriptions(
        embeddings.dimension, o.alignment, o.temperature,
        kind=o.projector, batch_norm={"auto": None, "batch": True, "none": False}[o.projector_norm],
        identical=o.identical_texts, mask_same_class=o.mask_same_class, seed=o.seed,
    )  # fmt: skip
    collate = with_descriptions(begun.batches.collate, embeddings, o.text)
    made = fit(work, begun, Sum(collate, [(1.0, OwnLoss()), (o.text_weight, term)]))
    made.diagnostics["descriptions"] = _facts(embeddings) | {"pooling": pooling} | term.used
    made.warnings += _remarks(embeddings, centred=o.centre)
    return made


def _check(o: Gpt4imageOptions, begun: Start) -> None:
    kind, batch = begun.batches.kind, o.per_device_train_batch_size
    if kind == "images" and "labels" in accepted(type(begun.model)):
        what = f"the data has no labels in the column {o.label!r}"
        raise UserError("RG601", what, fix="name the column with the classes of the images")
    if kind != "image classes":
        what = f"a {type(begun.model).__name__} is no image classifier"
        raise UserError("RG309", what, fix="train one, or give it head: image_classification and labels")
    normed = has_batch_norm(begun.model) if o.projector_norm == "auto" else o.projector_norm == "batch"
    if o.alignment == "byol" and not (normed and o.projector == "mlp"):
        return  # neither the loss nor the projector looks at other images
    if batch == 1:
        what = "a batch of one image has nothing to tell it apart from"
        raise UserError("RG303", what, fix="raise per_device_train_batch_size; 128 is the default")
    if not o.drop_last and isinstance(begun.data, Sized) and len(begun.data) % batch == 1:
        what = f"the last batch of an epoch would hold one of the {len(begun.data)} images"
        raise UserError("RG303", what, fix="set drop_last to true, or change per_device_train_batch_size")


def _facts(embeddings: TextEmbeddings) -> dict[str, Any]:
    names = ("texts", "missing", "distinct", "cut", "dimension", "mean_cosine")
    return {name: getattr(embeddings, name) for name in names}


def _remarks(embeddings: TextEmbeddings, *, centred: bool) -> list[str]:
    found, all_of_them = [], embeddings.texts + embeddings.missing
    if embeddings.missing:
        found.append(f"{embeddings.missing} of {all_of_them} images have no description and learnt their label alone")
    if embeddings.cut:
        share = embeddings.cut / embeddings.texts
        found.append(f"{share:.1%} of the descriptions were cut: raise max_length, or set long_texts to sentences")
    if embeddings.mean_cosine > ALIKE and not centred:
        found.append(
            f"the text encoder hardly tells the descriptions apart (mean cosine {embeddings.mean_cosine:.3f}): "
            "set centre to true, or take another encoder"
        )
    return found
