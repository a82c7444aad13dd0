"""General knowledge transfer: who teaches, and the loss, against the formula written again in NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import model
from regraft.errors import UserError
from regraft.objectives.transfer import Transfer, targets, transfer_loss, who_teaches
from regraft.train.classes import Source
from regraft.train.tap import look
from regraft.train.teacher import Teacher

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
LABELS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, -100, -100]])
MASK = (LABELS != -100).long()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(target: np.ndarray, student: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    p, q = softmax(target / temperature), softmax(student / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)


@given(st.integers(0, 50), st.floats(0.5, 4))
def test_one_teacher(seed: int, temperature: float) -> None:
    s, t, former = (normal(7, 5, seed=3 * seed + i) for i in range(3))
    labels = torch.arange(7) % 5
    p_t, p_f = softmax(t.numpy()), softmax(former.numpy())
    rows = np.arange(7)
    masks = {
        "supervised": p_t[rows, labels] > p_f[rows, labels],
        "confidence": p_t.max(-1) > p_f.max(-1),
        "none": np.ones(7, bool),
        "self": np.zeros(7, bool),
    }
    for partition, mask in masks.items():
        source = who_teaches(former, [t], partition, labels)  # type: ignore[arg-type]
        assert source.tolist() == mask.astype(int).tolist()
        target = np.where(mask[:, None], t.numpy(), former.numpy())
        assert np.array_equal(targets(former, [t], source).numpy(), target)
        found = transfer_loss(s, targets(former, [t], source), temperature)
        assert np.allclose(found.numpy(), kl(target, s.numpy(), temperature), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 50))
def test_several_teachers_at_once(seed: int) -> None:
    models = [normal(9, 4, seed=4 * seed + i) for i in range(4)]
    labels = torch.arange(9) % 4
    p = np.stack([softmax(one.numpy()) for one in models])
    for partition, sure in (("supervised", p[:, np.arange(9), labels]), ("confidence", p.max(-1))):
        source = who_teaches(models[0], models[1:], partition, labels)  # type: ignore[arg-type]
        assert source.tolist() == sure.argmax(0).tolist()
        found = targets(models[0], models[1:], source)
        assert torch.equal(found, torch.stack(models)[source, torch.arange(9)])


def test_ties_go_to_the_former_self_and_then_to_the_first() -> None:
    same = normal(6, 3)
    for partition in ("supervised", "confidence"):
        labels = torch.zeros(6, dtype=torch.long)
        assert not who_teaches(same, [same, same], partition, labels).any()  # type: ignore[arg-type]
        assert set(who_teaches(same * 0, [same, same], "confidence").tolist()) == {1}


class Fixed(torch.nn.Module):
    """A model that says what it was given, with a configuration, as far as an objective looks at it."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.said = torch.nn.Parameter(logits)
        self.config = SimpleNamespace()

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.said[pixel_values[:, 0].long()])


def source(logits: torch.Tensor, order: torch.Tensor | None = None) -> Source:
    return Source(Teacher(Fixed(logits)), collate, order)


def collate(examples: Any, seeds: Any) -> dict[str, Any]:
    numbers = torch.tensor([[float(e["n"])] for e in examples])
    return {"pixel_values": numbers, "labels": torch.tensor([e["n"] % 5 for e in examples])}


EXAMPLES = [{"n": n} for n in range(8)]
S, T, FORMER = (normal(8, 5, seed=i).float() for i in (10, 11, 12))
NUMBERS = np.arange(8) % 5


