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

import numpy as np

from regraft.checkpoint.tensor import BLOCK
from regraft.merge.kernels import block_grams, block_sums, sign_conflicts, stored
from regraft.merge.rule import Chunk, TensorInfo

# Of a larger tensor every k-th block is measured, so that about this many elements are: enough for a cosine to within
# 0.002, for a fraction of what merging costs.
_ENOUGH = 1 << 18


@dataclass
class _Sums:
    """Of one or more tensors: inner products (n, n) and L1 norms (n,) of task vectors, ‖base‖², entries that moved and
    that conflict; of `elements` entries."""

    gram: np.ndarray
    absolute: np.ndarray
    base: float = 0.0
    moved: float = 0
    conflicts: float = 0
    elements: float = 0

    def add(self, other: _Sums) -> None:
        self.gram += other.gram
        self.absolute += other.absolute
        self.base += other.base
        self.moved += other.moved
        self.conflicts += other.conflicts
        self.elements += other.elements

    def stretched(self, elements: int) -> _Sums:
        """What they come to for all `elements` of a tensor of which some were measured."""
        factor = elements / max(self.elements, 1)
        if factor == 1:
            return self
        return _Sums(
            self.gram * factor,
            self.absolute * factor,
            self.base * factor,
            self.moved * factor,
            self.conflicts * factor,
            elements,
        )

    def facts(self) -> dict[str, Any]:
        norms = self._norms()
        return {
            "norms": [_digits(float(x)) for x in norms],
            "mean_change": [_digits(float(x) / max(self.elements, 1)) for x in self.absolute],
            "base_norm": _digits(math.sqrt(self.base)),
            "sign_conflict": _digits(self.conflicts / self.moved) if self.moved else 0.0,
        }

    @classmethod
    def empty(cls, n: int) -> _Sums:
        return cls(np.zeros((n, n)), np.zeros(n))

    def cosines(self) -> list[list[float]]:
        norms = self._norms()
        scale = np.outer(norms, norms)
        cosines = np.where(scale > 0, self.gram / np.maximum(scale, 1e-300), 0.0)
        return [[_digits(float(x)) for x in row] for row in cosines]

    def _norms(self) -> np.ndarray:
        norms: np.ndarray = np.sqrt(np.maximum(self.gram.diagonal(), 0))
        return norms


@dataclass
class TaskVectorStatistics:
    """An observer for `run_jobs`; ask for its `summary` afterwards. Chunks without a base are ignored.

    Args:
        n: number of models besides the base.
    """

    n: int
    _tensors: dict[str, tuple[TensorInfo, _Sums]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, chunk: Chunk[Any]) -> None:
        """Add a chunk; called from several threads, each chunk of the output once."""
        if not chunk.has_base or chunk.n != self.n:
            return
        stride = -(-chunk.info.numel // _ENOUGH)
        raw = stored(chunk)
        found = _sums(chunk, stride) if raw is None else _stored_sums(raw, chunk.start // BLOCK, stride)
        if found.elements:
            self._add(chunk.info, found)

    def _add(self, info: TensorInfo, found: _Sums) -> None:
        with self._lock:
            if info.name not in self._tensors:
                self._tensors[info.name] = (info, _Sums.empty(self.n))
            self._tensors[info.name][1].add(found)

    def facts(self, name: str) -> Any:
        """The sums of a tensor, JSON-able; None if it was not measured."""
        with self._lock:
            if name not in self._tensors:
                return None
            s = self._tensors[name][1]
            return [s.gram.tolist(), s.absolute.tolist(), s.base, s.moved, s.conflicts, s.elements]

    def restore(self, info: TensorInfo, facts: Any) -> None:
        """Take over what `facts` gave in an earlier run."""
        if facts is not None:
            gram, absolute = (np.array(values, np.float64) for values in facts[:2])
            self._add(info, _Sums(gram, absolute, *facts[2:]))

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """JSON-able facts: in total, per layer and per tensor. Empty if no chunk had a base. Large tensors are measured
        on evenly spaced blocks, and their figures are estimates from these.

        `norms` are those of the task vectors, in the order of `models`; `sign_conflict` is the share, among the entries
        that moved in at least one model, of those that moved up in one and down in another.
        """
        if not self._tensors:
            return {}
        total = _Sums.empty(self.n)
        layers: dict[tuple[str, int], _Sums] = {}
        tensors = {n: (info, sums.stretched(info.numel)) for n, (info, sums) in sorted(self._tensors.items())}
        for info, sums in tensors.values():
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
            "tensors": {name: sums.facts() for name, (_, sums) in tensors.items()},
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


def _stored_sums(raw: np.ndarray, first: int, stride: int) -> _Sums:
    """The sums of every `stride`-th block, by its number in the tensor; `raw` begins with block `first`."""
    from regraft.merge.native_sparse import task_vector_sums

    n = len(raw) - 1
    gram, absolute, columns = np.zeros((n + 1, n + 1)), np.zeros(n), np.zeros(3, np.int64)
    task_vector_sums(raw, BLOCK, first, stride, gram, absolute, columns)
    lower = gram[:n, :n]
    elements, moved, conflicts = columns.tolist()
    return _Sums(lower + np.tril(lower, -1).T, absolute, float(gram[n, n]), moved, conflicts, elements)


def _sums(chunk: Chunk[Any], stride: int) -> _Sums:
    """As `_stored_sums`, of what is stored in other dtypes or lies elsewhere."""
    import torch

    first = chunk.start // BLOCK
    starts = [at for at in range(0, chunk.length, BLOCK) if (first + at // BLOCK) % stride == 0]
    if not starts:
        return _Sums.empty(chunk.n)
    rows = [torch.cat([row[at : at + BLOCK] for at in starts]) for row in chunk.rows]
    measured = Chunk(chunk.info, chunk.options, 0, rows, True, chunk.arithmetic)
    deltas, base = measured.deltas.cpu().numpy(), measured.base.cpu().numpy()
    gram = block_grams(np.concatenate([deltas, base[None]])).sum(0)
    moved, conflicts = sign_conflicts(deltas)
    n, length = deltas.shape
    absolute = block_sums(deltas, absolute=True).sum(1)
    return _Sums(gram[:n, :n], absolute, float(gram[n, n]), moved, conflicts, length)


def _digits(value: float) -> float:
    """Six significant digits: what float32 within blocks is good for, whatever the order of chunks."""
    return float(f"{value:.6g}")
