"""What fine-tuning changed: task vectors (model minus base) measured per tensor, per layer and in total.

One streaming pass reads base and models in slices; memory is a few slices per thread, and sums, whatever the size of
the models. Norms and cosines come from inner products and exact sums that do not depend on how the pass was cut.
Quantiles of |delta| come from histograms of the floats' leading 16 bits, which are exact to one part in 128: that is
enough for the rules of thumb they serve, and makes them additive over tensors and layers.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from regraft.axes import Layout, layout
from regraft.checkpoint import BLOCK, Checkpoint, TensorSource, numel
from regraft.checkpoint.distance import Distance, check_base, rank_bases, relative_distance
from regraft.checkpoint.tensor import read_rows
from regraft.errors import UserError
from regraft.inspect.advice import layer_swap, sparsification
from regraft.merge.kernels import count_zeros, sign_conflicts
from regraft.merge.rule import Chunk, TensorInfo
from regraft.merge.statistics import Gram, Sum
from regraft.methods import Options

__all__ = ["Deltas", "Distance", "Measure", "check_base", "deltas", "rank_bases", "relative_distance"]

QUANTILES = (0.05, 0.5, 0.9, 0.95, 0.99, 1.0)
_CHUNK = 8 * BLOCK
_BINS = 1 << 15  # of the leading 16 bits of a float32 without its sign


@dataclass(frozen=True)
class Measure:
    """The task vectors of n models over some tensors. None where a value is not finite or a norm is zero.

    Attributes:
        elements: how many entries.
        base_norm: ‖base‖.
        norms, relative: ‖delta‖ per model, and divided by ‖base‖.
        mean_abs: mean of |delta| per model.
        unchanged: share of entries that are exactly those of the base, per model.
        quantiles: per model, share of entries -> the |delta| that they do not exceed (within 1 %; 1.0 is the largest).
        base_cosine: cosine between base and model.
        cosine: (n, n) cosines between task vectors.
        sign_conflict: of the entries that moved in any model, the share that went up in one and down in another.
        pair_conflict: (n, n) the same for pairs, of the entries that moved in both.
    """

    elements: int
    base_norm: float | None
    norms: list[float | None]
    relative: list[float | None]
    mean_abs: list[float | None]
    unchanged: list[float]
    quantiles: list[dict[float, float]]
    base_cosine: list[float | None]
    cosine: list[list[float | None]]
    sign_conflict: float | None
    pair_conflict: list[list[float | None]]


@dataclass(frozen=True)
class Deltas:
    """The result of `deltas`.

    Attributes:
        base, models: references.
        total: all tensors together.
        layers: per stack ("" for the only one) one measure per layer, from the input on.
        parts: per stack and layer, "attention" | "ffn" | "norm" -> mean |delta| per model: a heat map.
        tensors: per tensor.
        base_check: per model, whether it comes from this base, as measured.
        remarks: tensors left out, values that are not finite; one sentence each.
    """

    base: str
    models: list[str]
    total: Measure
    layers: dict[str, list[Measure]]
    parts: dict[str, list[dict[str, list[float | None]]]]
    tensors: dict[str, Measure]
    base_check: list[Distance]
    remarks: list[str]

    def sparsification(self) -> list[str]:
        """Per model, what the size of its changes says about dropping most of them (DARE, arXiv:2311.03099)."""
        return [sparsification(q, u) for q, u in zip(self.total.quantiles, self.total.unchanged, strict=True)]

    def layer_swap(self, task: int, language: int, stack: str = "") -> tuple[int, int]:
        """(bottom, top): how many outer layers to take from the model number `language` (arXiv:2410.01335)."""
        changes = [m.mean_abs for m in self.layers.get(stack, [])]
        return layer_swap([c[task] for c in changes], [c[language] for c in changes])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the advice in words."""
        swaps = {
            stack: [
                {"task": self.models[i], "language": self.models[j], "bottom": bottom, "top": top}
                for i in range(len(self.models))
                for j in range(len(self.models))
                if i != j
                for bottom, top in [self.layer_swap(i, j, stack)]
            ]
            for stack in self.layers
        }
        return {
            "base": self.base,
            "models": self.models,
            "total": _plain(self.total),
            "layers": {stack: [_plain(m) for m in layers] for stack, layers in self.layers.items()},
            "parts": self.parts,
            "tensors": {name: _plain(m) for name, m in self.tensors.items()},
            "base_check": [d.to_dict() | {"sentence": d.sentence()} for d in self.base_check],
            "sparsification": self.sparsification(),
            "layer_swap": swaps,
            "remarks": self.remarks,
        }


