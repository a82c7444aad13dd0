"""Masked image modelling: what is hidden, what the loss is, and encoders that see whole images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

import regraft
from regraft.errors import UserError
from regraft.objectives.own_loss import OwnLoss
from regraft.train.batches import DataOptions, batches_for
from regraft.train.masked_images import guesses_patches, hiding, is_auto_encoder, showing_all, whole
from regraft.train.tap import LAST, look
from tiny import masked_images, pictures, save_masked, save_tiny, texts

FAMILIES = ("vit", "deit", "swin", "vit_mae")


def pixels(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([row["pixel_values"] for row in rows])


def collated(model: Any, ratio: float | None = None, scaled: bool | None = None, n: int = 3) -> dict[str, Any]:
    return hiding(model, pixels, ratio, scaled)(pictures(n), list(range(n)))


def patches(images: np.ndarray, size: int) -> np.ndarray:
    """(B, 1, H, W) -> (B, patches, size * size)."""
    b, _, height, width = images.shape
    cut = images[:, 0].reshape(b, height // size, size, width // size, size)
    return cut.transpose(0, 1, 3, 2, 4).reshape(b, -1, size * size)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_known_and_have_a_loss(family: str) -> None:
    whole_model = masked_images(family)
    assert guesses_patches(whole_model)
    assert is_auto_encoder(whole_model) == (family == "vit_mae")
    assert not guesses_patches(whole_model.base_model)
    OwnLoss().prepare(whole_model, None)
    batch = collated(whole_model)
    found = float(OwnLoss()(look(whole_model, batch), batch, None))
    assert np.isfinite(found)
    assert found > 0


@given(st.floats(0.07, 0.93), st.lists(st.integers(0, 10**9), min_size=1, max_size=4))
def test_what_is_hidden_is_a_function_of_ratio_and_seed(ratio: float, seeds: list[int]) -> None:
    rows = pictures(len(seeds))
    with_token, leaves_out = masked_images("vit"), masked_images("vit_mae")
    collate, other = (hiding(model, pixels, ratio, None) for model in (with_token, leaves_out))
    hidden = collate(rows, seeds)["bool_masked_pos"]
    assert hidden.shape == (len(seeds), 16)
    assert set(hidden.sum(1).tolist()) == {16 - int(16 * (1 - ratio))}
    alone = collate(rows[-1:], seeds[-1:])["bool_masked_pos"]
    assert torch.equal(alone[0], hidden[-1])
    # Both kinds of models hide the same patches.
    with torch.no_grad():
        mask = leaves_out(**other(rows, seeds)).mask
    assert torch.equal(mask.bool(), hidden)


def test_ratios_that_are_not_given() -> None:
    assert collated(masked_images("vit"))["bool_masked_pos"].sum(1).tolist() == [10, 10, 10]
    model = masked_images("vit_mae", mask_ratio=0.5)
    assert look(model, collated(model)).output.mask.sum(1).tolist() == [8, 8, 8]
    model = masked_images("vit_mae")
    assert look(model, collated(model, 0.25)).output.mask.sum(1).tolist() == [4, 4, 4]
    assert model.config.mask_ratio == 0.25


def test_the_loss_with_a_mask_token_is_the_mean_distance_of_hidden_pixels() -> None:
    model = masked_images("vit")
    batch = collated(model, 0.5)
    with torch.no_grad():
        output = model(**batch)
    difference = np.abs(patches(output.reconstruction.numpy(), 2) - patches(batch["pixel_values"].numpy(), 2))
    expected = difference[batch["bool_masked_pos"].numpy()].mean()
    assert float(output.loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_loss_of_an_auto_encoder_is_the_mean_square_of_hidden_patches(scaled: bool) -> None:
    model = masked_images("vit_mae", norm_pix_loss=not scaled)
    batch = collated(model, 0.75, scaled)
    with torch.no_grad():
        output = model(**batch)
    target = patches(batch["pixel_values"].numpy().astype(np.float64), 2)
    if scaled:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    squares = ((output.logits.numpy() - target) ** 2).mean(-1)
    kept = batch["noise"].numpy().argsort(1)[:, :4]
    hidden = np.ones((3, 16), bool)
    for row, places in zip(hidden, kept, strict=True):
        row[places] = False
    assert float(output.loss) == pytest.approx(squares[hidden].mean(), rel=1e-4)


def test_an_auto_encoder_that_is_shown_all_is_a_plain_vision_transformer(tmp_path: Path) -> None:
    """All tokens in their order, as a ViT with the same weights has them; and hiding goes on afterwards."""
    model = masked_images("vit_mae")
    model.save_pretrained(tmp_path / "mae")
    stored = model.config.to_dict()
    config = hf.ViTConfig(**{k: v for k, v in stored.items() if k not in ("model_type", "architectures")})
    plain = hf.ViTModel(config, add_pooling_layer=False).eval()
    plain.load_state_dict(model.vit.state_dict())
    images = pixels(pictures(3))
    with torch.no_grad():
        expected = plain(pixel_values=images).last_hidden_state
        with showing_all(model.base_model):
            found = look(model.base_model, whole(model, images), (LAST,))[LAST]
        assert found.shape == (3, 17, 32)
        assert torch.allclose(found, expected, atol=1e-5)
        assert model(pixel_values=images).mask.sum(1).tolist() == [12, 12, 12]
    assert torch.equal(whole(plain, images)["pixel_values"], images)


def test_batches_of_masked_images(tmp_path: Path) -> None:
    for family, key in (("vit", "bool_masked_pos"), ("vit_mae", "noise")):
        folder = save_masked(tmp_path / family, family)
        model = regraft.load(folder)
        found = batches_for(model, folder, pictures()[0], DataOptions(mask_ratio=0.5))
        assert (found.kind, found.has_loss) == ("masked images", True)
        assert found.collate(pictures(2), [0, 1]).keys() == {"pixel_values", key}
    plain = batches_for(regraft.load(tmp_path / "vit"), tmp_path / "vit", pictures()[0], labels=False)
    assert plain.collate(pictures(2), [0, 1]).keys() == {"pixel_values"}


def test_what_cannot_be_hidden_is_refused(tmp_path: Path) -> None:
    for model, ratio, scaled, words in (
        (masked_images("vit_mae"), 0.99, None, "mask_ratio of 0.99 hides 16 of 16 patches"),
        (masked_images("vit"), None, True, "guesses pixels as they are.*leave out norm_pix_loss"),
        (masked_images("vit", encoder_stride=4), None, None, "enlarges by 4, and its encoder makes 2 pixels one"),
        (masked_images("swin", encoder_stride=2), None, None, "enlarges by 2, and its encoder makes 4 pixels one"),
    ):
        with pytest.raises(UserError, match=words):
            hiding(model, pixels, ratio, scaled)
    bert = save_tiny(tmp_path / "bert", "bert")
    for options, name in ((DataOptions(mask_ratio=0.5), "mask_ratio"), (DataOptions(norm_pix_loss=True), "norm_pix")):
        with pytest.raises(UserError, match=f"guesses no patches.*leave out {name}"):
            batches_for(regraft.load(bert), bert, texts()[0], options)
