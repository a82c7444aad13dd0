"""BitDelta as a merge, against signs and means in NumPy."""

from __future__ import annotations

import numpy as np
import torch

import regraft.merge as merge

GENERATOR = torch.Generator().manual_seed(81)
SHAPES = {"w": (23, 17), "bias": (90,), "conv": (3, 4, 5)}
BASE = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
MODELS = [{k: v + 0.05 * torch.randn(v.shape, generator=GENERATOR) for k, v in BASE.items()} for _ in range(3)]
MODELS[1]["w"][4:9] = BASE["w"][4:9]


def test_the_formula() -> None:
    weights = [1.0, 0.5, -2.0]
    found = merge.bitdelta(MODELS, base=BASE, weight=weights, **{"lambda": 0.7})
    for name, base in BASE.items():
        change = 0.0
        for weight, model in zip(weights, MODELS, strict=True):
            delta = model[name].double().numpy() - base.double().numpy()
            bits = np.where(delta > 0, 1, -1) * np.abs(delta).mean()
            change = change + weight * (delta if delta.ndim == 1 else bits)
        expected = base.double().numpy() + 0.7 * change
        np.testing.assert_allclose(found[name].double().numpy(), expected, rtol=0, atol=1e-6)


def test_the_scale_is_the_nearest_one() -> None:
    base, model = BASE["w"].double(), MODELS[0]["w"].double()
    step = merge.bitdelta([model], base=base) - base
    error = float((model - base - step).norm())
    assert all(float((model - base - f * step).norm()) > error for f in (0.99, 1.01))
    torch.testing.assert_close(step.abs(), (model - base).abs().mean().expand(23, 17), rtol=1e-9, atol=0)


def test_a_matrix_that_no_model_changed_stays_and_entries_of_others_do_not() -> None:
    assert torch.equal(merge.bitdelta([BASE["w"], BASE["w"]], base=BASE["w"]), BASE["w"])
    moved = merge.bitdelta([MODELS[1]["w"]], base=BASE["w"]) - BASE["w"]
    assert (moved[4:9] < 0).all()
