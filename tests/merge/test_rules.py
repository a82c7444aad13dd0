"""Each rule against an independent computation in NumPy, written here from the paper or from mergekit's definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import regraft.merge as merge
from regraft.errors import UserError
from regraft.merge.random import bits, keep_mask

SHAPE = (37, 41)
N = 37 * 41


@pytest.fixture(scope="module")
def tensors() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    base = torch.randn(SHAPE, generator=generator)
    models = [base + 0.05 * torch.randn(SHAPE, generator=generator) ** 3 for _ in range(3)]
    models[1][:5] = base[:5]  # untouched rows, as embeddings have
    return base, models


def double(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [t.double().numpy() for t in tensors]


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-5, atol=2e-6)


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    threshold = np.sort(np.abs(delta).ravel())[::-1][max(1, math.floor(density * delta.size)) - 1]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def consensus(deltas: list[np.ndarray], weights: list[float], normalize: bool) -> np.ndarray:
    weighted = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    merged = (weighted * agree).sum(0)
    if normalize:
        divisor = (agree * np.asarray(weights)[:, None, None]).sum(0)
        merged = merged / np.where(divisor == 0, 1, divisor)
    return merged


def test_linear(tensors) -> None:
    _, models = tensors
    a, b, c = double(*models)
    close(merge.linear(models), (a + b + c) / 3)
    close(merge.linear(models, weight=[1, 2, 0.5]), (a + 2 * b + 0.5 * c) / 3.5)
    close(merge.linear(models, weight=[0.7, -0.2, 0.1], normalize=False), 0.7 * a - 0.2 * b + 0.1 * c)
    assert torch.equal(merge.linear(models, weight=[0, 3, 0]), models[1])


def test_slerp_on_the_arc() -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(SHAPE, generator=generator), 3 * torch.randn(SHAPE, generator=generator)
    a, b = double(x, y)
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    for t in (0.1, 0.5, 0.8):
        expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        close(merge.slerp([x, y], t=t), expected)
    assert torch.equal(merge.slerp([x, y], t=0), x)
    assert torch.equal(merge.slerp([x, y], t=1), y)


def test_slerp_is_linear_between_close_siblings() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SHAPE, generator=generator)
    y = x + 0.01 * torch.randn(SHAPE, generator=generator)
    a, b = double(x, y)
    np.testing.assert_allclose(merge.slerp([x, y], t=0.3).double().numpy(), 0.7 * a + 0.3 * b, rtol=1e-6, atol=1e-7)
    with pytest.warns(UserWarning, match="cancel out"):
        merge.slerp([x, -x], t=0.5)


def test_task_arithmetic(tensors) -> None:
    base, models = tensors
    t0, a, b, c = double(base, *models)
    close(merge.task_arithmetic(models, base=base), t0 + (a - t0) + (b - t0) + (c - t0))
    found = merge.task_arithmetic(models, base=base, weight=[0.5, -1, 2], **{"lambda": 0.3})
    close(found, t0 + 0.3 * (0.5 * (a - t0) - (b - t0) + 2 * (c - t0)))
    found = merge.task_arithmetic(models, base=base, weight=[1, 1, 2], normalize=True)
    close(found, t0 + ((a - t0) + (b - t0) + 2 * (c - t0)) / 4)
    assert torch.equal(merge.task_arithmetic(models[:1], base=base), models[0])


def test_ties_trims_over_the_whole_model(tensors) -> None:
    base, models = tensors
    other = torch.linspace(-1, 1, 300)
    changes = [0.3 * torch.randn(300, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    dicts = [{"w": m, "v": other + d} for m, d in zip(models, changes, strict=True)]
    found = merge.ties(dicts, base={"w": base, "v": other}, density=0.2, **{"lambda": 1.3})
    flat = [
        np.concatenate([(m - base).double().numpy().ravel(), d.double().numpy()])
        for m, d in zip(models, changes, strict=True)
    ]
    sparse = [trimmed(f, 0.2)[:, None] for f in flat]
    merged = consensus(sparse, [1, 1, 1], True).ravel()
    t0 = np.concatenate([base.double().numpy().ravel(), other.double().numpy()])
    result = np.concatenate([found["w"].double().numpy().ravel(), found["v"].double().numpy()])
    np.testing.assert_allclose(result, t0 + 1.3 * merged, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_as_mergekit_defines_it(tensors, normalize: bool) -> None:
    base, models = tensors
    t0, *rest = double(base, *models)
    weights, density = [0.5, 1.0, -0.3], [0.5, 0.3, 1.0]
    sparse = [trimmed(m - t0, d) for m, d in zip(rest, density, strict=True)]
    expected = t0 + 0.8 * consensus(sparse, weights, normalize)
    options = {"weight": weights, "density": density, "lambda": 0.8, "normalize": normalize, "trim_scope": "tensor"}
    close(merge.ties(models, base=base, **options), expected)


@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare(tensors, rule: str, rescale: str) -> None:
    base, models = tensors
    t0, *rest = double(base, *models)
    density, weights = [0.5, 0.9, 0.2], [1.0, 0.5, 2.0]
    sparse = []
    for i, (model, d) in enumerate(zip(rest, density, strict=True)):
        keep = keep_mask(bits(9, i, "tensor", 0, N), d).numpy().reshape(SHAPE)
        delta = model - t0
        kept = delta * keep
        factor = {"density": 1 / d, "l1": np.abs(delta).sum() / np.abs(kept).sum(), "none": 1.0}[rescale]
        sparse.append(kept * factor)
    expected = (
        consensus(sparse, weights, False)
        if rule == "dare_ties"
        else sum(w * s for w, s in zip(weights, sparse, strict=True))
    )
    found = getattr(merge, rule)(models, base=base, density=density, weight=weights, rescale=rescale, seed=9)
    close(found, t0 + expected)


def test_dare_keeps_the_expectation() -> None:
    base, delta = torch.zeros(1_000_000), torch.full((1_000_000,), 0.01)
    found = merge.dare_linear([base + delta], base=base, density=0.1, seed=3)
    kept = found != 0
    assert abs(kept.double().mean().item() - 0.1) < 5 * (0.1 * 0.9 / 1e6) ** 0.5
    assert torch.allclose(found[kept], torch.tensor(0.1))
    assert abs(found.double().mean().item() - 0.01) < 5 * 0.1 * (0.1 * 0.9 / 1e6) ** 0.5
    other = merge.dare_linear([base + delta], base=base, density=0.1, seed=4)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("rescale", ["probability", "l1", "none"])
@pytest.mark.parametrize("rule", ["della", "della_linear"])
def test_della(tensors, rule: str, rescale: str) -> None:
    base, models = tensors
    t0 = base.double().numpy()
    density, epsilon, weights = [0.5, 1.0, 0.3], [0.15, 0.2, 0.25], [1.0, 0.5, 2.0]
    sparse = []
    for i, (model, d, e) in enumerate(zip(models, density, epsilon, strict=True)):
        delta = (model - base).double().numpy()
        order = np.argsort(np.abs(delta), axis=1, kind="stable")
        rank = np.argsort(order, axis=1)
        chance = d - e + 2 * e * rank / (SHAPE[1] - 1) if d < 1 else np.ones(SHAPE)
        draws = bits(9, i, "tensor", 0, N).double().numpy().reshape(SHAPE) + 2**31
        kept = delta * (draws < chance * 2**32)
        factor = {"probability": 1 / chance, "l1": np.abs(delta).sum() / np.abs(kept).sum(), "none": 1.0}[rescale]
        sparse.append(kept * factor)
    expected = (
        consensus(sparse, weights, False)
        if rule == "della"
        else sum(w * s for w, s in zip(weights, sparse, strict=True))
    )
    options = {"density": density, "epsilon": epsilon, "weight": weights, "rescale": rescale, "seed": 9}
    found = getattr(merge, rule)(models, base=base, normalize=False, **options)
    close(found, t0 + expected)


def test_della_keeps_the_expectation_and_more_of_what_is_large() -> None:
    base, delta = torch.zeros(400, 1000), torch.linspace(0.001, 1.0, 1000).repeat(400, 1)
    found = merge.della_linear([base + delta], base=base, density=0.4, epsilon=0.2, seed=3)
    kept = (found != 0).double()
    for column, chance in ((0, 0.2), (499, 0.4), (999, 0.6)):
        near = kept[:, max(column - 20, 0) : column + 20].mean().item()
        assert abs(near - chance) < 0.03
    assert abs(found.double().mean().item() / delta.double().mean().item() - 1) < 0.01


def test_della_without_spread_is_dare() -> None:
    base, delta = torch.zeros(7, 333), torch.randn(7, 333, generator=torch.Generator().manual_seed(1))
    options = {"density": 0.3, "seed": 5, "rescale": "none"}
    assert torch.equal(
        merge.della_linear([delta], base=base, epsilon=0.0, **options), merge.dare_linear([delta], base=base, **options)
    )


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1)])
def test_della_refuses_probabilities_outside_the_unit_interval(density: float, epsilon: float) -> None:
    with pytest.raises(UserError, match=r"outside \(0, 1\)"):
        merge.della([torch.ones(3)], base=torch.zeros(3), density=density, epsilon=epsilon)


def crumbs(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    top = int(gamma * N)
    bottom = N - int(density * N) - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    order = np.argsort(np.abs(delta), axis=None, kind="stable")
    keep = np.zeros(N, bool)
    keep[order[bottom : N - top]] = True
    return delta * keep.reshape(SHAPE)


def test_breadcrumbs(tensors) -> None:
    base, models = tensors
    t0, *rest = double(base, *models)
    densities, gammas = (0.9, 0.5, 1.0), (0.01, 0.2, 0.05)
    sparse = [crumbs(m - t0, d, g) for m, d, g in zip(rest, densities, gammas, strict=True)]
    close(merge.breadcrumbs(models, base=base, density=densities, gamma=gammas), t0 + sum(sparse))


@pytest.mark.parametrize("normalize", [True, False])
def test_breadcrumbs_ties(tensors, normalize: bool) -> None:
    base, models = tensors
    t0, *rest = double(base, *models)
    densities, gammas, weights = (0.9, 0.5, 1.0), (0.01, 0.2, 0.05), [0.5, 1.0, -0.3]
    sparse = [crumbs(m - t0, d, g) for m, d, g in zip(rest, densities, gammas, strict=True)]
    options = {"density": densities, "gamma": gammas, "weight": weights, "normalize": normalize, "lambda": 0.7}
    found = merge.breadcrumbs_ties(models, base=base, **options)
    close(found, t0 + 0.7 * consensus(sparse, weights, normalize))


def test_breadcrumbs_ties_without_masks_is_ties_without_a_trim(tensors) -> None:
    base, models = tensors
    found = merge.breadcrumbs_ties(models, base=base, density=1.0, normalize=True)
    assert torch.equal(found, merge.ties(models, base=base, density=1.0))


@pytest.mark.filterwarnings("ignore:the models point away")
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(tensors, filter_wise: bool) -> None:
    base, models = tensors
    t0, *rest = double(base, *models)
    axis = -1 if filter_wise else None
    deltas = [m - t0 for m in rest]
    cosines = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        norms = np.linalg.norm(deltas[i], axis=axis) * np.linalg.norm(deltas[j], axis=axis)
        cosines.append(np.clip((deltas[i] * deltas[j]).sum(axis) / np.maximum(norms, 1e-6), -1, 1))
    cosine = np.mean(cosines, 0)
    t = 3 * cosine / (1 + 2 * cosine)
    t = t[:, None] if filter_wise else t
    close(merge.model_stock(models, base=base, filter_wise=filter_wise), t * sum(rest) / 3 + (1 - t) * t0)


@pytest.mark.parametrize("topk", [1.0, 0.3])
def test_sce(tensors, topk: float) -> None:
    base, models = tensors
    t0, *rest = double(base, *models)
    deltas = np.stack([m - t0 for m in rest])
    if topk < 1:
        variance = deltas.var(0)
        k = int(np.count_nonzero(variance) * topk)
        deltas = deltas * (variance >= np.sort(variance.ravel())[::-1][k - 1])
    weights = (deltas**2).mean((1, 2))
    weights /= weights.sum()
    agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    share = agree * weights[:, None, None]
    expected = t0 + (deltas * share).sum(0) / np.maximum(share.sum(0), 1e-6)
    close(merge.sce(models, base=base, select_topk=topk), expected)


def test_sce_counts_in_float32() -> None:
    """7 of 36: 1980 * (7 / 36) is 384.99999999999994 in float64, of which mergekit makes 385 entries."""
    base = torch.zeros(1980, dtype=torch.float64)
    share = 2 / 3 * (0.5 / 3) + 1 / 3 * 0.25
    assert int(1980 * share) == 384
    models = [torch.arange(1.0, 1981, dtype=torch.float64), -base]
    assert int((merge.sce(models, base=base, select_topk=share) != 0).sum()) == 385


@pytest.mark.parametrize("inter", ["sum", "normsum", "pairwise"])
def test_pcb_as_the_official_code_computes_it(tensors, inter: str) -> None:
    base, models = tensors
    t0, *rest = double(base, *models)
    ratio, clip, lambdas = 0.15, 0.01, [1.0, 0.8, 1.3]
    deltas = [(m - t0).ravel() for m in rest]

    def minmax(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    sizes = []
    for delta in deltas:
        ordered = np.sort(np.abs(delta))
        sizes.append(np.clip(np.abs(delta), ordered[int(N * clip)], ordered[int(N * (1 - clip) - 1)]))
    signed = [np.sign(d) * minmax(a) for d, a in zip(deltas, sizes, strict=True)]
    weights = []
    for delta, size, own in zip(deltas, sizes, signed, strict=True):
        agreement = {
            "sum": np.tanh(delta * sum(deltas)),
            "normsum": np.tanh(delta * sum(signed)),
            "pairwise": sum(np.tanh(own * other) for other in signed),
        }[inter]
        beta = np.exp(3 * minmax(size) ** 2) * agreement
        weights.append(minmax(np.maximum(beta, np.sort(beta)[int(N * (1 - ratio))])))
    values = sum(factor * np.sign(d) * a * w for factor, d, a, w in zip(lambdas, deltas, sizes, weights, strict=True))
    expected = t0 + (values / np.maximum(sum(weights), 1e-12)).reshape(SHAPE)
    found = merge.pcb(models, base=base, ratio=ratio, inter=inter, **{"lambda": lambdas})
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-4, atol=2e-4)


def test_pcb_as_the_paper_prints_it(tensors) -> None:
    base, models = tensors
    t0, *rest = double(base, *models)
    deltas = [(m - t0).ravel() for m in rest]

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    scores = []
    for delta in deltas:
        beta = softmax(3 * norm(delta * delta)) * sum(softmax(norm(delta * other)) for other in deltas)
        scores.append(beta * (beta >= np.sort(beta)[int(N * 0.8)]))
    expected = t0 + (sum(s * d for s, d in zip(scores, deltas, strict=True)) / np.maximum(sum(scores), 1e-30)).reshape(
        SHAPE
    )
    close(merge.pcb(models, base=base, ratio=0.2, formula="paper"), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pcb_on_degenerate_task_vectors() -> None:
    base = torch.randn(500, generator=torch.Generator().manual_seed(1))
    delta = torch.randn(500, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(500)
    assert torch.equal(merge.pcb([delta, -delta], base=zero), zero)
    constant = merge.pcb([base + 0.1, base + delta], base=base)
    assert constant.isfinite().all()
    alone = merge.pcb([base + delta, base.clone()], base=base)
    torch.testing.assert_close(alone, merge.pcb([base + delta], base=base), rtol=1e-2, atol=0.2)
    many = merge.pcb([base + delta * (1 + i / 100) for i in range(90)], base=base)
    assert many.isfinite().all()


def layers(x: torch.Tensor, depth: int = 8) -> dict[str, torch.Tensor]:
    return {f"model.layers.{i}.w": x + i for i in range(depth)} | {"model.embed.weight": x * 2}


def test_layer_swap(tensors) -> None:
    base, models = tensors
    task, language = layers(models[0]), layers(models[1])
    found = merge.layer_swap([task, language], bottom=2, top=1, transition_weight=0.25)
    for i, source in enumerate("LLMTTTML"):
        name = f"model.layers.{i}.w"
        if source == "M":
            torch.testing.assert_close(found[name], 0.75 * task[name] + 0.25 * language[name])
        else:
            assert torch.equal(found[name], (task if source == "T" else language)[name])
    for outside, expected in (("language", language), ("task", task), ("base", layers(base))):
        other = merge.layer_swap([task, language], base=layers(base), outside=outside)
        assert torch.equal(other["model.embed.weight"], expected["model.embed.weight"])
    alone = merge.layer_swap([task, language], bottom=0, top=0, transition_bottom=0, transition_top=0, outside="task")
    assert all(torch.equal(alone[k], task[k]) for k in task)
    whole = merge.layer_swap(
        [task, language], bottom=8, top=0, transition_bottom=0, transition_top=0, outside="language"
    )
    assert all(torch.equal(whole[k], language[k]) for k in task)


def test_layer_swap_scales_its_default_with_the_depth() -> None:
    x, y = torch.zeros(3), torch.ones(3)
    found = merge.layer_swap([layers(x, 32), layers(y, 32)])
    shares = [float((found[f"model.layers.{i}.w"] - i)[0]) for i in range(32)]
    assert shares == [1.0] * 5 + [0.5] + [0.0] * 23 + [0.5] + [1.0] * 2


def test_layer_swap_matches_magnitudes(tensors) -> None:
    base, models = tensors
    loud = base + 10 * (models[1] - base)
    found = merge.layer_swap(
        [layers(models[0]), layers(loud)], base=layers(base), bottom=1, top=1, match_magnitude=True
    )["model.layers.1.w"]
    t0, a, b = double(
        layers(base)["model.layers.1.w"], layers(models[0])["model.layers.1.w"], layers(loud)["model.layers.1.w"]
    )
    sizes = [np.abs(a - t0).mean(), np.abs(b - t0).mean()]
    mean = sum(sizes) / 2
    close(found, t0 + 0.5 * (a - t0) * mean / sizes[0] + 0.5 * (b - t0) * mean / sizes[1])


def test_layer_swap_refuses_what_it_cannot_do(tensors) -> None:
    _, models = tensors
    with pytest.raises(
        UserError, match=r"bottom 6 \+ top 2 \+ transitions 1 and 1 are more than the 8 layers"
    ) as error:
        merge.layer_swap([layers(models[0]), layers(models[1])], bottom=6, top=2)
    assert error.value.code == "RG303"
    with pytest.raises(UserError, match="does not know in which layer tensor is") as error:
        merge.layer_swap(models[:2])
    assert error.value.code == "RG208"
    for options in ({"match_magnitude": True, "bottom": 1, "top": 1}, {"outside": "base"}):
        with pytest.raises(UserError, match="needs a base") as error:
            merge.layer_swap([layers(models[0]), layers(models[1])], **options)
        assert error.value.code == "RG304"


def test_passthrough(tensors) -> None:
    base, _ = tensors
    assert torch.equal(merge.passthrough([base]), base)
    close(merge.passthrough([base], scale=0.5), base.double().numpy() / 2)