def deltas(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Deltas:
    """Measure what `models` changed in `base`.

    Args:
        workers: threads; up to four by default.
        on_progress: called with (elements done, elements in all) of the base.

    Tensors that a model lacks, or has in another shape, are left out with a remark; of embeddings and heads with other
    numbers of rows, the rows that all have are compared.

    Raises:
        UserError: RG202 if there is no tensor to compare, RG305 without a model, and what reading raises.
    """
    if not models:
        raise UserError("RG305", "there is no model to compare with the base", fix="name one or more fine-tunes of it")
    own = layout(base.config, base.tensors)
    jobs, remarks = _pair(base, models, own)
    if not jobs:
        what = f"{base.ref} and {', '.join(m.ref for m in models)} have no tensor in common"
        raise UserError("RG202", what, fix="compare models of one architecture")
    run = _Pass(len(models), sum(job.elements for job in jobs), on_progress)
    with ThreadPoolExecutor(max_workers=workers or min(4, os.cpu_count() or 1)) as pool:
        measured = dict(zip((job.info.name for job in jobs), pool.map(run.measure, jobs), strict=True))
    figures = {name: one for name, (one, _) in measured.items()}
    layers: dict[str, list[Measure]] = {}
    parts: dict[str, list[dict[str, list[float | None]]]] = {}
    for stack, depth in own.stacks.items():
        inside: list[dict[str, list[_Sums]]] = [{} for _ in range(depth)]
        for name, one in figures.items():
            place = own.place(name)
            if place.stack == stack and place.layer is not None:
                inside[place.layer].setdefault(place.part, []).append(one)
        if all(inside):
            whole = [_Sums.of([one for group in layer.values() for one in group]) for layer in inside]
            layers[stack] = [s.measure(run.histograms[stack, i]) for i, s in enumerate(whole)]
            parts[stack] = [{part: _Sums.of(group).mean_abs for part, group in layer.items()} for layer in inside]
    return Deltas(
        base=base.ref,
        models=[m.ref for m in models],
        total=_Sums.of(list(figures.values())).measure(run.histograms["", None]),
        layers=layers,
        parts=parts,
        tensors={name: measure for name, (_, measure) in measured.items()},
        base_check=[relative_distance(base, model) for model in models],
        remarks=remarks + [f"{name}: not every value is finite" for name, one in figures.items() if not one.finite],
    )


@dataclass(frozen=True)
class _Job:
    info: TensorInfo
    base: TensorSource
    models: tuple[TensorSource, ...]
    elements: int  # a prefix that all of them have


def _pair(base: Checkpoint, models: Sequence[Checkpoint], own: Layout) -> tuple[list[_Job], list[str]]:
    """The tensors that all models have, in the base's order."""
    by_name = []
    for model in models:
        theirs = layout(model.config, model.tensors)
        names = {theirs.bare(name): source for name, source in model.tensors.items()}
        pairs = [*model.aliases.items(), *theirs.tied]
        names |= {theirs.bare(a): model.tensors[c] for a, c in pairs if c in model.tensors and a not in model.tensors}
        by_name.append(names)
    copies = {alias for alias, canonical in own.tied if alias in base.tensors and canonical in base.tensors}
    jobs, remarks = [], []
    for name, source in base.tensors.items():
        place = own.place(name)
        if not source.dtype.is_floating_point or place.role == "buffer" or name in copies or not numel(source):
            continue
        others = [names.get(own.bare(name)) for names in by_name]
        shapes = [source.shape, *(o.shape for o in others if o is not None)]
        rows = place.role in ("embedding", "head") and len({s[1:] for s in shapes}) == 1
        if None in others:
            remarks.append(f"{name} is not in {models[others.index(None)].ref} and was left out")
        elif len(set(shapes)) > 1 and not rows:
            remarks.append(f"{name} has shapes {', '.join(str(list(s)) for s in dict.fromkeys(shapes))}: left out")
        else:
            common = min(shapes)
            if len(set(shapes)) > 1:
                remarks.append(
                    f"{name} has {' and '.join(str(s[0]) for s in shapes)} rows: the first {common[0]} count"
                )
            info = TensorInfo(name, common, place.layer, place.num_layers, place.stack, place.role)
            jobs.append(_Job(info, source, tuple(o for o in others if o is not None), info.numel))
    return jobs, remarks


class _Pass:
    """Streams tensors through the statistics; `measure` runs in several threads."""

    def __init__(self, n: int, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._n, self._total, self._on_progress = n, total, on_progress
        self._done = 0
        self._lock = threading.Lock()
        # Counts are integers, so that adding them up in any order gives the same: kept for the whole and per layer.
        self.histograms: dict[tuple[str, int | None], Tensor] = {}

    def measure(self, job: _Job) -> tuple[_Sums, Measure]:
        with torch.inference_mode():
            gram, sums = Gram(_base_and_deltas), Sum(lambda chunk: chunk.deltas, absolute=True)
            counts: Tensor | int = 0
            histogram = torch.zeros((self._n, _BINS), dtype=torch.int64)
            for statistic in (gram, sums):
                statistic.begin(job.elements)
            for start in range(0, job.elements, _CHUNK):
                stop = min(start + _CHUNK, job.elements)
                rows = read_rows([*job.models, job.base], start, stop)
                chunk: Chunk[Any] = Chunk(job.info, Options(), start, rows, True, "F32")
                for statistic in (gram, sums):
                    statistic.observe(chunk)
                counts = counts + _counts(chunk.deltas)
                keys = chunk.deltas.abs().contiguous().view(torch.int32) >> 16
                for i in range(self._n):
                    histogram[i] += torch.bincount(keys[i], minlength=_BINS)
                self._advance(stop - start)
            for statistic in (gram, sums):
                statistic.finish()
        numbers = (torch.as_tensor(values) for values in (gram.result, sums.result, counts))
        found = _Sums(job.elements, *numbers)
        with self._lock:
            for key in {("", None), (job.info.stack if job.info.layer is not None else "", job.info.layer)}:
                before = self.histograms.get(key)
                self.histograms[key] = histogram.clone() if before is None else before.add_(histogram)
        return found, found.measure(histogram)

    def _advance(self, elements: int) -> None:
        with self._lock:
            self._done += elements
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)


def _base_and_deltas(chunk: Chunk[Any]) -> Tensor:
    return torch.cat([chunk.base.unsqueeze(0), chunk.deltas])


def _counts(d: Tensor) -> Tensor:
    """Entries of `d` (n, L): unmoved per model; moved in any, in conflict; per pair moved in both, in conflict."""
    n = d.shape[0]
    counts = [*count_zeros(d).tolist(), *sign_conflicts(d)]
    moved = [sign_conflicts(row.unsqueeze(0))[0] for row in d]
    for i, j in combinations(range(n), 2):
        either, against = sign_conflicts(torch.stack([d[i], d[j]]))
        counts += [moved[i] + moved[j] - either, against]
    return torch.tensor(counts)


@dataclass
class _Sums:
    """Additive figures of one or more tensors: the Gram matrix of base and deltas, sums of |delta|, and `_counts`."""

    elements: int
    gram: Tensor
    sums: Tensor
    counts: Tensor

    @classmethod
    def of(cls, parts: Sequence[_Sums]) -> _Sums:
        total = cls(0, *(torch.zeros_like(t) for t in (parts[0].gram, parts[0].sums, parts[0].counts)))
        for part in parts:
            total.elements += part.elements
            total.gram += part.gram
            total.sums += part.sums
            total.counts += part.counts
        return total

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.gram).all())

    @property
    def mean_abs(self) -> list[float | None]:
        return [_ratio(x, self.elements) for x in self.sums.tolist()]

    def measure(self, histogram: Tensor) -> Measure:
        n = histogram.shape[0]
        gram, counts = self.gram.tolist(), self.counts.tolist()
        base, norms = _root(gram[0][0]), [_root(gram[i + 1][i + 1]) for i in range(n)]
        moved, conflict = counts[n : n + 2]
        pairs: list[list[float | None]] = [[0.0 if i == j else None for j in range(n)] for i in range(n)]
        for k, (i, j) in enumerate(combinations(range(n), 2)):
            both, against = counts[n + 2 + 2 * k : n + 4 + 2 * k]
            pairs[i][j] = pairs[j][i] = _ratio(against, both)
        return Measure(
            elements=self.elements,
            base_norm=base,
            norms=norms,
            relative=[_ratio(x, base) for x in norms],
            mean_abs=self.mean_abs,
            unchanged=[x / self.elements for x in counts[:n]],
            quantiles=[_quantiles(h, self.elements) for h in histogram],
            base_cosine=[_base_cosine(gram, i + 1) for i in range(n)],
            cosine=[[_cosine(gram[i + 1][j + 1], norms[i], norms[j]) for j in range(n)] for i in range(n)],
            sign_conflict=_ratio(conflict, moved),
            pair_conflict=pairs,
        )


