"""The distance of representations against the same formula written again in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import model
from regraft.errors import UserError
from regraft.objectives.self_distil import WHOLE, SelfDistillation, representation_loss
from regraft.train.masked_images import whole
from regraft.train.tap import look
from regraft.train.teacher import Teacher
from tiny import masked_images

LENGTHS = (5, 3)
MASK = torch.tensor([[i < length for i in range(5)] for length in LENGTHS])
IDS = torch.arange(10).reshape(2, 5) + 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(student: np.ndarray, teacher: np.ndarray, target: str, reduction: str, lengths: tuple[int, ...]) -> float:
    """Example by example, padding cut off."""
    examples = []
    for s, t, length in zip(student, teacher, lengths, strict=True):
        s, t = s[:length], t[:length]
        if target == "cls":
            pairs = [(s[0], t[0])]
        elif target == "mean":
            pairs = [(s.mean(0), t.mean(0))]
        else:
            pairs = list(zip(s, t, strict=True))
        squares = [((a - b) ** 2).sum() / (len(a) if reduction == "mean" else 1) for a, b in pairs]
        examples.append(np.mean(squares))
    return float(np.mean(examples))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("target", ["cls", "mean", "tokens"])
@given(seed=st.integers(0, 1000))
def test_the_loss(target: Any, reduction: Any, seed: int) -> None:
    s, t = normal(2, 5, 6, seed=seed), normal(2, 5, 6, seed=seed + 1)
    for mask, lengths in ((MASK, LENGTHS), (None, (5, 5))):
        found = float(representation_loss(s, t, target, reduction, mask))
        assert found == pytest.approx(by_hand(s.numpy(), t.numpy(), target, reduction, lengths), rel=1e-5)
    assert float(representation_loss(s, s, target, reduction, MASK)) == 0
    noise = torch.where(MASK[..., None], 0.0, 50.0)
    padded = float(representation_loss(s + noise, t - noise, target, reduction, MASK))
    assert padded == pytest.approx(float(representation_loss(s, t, target, reduction, MASK)), rel=1e-6)


def test_half_precision_does_not_overflow() -> None:
    s, t = torch.full((1, 1, 768), 200.0).half(), torch.full((1, 1, 768), -200.0).half()
    assert float(representation_loss(s, t)) == pytest.approx(768 * 400.0**2)


@pytest.mark.parametrize("target", ["cls", "mean", "tokens"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "vit_mae", "swin"])
def test_the_term_on_real_models_sees_whole_inputs(family: str, target: Any) -> None:
    """What the models' own classes give for unmasked inputs, whatever is masked in the batch."""
    texts = family in ("bert", "gpt2")
    student, teacher = (model(family, seed=i) if texts else masked_images(family, i) for i in (0, 1))
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any]
    if texts:
        inputs = {"input_ids": IDS, "attention_mask": MASK.long()}
        batch = {**inputs, "input_ids": IDS.masked_fill(IDS % 2 > 0, 3), WHOLE: inputs}
    else:
        inputs = whole(student, images)
        hidden = {"noise": torch.rand(2, 16)} if family == "vit_mae" else {"bool_masked_pos": torch.rand(2, 16) < 0.5}
        batch = {"pixel_values": images, **hidden, WHOLE: inputs}
    term = SelfDistillation(Teacher(teacher.base_model), target)
    term.prepare(student, None)
    loss = term(look(student, batch), batch, None)
    states = []
    for one in (student, teacher):
        if family == "vit_mae":
            one.config.mask_ratio = 0.0
        with torch.no_grad():
            states.append(one.base_model.eval()(**inputs).last_hidden_state.numpy())
    lengths = LENGTHS if texts else (states[0].shape[1],) * 2
    assert float(loss.detach()) == pytest.approx(by_hand(states[0], states[1], target, "sum", lengths), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in teacher.base_model.parameters())
    heads = [n for n, p in student.named_parameters() if p.grad is not None and not _within(student, n)]
    assert heads == []


def _within(whole_model: Any, name: str) -> bool:
    return name.startswith(whole_model.base_model_prefix + ".")


def test_equal_models_cost_nothing() -> None:
    for family in ("vit", "vit_mae"):
        student, teacher = masked_images(family), masked_images(family)
        images = torch.rand(2, 1, 8, 8)
        batch = {"pixel_values": images, WHOLE: whole(student, images)}
        term = SelfDistillation(Teacher(teacher.base_model), "tokens")
        assert float(term(look(student, batch), batch, None)) == 0


def test_teachers_of_another_shape_are_refused() -> None:
    bert = model("bert")
    for teacher, words in (
        (model("bert", num_hidden_layers=3), "only one of student and teacher has encoder.layer.2"),
        (model("bert", intermediate_size=48), r"\[64, 32\] in the student and \[48, 32\] in the teacher"),
    ):
        with pytest.raises(UserError, match=words):
            SelfDistillation(Teacher(teacher.base_model)).prepare(bert, None)
    pair = model("clip")
    with pytest.raises(UserError, match="a CLIPModel gives no hidden states"):
        look(
            pair,
            {"input_ids": IDS[:, :4], "pixel_values": torch.rand(2, 3, 8, 8)},
            SelfDistillation(Teacher(model("bert").base_model)).teacher.signals,
        )