def loss_of(**options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    former = None if options.get("partition") == "none" else source(FORMER)
    objective = Transfer(collate, former, [source(T)], **options)
    student = Fixed(S.clone())
    loss, metrics = objective.loss(student, objective.collate(EXAMPLES, [0] * 8))
    loss.backward()
    assert student.said.grad is not None
    return float(loss), metrics


def test_the_whole_loss() -> None:
    s, t, former = S.numpy(), T.numpy(), FORMER.numpy()
    mask = softmax(t)[np.arange(8), NUMBERS] > softmax(former)[np.arange(8), NUMBERS]
    divergence = kl(np.where(mask[:, None], t, former), s, 2.0).mean()
    loss, metrics = loss_of(temperature=2.0)
    assert loss == pytest.approx(divergence, rel=1e-5)
    assert float(metrics["taught"]) == pytest.approx(mask.mean())
    plain = kl(t, s).mean()
    entropy = -np.log(softmax(s)[np.arange(8), NUMBERS]).mean()
    twice = -np.log(softmax(softmax(s))[np.arange(8), NUMBERS]).mean()
    assert loss_of(partition="none")[0] == pytest.approx(plain, rel=1e-5)
    assert loss_of(partition="none", alpha=0.5)[0] == pytest.approx((plain + entropy) / 2, rel=1e-5)
    found = loss_of(partition="none", alpha=0.25, double_softmax=True)[0]
    assert found == pytest.approx(0.25 * plain + 0.75 * twice, rel=1e-5)
    assert loss_of(partition="self")[0] == pytest.approx(kl(former, s).mean(), rel=1e-5)


def test_negative_flips_teach_nothing() -> None:
    s, t = S.numpy(), T.numpy()
    lost = (s.argmax(-1) == NUMBERS) & (t.argmax(-1) != NUMBERS)
    assert 0 < lost.sum() < 8
    found, _ = loss_of(partition="none", skip_negative_flips=True)
    assert found == pytest.approx(kl(t, s)[~lost].mean(), rel=1e-5)


def test_a_batch_of_negative_flips_alone_has_no_divergence() -> None:
    right = torch.eye(5)[NUMBERS] * 9
    objective = Transfer(collate, None, [source(-right)], partition="none", skip_negative_flips=True)
    loss, _ = objective.loss(Fixed(right.clone()), objective.collate(EXAMPLES, [0] * 8))
    assert float(loss) == 0.0


def test_the_likeliest_classes_only() -> None:
    top = np.argsort(-T.numpy(), -1)[:, :3]
    s, t, former = (np.take_along_axis(x.numpy(), top, -1) for x in (S, T, FORMER))
    assert loss_of(partition="none", top_k=3)[0] == pytest.approx(kl(t, s).mean(), rel=1e-5)
    sure = softmax(T.numpy()).max(-1) > softmax(FORMER.numpy()).max(-1)
    target = np.where(sure[:, None], t, former)
    assert loss_of(partition="confidence", top_k=3)[0] == pytest.approx(kl(target, s).mean(), rel=1e-5)
    assert loss_of(partition="none", top_k=50)[0] == pytest.approx(loss_of(partition="none")[0], rel=1e-6)


def test_classes_in_another_order() -> None:
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = torch.empty_like(T)
    shuffled[:, order] = T
    objective = Transfer(collate, None, [source(shuffled, order)], partition="none")
    found, _ = objective.loss(Fixed(S.clone()), objective.collate(EXAMPLES, [0] * 8))
    assert float(found) == pytest.approx(kl(T.numpy(), S.numpy()).mean(), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_tokens_that_have_a_label(family: str) -> None:
    models = [model(family, seed=i).eval() for i in range(3)]
    student, teacher, former = models
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    logits = [look(one, {"input_ids": IDS, "attention_mask": MASK}).logits.detach().numpy() for one in models]
    if family == "gpt2":  # what a position says is about the next one
        kept, labels = [one[:, :-1][MASK[:, 1:].bool()] for one in logits], LABELS[:, 1:][MASK[:, 1:].bool()].numpy()
    else:
        kept, labels = [one[MASK.bool()] for one in logits], LABELS[MASK.bool()].numpy()
    rows = np.arange(len(labels))
    mask = softmax(kept[1])[rows, labels] > softmax(kept[2])[rows, labels]
    expected = kl(np.where(mask[:, None], kept[1], kept[2]), kept[0]).mean()

    def whole(examples: Any, seeds: Any) -> dict[str, Any]:
        return dict(batch)

    sources = [Source(Teacher(one), whole, shares=True) for one in (former, teacher)]
    objective = Transfer(whole, sources[0], sources[1:])
    loss, metrics = objective.loss(student, objective.collate([{}], [0]))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["taught"]) == pytest.approx(mask.mean())


def test_batch_norms_may_keep_their_statistics() -> None:
    class Normed(Fixed):
        def __init__(self) -> None:
            super().__init__(S.clone())
            self.norm = torch.nn.BatchNorm1d(5)

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return SimpleNamespace(logits=self.norm(super().forward(pixel_values).logits))

    for freeze in (True, False):
        student = Normed().train()
        objective = Transfer(collate, None, [source(T)], partition="none", freeze_batch_norm=freeze)
        objective.loss(student, objective.collate(EXAMPLES, [0] * 8))
        assert torch.equal(student.norm.running_mean, torch.zeros(5)) is freeze


def test_several_teachers_need_a_choice() -> None:
    for options in ({"partition": "none"}, {"partition": "supervised", "top_k": 3}):
        with pytest.raises(UserError, match="without a choice between them") as caught:
            Transfer(collate, source(FORMER), [source(T), source(S)], **options)  # type: ignore[arg-type]
        assert caught.value.code == "RG309"


def test_tokens_without_labels_are_refused() -> None:
    student = model("gpt2")

    def whole(examples: Any, seeds: Any) -> dict[str, Any]:
        return {"input_ids": IDS, "attention_mask": MASK}

    objective = Transfer(whole, None, [Source(Teacher(model("gpt2", 1)), whole, shares=True)], partition="none")
    with pytest.raises(UserError, match="no labels of tokens"):
        objective.loss(student, objective.collate([{}], [0]))