def _root(x: float) -> float | None:
    return math.sqrt(max(x, 0.0)) if math.isfinite(x) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b and math.isfinite(a / b) else None


def _cosine(product: float, a: float | None, b: float | None) -> float | None:
    found = _ratio(product, a * b if a and b else None)
    return None if found is None else min(1.0, max(-1.0, found))


def _base_cosine(gram: Sequence[Sequence[float]], i: int) -> float | None:
    """cos(b, b + d) from <b, b>, <b, d> and <d, d>."""
    bb, bd, dd = gram[0][0], gram[0][i], gram[i][i]
    return _cosine(bb + bd, _root(bb), _root(bb + 2 * bd + dd))


def _quantiles(histogram: Tensor, elements: int) -> dict[float, float]:
    """The middle of the bin that holds each quantile, 0 exactly for entries that did not move."""
    cumulative = histogram.cumsum(0)
    found = {}
    for q in QUANTILES:
        key = int(torch.searchsorted(cumulative, math.ceil(q * elements)))
        edges = torch.tensor([key << 16, (key << 16) | 0x8000], dtype=torch.int32).view(torch.float32)
        found[q] = float(edges[0]) if key == 0 else float(edges[1])
    return found


def _plain(measure: Measure) -> Mapping[str, Any]:
    found = dict(vars(measure))
    found["quantiles"] = [
        {str(q): v if math.isfinite(v) else None for q, v in one.items()} for one in measure.quantiles
    ]
    return found
