"""Alignment with descriptions against the same formulas written again in NumPy, and what the projector is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import regraft
from described import save_classifier
from models import model
from regraft.errors import UserError
from regraft.objectives.descriptions import (
    EMBEDDINGS,
    NUMBERS,
    Descriptions,
    alignment_loss,
    projector,
    with_descriptions,
)
from regraft.train import heads
from regraft.train.tap import Seen, Signal, look

FEATURES = Signal("features")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def units(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def by_hand(images: Any, texts: Any, kind: str, temperature: float, same: Any = None, left_out: Any = None) -> float:
    """The loss, entry by entry."""
    v = images / np.linalg.norm(images, axis=1, keepdims=True)
    n = len(v)
    if kind == "byol":
        return float(np.mean([2 - 2 * v[i] @ texts[i] for i in range(n)]))
    same = np.eye(n, dtype=bool) if same is None else same
    left_out = np.zeros((n, n), dtype=bool) if left_out is None else left_out

    def one_way(scores: Any, belongs: Any, out: Any) -> float:
        losses = []
        for i in range(n):
            counted = [j for j in range(n) if belongs[i, j] or not out[i, j]]
            total = sum(np.exp(scores[i, j]) for j in counted)
            own = [j for j in range(n) if belongs[i, j]]
            losses.append(-np.mean([np.log(np.exp(scores[i, j]) / total) for j in own]))
        return float(np.mean(losses))

    scores = v @ texts.T / temperature
    loss = one_way(scores, same, left_out)
    return (loss + one_way(scores.T, same.T, left_out.T)) / 2 if kind == "clip" else loss


@given(st.integers(0, 1000), st.sampled_from(["clip", "ctr", "byol"]), st.floats(0.05, 2), st.integers(2, 7))
def test_the_loss_is_that_of_the_formula(seed: int, kind: Any, temperature: float, n: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(n, 5, generator=draws), units(torch.randn(n, 5, generator=draws))
    numbers, classes = torch.randint(0, n, (2, n), generator=draws)
    same, left_out = numbers[:, None] == numbers, classes[:, None] == classes
    for extra in ({}, {"same": same}, {"left_out": left_out}, {"same": same, "left_out": left_out}):
        found = alignment_loss(images, texts, kind, temperature, **extra)
        asked = {name: value.numpy() for name, value in extra.items()}
        expected = by_hand(images.double().numpy(), texts.double().numpy(), kind, temperature, **asked)
        assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_descriptions_that_fit_cost_nothing_and_a_single_pair_has_nothing_to_learn() -> None:
    texts = torch.eye(4)
    assert float(alignment_loss(3 * texts, texts, "clip", 0.01)) == pytest.approx(0.0, abs=1e-6)
    assert float(alignment_loss(3 * texts, texts, "byol")) == pytest.approx(0.0, abs=1e-6)
    assert float(alignment_loss(normal(1, 4), texts[:1], "clip", 0.2)) == 0.0
    assert float(alignment_loss(texts, texts.flip(0), "clip", 0.01)) > 50


def test_everything_of_one_class_leaves_no_negatives() -> None:
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert float(alignment_loss(normal(3, 4), units(normal(3, 4, seed=1)), left_out=everything)) == 0.0


def test_the_projector_is_that_of_the_published_code() -> None:
    convolutional, transformer, linear = (
        projector(64, 24),
        projector(64, 24, batch_norm=False),
        projector(64, 24, "linear", batch_norm=False),
    )
    assert [type(m) for m in convolutional] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]  # type: ignore[union-attr]
    assert [type(m) for m in transformer] == [nn.Linear, nn.ReLU, nn.Linear]  # type: ignore[union-attr]
    assert convolutional[0].bias is None  # type: ignore[index]
    assert transformer[0].bias is not None  # type: ignore[index]
    assert convolutional[0].weight.shape == (48, 64)  # type: ignore[index]
    assert linear.weight.shape == (24, 64)
    assert linear.bias is None
    assert float(convolutional[3].weight.detach().std()) == pytest.approx(1024**-0.5, rel=0.1)  # type: ignore[index]
    assert float(transformer[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1)  # type: ignore[index]
    again, other = projector(64, 24, "linear", batch_norm=False), projector(64, 24, "linear", seed=1)
    assert torch.equal(linear.weight, again.weight)
    assert not torch.equal(linear.weight, other.weight)


@pytest.mark.parametrize("family", ["vit", "resnet", "swin", "deit"])
def test_features_are_what_goes_into_the_classifier(family: str, tmp_path: Path) -> None:
    whole = regraft.load(save_classifier(tmp_path / family, family))
    seen = look(whole, {"pixel_values": torch.rand(3, 1, 8, 8)}, [FEATURES])
    assert torch.allclose(whole.classifier(seen[FEATURES]), seen.logits)
    assert not whole.classifier._forward_pre_hooks


@pytest.mark.parametrize(
    ("family", "temperature", "named"), [("vit", 0.05, "mlp"), ("resnet", 0.2, "mlp with batch norm")]
)
def test_defaults_follow_the_kind_of_model(family: str, temperature: float, named: str, tmp_path: Path) -> None:
    whole = regraft.load(save_classifier(tmp_path / family, family)).train()
    term = Descriptions(12)
    term.prepare(whole, None)
    assert term.used == {"temperature": temperature, "projector": named}
    texts, numbers = units(normal(4, 12)), torch.arange(4)
    batch: dict[str, Any] = {"pixel_values": torch.rand(4, 1, 8, 8), EMBEDDINGS: texts, NUMBERS: numbers}
    seen = look(whole, batch, term.signals(whole))
    loss = term(seen, batch, None)
    with torch.no_grad():
        projected = heads.attached(whole, "descriptions").eval()  # type: ignore[attr-defined]
        features = seen[FEATURES].flatten(1)
        if family == "vit":
            expected = by_hand(projected(features).double().numpy(), texts.double().numpy(), "clip", temperature)
            assert float(loss) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in heads.attached(whole, "descriptions").parameters())
    assert next(whole.base_model.parameters()).grad is not None


def seen_of(features: torch.Tensor) -> Seen:
    """A pass whose features go through unchanged."""
    whole = model("vit")
    heads.attach(whole, "descriptions", nn.Identity())
    return Seen(whole, None, {FEATURES: features})


def test_images_without_description_are_left_out() -> None:
    features, texts = normal(5, 6), units(normal(5, 6, seed=1))
    numbers = torch.tensor([3, -1, 4, -1, 5])
    term = Descriptions(6)
    term.used = {"temperature": 0.1}
    there = [0, 2, 4]
    found = term(seen_of(features), {EMBEDDINGS: texts, NUMBERS: numbers}, None)
    expected = by_hand(features[there].double().numpy(), texts[there].double().numpy(), "clip", 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    features.requires_grad_()
    nothing = term(seen_of(features), {EMBEDDINGS: texts, NUMBERS: torch.full((5,), -1)}, None)
    nothing.backward()
    assert float(nothing) == 0.0
    assert not features.grad.any()  # type: ignore[union-attr]


def test_equal_descriptions_and_equal_classes() -> None:
    features, texts = normal(4, 6), units(normal(4, 6, seed=1))
    texts[2] = texts[0]
    batch = {EMBEDDINGS: texts, NUMBERS: torch.tensor([7, 8, 7, 9]), "labels": torch.tensor([0, 1, 1, 1])}
    same = batch[NUMBERS][:, None] == batch[NUMBERS]
    classes = batch["labels"][:, None] == batch["labels"]
    arrays = features.double().numpy(), texts.double().numpy(), "clip", 0.5
    for options, expected in (
        ({}, by_hand(*arrays, same=same.numpy())),
        ({"identical": "negatives"}, by_hand(*arrays)),
        ({"mask_same_class": True}, by_hand(*arrays, same=same.numpy(), left_out=classes.numpy())),
    ):
        term = Descriptions(6, **options)  # type: ignore[arg-type]
        term.used = {"temperature": 0.5}
        assert float(term(seen_of(features), batch, None)) == pytest.approx(expected, rel=1e-4)


def test_models_without_a_linear_classifier_of_one_vector_are_refused() -> None:
    with pytest.raises(UserError, match="has no linear classifier"):
        Descriptions(4).prepare(hf.ViTModel(model("vit").config), None)
    with pytest.raises(UserError, match="has no linear classifier"):
        Descriptions(4).prepare(model("vit", num_labels=0), None)
    with pytest.raises(UserError, match="has no head whose input could be looked at"):
        look(hf.ViTModel(model("vit").config), {"pixel_values": torch.rand(1, 1, 8, 8)}, [FEATURES])
    with pytest.raises(UserError, match=r"features of shape \(5, 6\), not at one vector"):
        Descriptions(4)(seen_of(normal(2, 5, 6)), {}, None)


def test_with_descriptions_asks_for_the_column() -> None:
    def embeddings(texts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert texts == ["a", None]
        return torch.ones(2, 3), torch.tensor([5, -1])

    collate = with_descriptions(lambda examples, seeds: {"n": len(examples)}, embeddings, "said")  # type: ignore[arg-type]
    batch = collate([{"said": "a"}, {"text": "b"}], [0, 1])
    assert batch["n"] == 2
    assert batch[NUMBERS].tolist() == [5, -1]
