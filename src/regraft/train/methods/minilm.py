"""MiniLM: a student of any depth and width learns the self-attention relations of one layer of its teacher.

    v1:  KL of softmax(Q K^T / sqrt(d_head)) and of softmax(V V^T / sqrt(d_head)), last layers, equal numbers of heads
    v2:  KL of softmax(X X^T / sqrt(width / relation_heads)) for X = Q, K, V, whose heads are joined and split anew

Needs text and nothing else. Student and teacher need the same tokenizer; depth, width and (v2) heads are free. With
`init: random` and `num_layers`, `hidden_size` the student is a new, smaller model of the architecture of `model`, which
may be the teacher itself; with `init: layers` it is made of evenly spaced layers of `model`.

The student's head, and what lies behind the values of its last layer, get no gradient and stay as they are: fine-tune
it afterwards. For 24-layer teachers a middle-upper layer is better than the last (`teacher_layer: 20` for BERT-large).

The paper's teacher assistant, for students of half the depth and half the width, is two steps of a recipe: the teacher
teaches the assistant, the assistant the student.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.methods import Paper
from regraft.objectives.minilm import MiniLM
from regraft.resize.surgery import load
from regraft.train.making import Made, Work, maker
from regraft.train.objective import Sum
from regraft.train.start import FitOptions, fit, keeps_tensors, start
from regraft.train.teacher import Teacher, TeacherOptions, device_of
from regraft.train.vocabulary import same_tokens


class MinilmOptions(FitOptions, TeacherOptions):
    """Options of minilm."""

    learning_rate: float = Field(5e-4, gt=0, le=10, description="the highest learning rate of AdamW")
    relation: Literal["v1", "v2"] = Field("v2", description="queries with keys and values, or each with itself")
    relation_heads: int | None = Field(
        None, ge=1, description="heads of v2; the largest common divisor of the widths up to 48 if not given"
    )
    teacher_layer: int = Field(-1, description="the teacher's layer, from 0; negative from the last")


@maker(
    room="train",
    summary="a smaller student learns the attention relations of a teacher",
    options=MinilmOptions,
    roles={"teacher": True},
    same_tensors=keeps_tensors,
    papers=(
        Paper(
            title="MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
            authors="Wang et al.",
            venue="NeurIPS 2020",
            arxiv="2002.10957",
            number=78,
        ),
        Paper(
            title="MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
            authors="Wang et al.",
            venue="Findings of ACL 2021",
            arxiv="2012.15828",
        ),
    ),
)
def minilm(work: Work[MinilmOptions]) -> Made:
    """Raises RG201, RG203, RG204 and RG303 for models whose relations cannot be compared."""
    o = work.options
    begun = start(work, labels=False)
    same_tokens(work.models["model"], work.models["teacher"])
    teacher = Teacher(load(work.models["teacher"]).float(), device=device_of(o))
    term = MiniLM(o.relation, o.relation_heads, o.teacher_layer)
    made = fit(work, begun, Sum(begun.batches.collate, [(1.0, term)], teacher))
    made.warnings.append("the head, and the last layer behind its values, were not trained: fine-tune the student")
    return made
