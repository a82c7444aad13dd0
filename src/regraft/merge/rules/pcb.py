"""PCB-Merging: every parameter of every task competes for its place, by its size and by how well it agrees.

Per task i, over the whole model, with δᵢ the task vector and aᵢ = |δᵢ| clipped to its `clip` and 1 − `clip` quantiles:

    βᵢ = exp(n · minmax(aᵢ)²) · tanh(δᵢ Σⱼ δⱼ)                    intra-balancing times inter-balancing
    wᵢ = minmax(max(βᵢ, its (1 − ratio)-quantile))                drop and rescale: 0 up to the quantile, 1 at the top
    θ  = θ₀ + Σ λᵢ sign(δᵢ) aᵢ wᵢ / max(Σ wᵢ, 1e-12)

Use it for several fine-tunes of one base on different tasks; no data is needed. This is what the official code
computes (`formula: code`); `formula: paper` is Algorithm 1 as printed, with softmax over all entries and a hard mask.
The two are not interchangeable. `inter: normsum` and `pairwise` are the variants of the official vision code, `clip:
0.0001` that of its key-steps file; 0.01 is what its experiments ran.

Departures: a task whose magnitudes are all equal gets minmax 0 where the official code divides by zero, so two exactly
opposite task vectors give the base back; a model that equals the base takes no part, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from regraft.merge.kernels import added, array, changed, fused, numbers, stored
from regraft.merge.rule import Chunk, PerModel, Steps, Unit, rule
from regraft.merge.statistics import MinMax, OrderStatistic, Statistic, Sum, task_vectors
from regraft.merge.storage import stored_base
from regraft.methods import Options, Paper

if TYPE_CHECKING:
    from torch import Tensor


class PcbOptions(Options):
    ratio: float = Field(0.1, gt=0, le=1, description="share of each task's entries that survive, in (0, 1]")
    lambda_: PerModel[float] = Field((1.0,), alias="lambda", description="factor of each model's task vector")
    clip: float = Field(0.01, ge=0, lt=0.5, description="share of extreme magnitudes that is clipped at either end")
    inter: Literal["sum", "normsum", "pairwise"] = Field("sum", description="how agreement between tasks is measured")
    formula: Literal["code", "paper"] = Field("code", description="the official code's formula, or the paper's")
    scope: Literal["model", "tensor"] = Field("model", description="what quantiles and extremes are taken over")


Score = Callable[[Chunk[PcbOptions]], Any]


@rule(
    summary="balance the competition of parameters within and between tasks",
    options=PcbOptions,
    needs_base=True,
    order_statistics=2,
    compiled=lambda o: o.formula == "code" and o.inter == "sum",
    scope=lambda o: o.scope,
    model_wide=("ratio", "clip", "inter", "formula", "scope"),
    in_mergekit=False,
    papers=[
        Paper("Parameter Competition Balancing for Model Merging", "Du et al.", "NeurIPS 2024", "2410.02396", 12),
    ],
)
def pcb(unit: Unit[PcbOptions]) -> Steps:
    o = unit.options
    if unit.n == 1:
        unit.warn("pcb has one model to balance: the result is that model with its smaller changes dropped")
    if o.formula == "paper":
        return (yield from _paper(unit))
    count = unit.numel
    low_rank = math.floor(count * o.clip)
    high_rank = max(low_rank, math.floor(count * (1 - o.clip) - 1))
    (bounds,) = yield [OrderStatistic(task_vectors, ranks=[low_rank, high_rank], absolute=True)]
    low, high = bounds[:, :1], bounds[:, 1:]
    idle = high[:, 0] == 0
    for i in np.flatnonzero(idle).tolist():
        unit.warn(f"model {i + 1} of pcb hardly differs from the base, and takes no part")

    cut, top = yield from _survivors(unit, lambda c: _scores(c, low, high))
    top[idle] = cut[idle]  # all its weights are then 0

    def combine(c: Chunk[PcbOptions]) -> Any:
        raw = stored(c)
        base = c.base if raw is None else stored_base(raw)
        return changed(base, _mean(c, _scores(c, low, high), low, high, cut, top))

    return combine


def _scores(c: Chunk[PcbOptions], low: np.ndarray, high: np.ndarray) -> Any:
    """βᵢ up to a factor exp(-n), which is common to all entries of a task and drops out of the min-max; (n, L)."""
    deltas = c.computed(task_vectors)
    if c.options.inter == "sum" and c.arithmetic == "F32" and fused(deltas):
        from regraft.merge import native_pcb

        out = np.empty(deltas.shape, np.float32)
        native_pcb.scores(array(deltas), *map(np.ascontiguousarray, (low[:, 0], high[:, 0])), out)
        return out
    size = _minmax(_clipped(c, low, high), low, high)
    intra = torch.exp(c.n * (size.square() - 1))
    if c.options.inter == "sum":
        return intra * torch.tanh(c.deltas * added(c.deltas))
    signed = torch.sign(c.deltas) * size
    if c.options.inter == "normsum":
        return intra * torch.tanh(c.deltas * added(signed))
    return intra * added(torch.tanh(signed * other) for other in signed)


def _mean(
    c: Chunk[PcbOptions], scores: Any, low: np.ndarray, high: np.ndarray, cut: np.ndarray, top: np.ndarray
) -> Any:
    """Mean of the clipped task vectors, weighted by the scores from `cut` (weight 0) to `top` (1); (L,)."""
    deltas = c.computed(task_vectors)
    if c.arithmetic == "F32" and fused(deltas, scores):
        from regraft.merge import native_pcb

        out = np.empty(c.length, np.float32)
        bounds = (np.ascontiguousarray(column[:, 0]) for column in (low, high, cut, top))
        native_pcb.mean(array(deltas), array(scores), *bounds, numbers(c.options.lambda_, "F32"), out)
        return out if isinstance(deltas, np.ndarray) else torch.from_numpy(out)
    scores = torch.as_tensor(scores)
    weights = _minmax(scores.maximum(c.like(cut)), cut, top)
    values = torch.sign(c.deltas) * _clipped(c, low, high) * weights * c.per_model(c.options.lambda_)
    return added(values) / added(weights).clamp(min=1e-12)


def _clipped(c: Chunk[PcbOptions], low: np.ndarray, high: np.ndarray) -> Tensor:
    return c.deltas.abs().clamp(c.like(low), c.like(high))


def _paper(unit: Unit[PcbOptions]) -> Steps:
    """Algorithm 1: softmax over all entries, hard mask, mean weighted by the scores."""
    n, count = unit.n, unit.numel
    pairs = [(i, j) for i in range(n) for j in range(i, n)]  # products, and so their softmax, are symmetric
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    own = [pairs.index((i, i)) for i in range(n)]
    rows_of = [[k for k, pair in enumerate(pairs) if i in pair] for i in range(n)]

    def products(c: Chunk[PcbOptions]) -> Tensor:
        return c.deltas[first] * c.deltas[second]

    (extremes,) = yield [MinMax(products)]
    low, high = extremes[:, :1], extremes[:, 1:]
    idle = high[own, 0] == 0
    for i in np.flatnonzero(idle).tolist():
        unit.warn(f"model {i + 1} of pcb equals the base, and takes no part")

    def powers(c: Chunk[PcbOptions]) -> tuple[Tensor, Tensor]:
        scaled = _minmax(products(c), low, high)
        return torch.exp(n * (scaled[own] - 1)), torch.exp(scaled)

    intra_sum, inter_sum = yield [Sum(lambda c: powers(c)[0]), Sum(lambda c: powers(c)[1])]
    # Scores are scaled by the number of entries: a softmax over 1e9 of them would leave the range of float32.
    intra_scale, inter_scale = (count / found[:, None] for found in (intra_sum, inter_sum))

    def beta(c: Chunk[PcbOptions]) -> Tensor:
        intra, inter = powers(c)
        inter = inter * c.like(inter_scale)
        return intra * c.like(intra_scale) * torch.stack([added(inter[k] for k in rows) for rows in rows_of])

    cut, _ = yield from _survivors(unit, beta)

    def combine(c: Chunk[PcbOptions]) -> Tensor:
        scores = beta(c)
        scores = scores * (scores >= c.like(cut))
        scores[np.flatnonzero(idle)] = 0
        values = c.deltas * scores * c.per_model(c.options.lambda_)
        return changed(c.base, added(values) / added(scores).clamp(min=1e-12))

    return combine


def _survivors(
    unit: Unit[PcbOptions], beta: Score
) -> Generator[Sequence[Statistic], Sequence[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Per task the (1 − ratio)-quantile of the scores and their maximum, each (n, 1)."""
    rank = min(math.floor(unit.numel * (1 - unit.options.ratio)), unit.numel - 1)
    found, extremes = yield [OrderStatistic(beta, ranks=[rank]), MinMax(beta)]
    unit.note(score_thresholds=found[:, 0].tolist())
    return found, extremes[:, 1:]


def _minmax(values: Tensor, low: np.ndarray, high: np.ndarray) -> Tensor:
    """Values mapped so that `low` is 0 and `high` 1; 0 for rows where the two are equal."""
    least, span = (torch.from_numpy(bound).to(values) for bound in (low, high - low))
    return torch.where(span > 0, (values - least) / torch.where(span > 0, span, torch.ones_like(span)), 0.0)
