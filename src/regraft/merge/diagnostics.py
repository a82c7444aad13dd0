"""What the task vectors of a merge look like, measured in the pass that merges them: norms, angles, sign conflicts.

Nearly orthogonal task vectors can be added without disturbing one another (the independence check of arXiv:2409.19854);
a large share of sign conflicts is what TIES, SCE and PCB are for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoint.tensor import BLOCK
from regraft.merge.rule import Chunk, TensorInfo


@dataclass
class _Sums:
    """Of one or more tensors: inner products (n, n) and L1 norms (n,) of task vectors, ‖base‖², entries that moved and
    that conflict."""

    gram: Tensor
    absolute: Tensor
    base: float = 0.0
    moved: int = 0
    conflicts: int = 0
    elements: int = 0

    def add(self, other: _Sums) -> None:
        self.gram += other.gram
        self.absolute += other.absolute
        self.base += other.base
        self.moved += other.moved
        self.conflicts += other.conflicts
        self.elements += other.elements

    def facts(self) -> dict[str, Any]:
        norms = self.gram.diagonal().clamp(min=0).sqrt()
        return {
            "norms": [_digits(float(x)) for x in norms],
            "mean_change": [_digits(float(x) / max(self.elements, 1)) for x in self.absolute],
            "base_norm": _digits(math.sqrt(self.base)),
            "sign_conflict": _digits(self.conflicts / self.moved) if self.moved else 0.0,
        }

    @classmethod
    def empty(cls, n: int) -> _Sums:
        return cls(torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))

    def cosines(self) -> list[list[float]]:
        norms = self.gram.diagonal().clamp(min=0).sqrt()
        scale = torch.outer(norms, norms)
        cosines = torch.where(scale > 0, self.gram / scale.clamp(min=1e-300), torch.zeros_like(scale))
        return [[_digits(float(x)) for x in row] for row in cosines]


@dataclass
class TaskVectorStatistics:
    """An observer for `run_jobs`: pass `observe`, then ask for `summary`. Chunks without a base are ignored.

    Args:
        n: number of models besides the base.
    """

    n: int
    _tensors: dict[str, tuple[TensorInfo, _Sums]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, chunk: Chunk[Any]) -> None:
        """Add a chunk; called from several threads, each chunk of the output once."""
        if not chunk.has_base or chunk.models.shape[0] != self.n:
            return
        deltas = chunk.deltas
        positive, negative = (deltas > 0).any(0), (deltas < 0).any(0)
        found = _Sums(
            _gram(deltas),
            deltas.abs().sum(1, dtype=torch.float64),
            float(_gram(chunk.base.unsqueeze(0))),
            int((positive | negative).sum()),
            int((positive & negative).sum()),
            deltas.shape[1],
        )
        with self._lock:
            if chunk.info.name not in self._tensors:
                self._tensors[chunk.info.name] = (chunk.info, _Sums.empty(self.n))
            self._tensors[chunk.info.name][1].add(found)

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """JSON-able facts: in total, per layer and per tensor. Empty if no chunk had a base.

        `norms` are those of the task vectors, in the order of `models`; `sign_conflict` is the share, among the entries
        that moved in at least one model, of those that moved up in one and down in another.
        """
        if not self._tensors:
            return {}
        total = _Sums.empty(self.n)
        layers: dict[tuple[str, int], _Sums] = {}
        for info, sums in self._tensors.values():
            total.add(sums)
            if info.layer is not None:
                key = (info.stack, info.layer)
                layers.setdefault(key, _Sums.empty(self.n)).add(sums)
        facts = total.facts()
        cosines = total.cosines()
        relative = [_digits(n / facts["base_norm"]) if facts["base_norm"] else 0.0 for n in facts["norms"]]
        return {
            "models": list(names),
            **facts,
            "relative_norms": relative,
            "cosine": cosines,
            **({"independence": _independence(names, cosines)} if self.n > 1 else {}),
            "layers": [
                {"stack": stack, "layer": layer, **sums.facts()} for (stack, layer), sums in sorted(layers.items())
            ],
            "tensors": {name: sums.facts() for name, (_, sums) in sorted(self._tensors.items())},
        }


def _independence(names: Sequence[str], cosines: Sequence[Sequence[float]]) -> str:
    """How near to orthogonal the task vectors are, by the pair that is farthest from it."""
    pairs = [(abs(cosines[i][j]), i, j) for i in range(len(names)) for j in range(i)]
    _, i, j = max(pairs)
    cosine = cosines[i][j]
    kind = "nearly independent" if abs(cosine) < 0.1 else "related" if abs(cosine) < 0.5 else "much alike"
    if cosine <= -0.5:
        kind = "opposed"
    return f"task vectors are {kind}: the largest cosine is {cosine:.3g} ({names[j]}, {names[i]})"


def _gram(rows: Tensor) -> Tensor:
    """Inner products between rows, (n, n) float64: float32 within blocks, float64 between them."""
    n, length = rows.shape
    whole = length // BLOCK * BLOCK
    blocks = rows[:, :whole].reshape(n, -1, BLOCK).transpose(0, 1)
    gram = torch.bmm(blocks, blocks.transpose(1, 2)).to(torch.float64).sum(0)
    rest = rows[:, whole:]
    return gram + (rest @ rest.T).to(torch.float64)


def _digits(value: float) -> float:
    """Six significant digits: what float32 within blocks is good for, whatever the order of chunks."""
    return float(f"{value:.6g}")
