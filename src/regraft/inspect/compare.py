"""Several models side by side: what is equal, what differs, and which operations can combine them.

"Can" means that the result would make sense, not only that shapes agree: averaging models without a common start, or
with different tokenizers, runs and gives noise. Each no has a reason and what would make it a yes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch

from regraft.axes import layout
from regraft.checkpoint import BLOCK, Checkpoint, numel
from regraft.checkpoint.distance import Distance
from regraft.errors import UserError
from regraft.inspect.config_keys import Difference, config_differences
from regraft.inspect.deltas import relative_distance
from regraft.inspect.facts import Facts, facts
from regraft.inspect.obstacles import (
    Model,
    Obstacle,
    of_architecture,
    of_config,
    of_layers,
    of_origin,
    of_tensors,
    of_values,
    of_vocabulary,
    tokenizers,
)
from regraft.inspect.scan import Scan

__all__ = ["Comparison", "Difference", "Operation", "Pair", "Row", "compare", "config_differences"]

# The operations judged, by the names of their methods; "task_arithmetic" stands for all that add task vectors.
OPERATIONS = ("linear", "slerp", "task_arithmetic", "model_stock", "layer_swap", "passthrough")
_WITH_BASE = ("task_arithmetic", "model_stock")
_PIECE = 1 << 24


@dataclass(frozen=True)
class Row:
    """One line of the table: a fact with its value in each model."""

    key: str
    values: tuple[Any, ...]
    equal: bool


@dataclass(frozen=True)
class Pair:
    """Two of the models (numbers in `Comparison.models`).

    Attributes:
        identical: the weights are the same to the bit.
        config: keys of config.json that differ, those that change what is computed first.
        tokenizers: "same", "other special tokens", "other added tokens", "different", "none" (neither has one),
            "unknown".
        only_a, only_b: tensors that one of them lacks.
        shapes: tensor -> its two shapes, where they differ.
        distance: of the weights, measured.
    """

    a: int
    b: int
    identical: bool
    config: list[Difference]
    tokenizers: str
    only_a: list[str]
    only_b: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    distance: Distance


@dataclass(frozen=True)
class Operation:
    """Whether an operation can combine the models: `code` and `fix` are "" if it can, `reason` says why or why not."""

    name: str
    possible: bool
    code: str
    reason: str
    fix: str


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; `families` are the numbers of the models that share a start, as measured."""

    models: list[str]
    base: str | None
    facts: list[Facts]
    rows: list[Row]
    pairs: list[Pair]
    families: list[list[int]]
    operations: list[Operation]

    def operation(self, name: str) -> Operation:
        """The verdict on one operation; KeyError for a name that is not among `OPERATIONS`."""
        return {one.name: one for one in self.operations}[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = asdict(self)
        for pair, own in zip(found["pairs"], self.pairs, strict=True):
            pair["distance"]["sentence"] = own.distance.sentence()
        return found


def compare(
    checkpoints: Sequence[Checkpoint],
    base: Checkpoint | None = None,
    *,
    stats: bool = False,
    known: Sequence[Facts] | None = None,
) -> Comparison:
    """Compare two or more models, and judge the operations that could combine them.

    Weights are read on a sample; only pairs whose sample is identical are read to the end. With `stats`, everything
    is read, and values that are not finite count as an obstacle.

    Args:
        known: the facts of each checkpoint where the caller has them already; what they scanned is not read again.

    Raises:
        UserError: RG305 for fewer than two models, and what reading raises.
    """
    if len(checkpoints) < 2:
        raise UserError("RG305", "there is nothing to compare with", fix="name two or more models")
    names = _names([*checkpoints, *([base] if base is not None else [])])
    found = list(known) if known is not None else [facts(one, stats=stats) for one in checkpoints]
    models = [_model(name, one, f) for name, one, f in zip(names, checkpoints, found, strict=False)]
    root = _model(names[-1], base, facts(base)) if base is not None else None
    pairs = [_pair(models, i, j) for i, j in combinations(range(len(models)), 2)]
    judge = _Judge(models, root, pairs, [one.scan for one in found])
    return Comparison(
        models=[one.ref for one in checkpoints],
        base=base.ref if base is not None else None,
        facts=found,
        rows=_rows(found),
        pairs=pairs,
        families=_families(len(models), pairs),
        operations=[judge.verdict(name) for name in OPERATIONS],
    )


def _model(name: str, checkpoint: Checkpoint, found: Facts) -> Model:
    return Model(name, checkpoint, layout(checkpoint.config, checkpoint.tensors), found.tokenizer)


def _names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Folder names or Hub ids where they tell the models apart, else references."""
    short = [one.repo_id or one.path.name for one in checkpoints]
    return short if len(set(short)) == len(short) else [one.ref for one in checkpoints]


def _pair(models: Sequence[Model], i: int, j: int) -> Pair:
    a, b = models[i], models[j]
    mine, theirs = a.checkpoint.tensors, b.checkpoint.tensors
    distance = relative_distance(a.checkpoint, b.checkpoint)
    shapes = {n: (s.shape, theirs[n].shape) for n, s in mine.items() if n in theirs and theirs[n].shape != s.shape}
    return Pair(
        a=i,
        b=j,
        identical=distance.verdict == "identical" and _same_bytes(a.checkpoint, b.checkpoint),
        config=config_differences(a.checkpoint.config, b.checkpoint.config),
        tokenizers=tokenizers(a.tokenizer, b.tokenizer),
        only_a=[n for n in mine if b.find(n) is None],
        only_b=[n for n in theirs if a.find(n) is None],
        shapes=shapes,
        distance=distance,
    )


def _same_bytes(a: Checkpoint, b: Checkpoint) -> bool:
    if a.tensors.keys() != b.tensors.keys():
        return False
    for name, one in a.tensors.items():
        other = b.tensors[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        step = max(BLOCK, _PIECE // one.dtype.itemsize)
        for start in range(0, numel(one), step):
            stop = min(start + step, numel(one))
            if not torch.equal(one.read(start, stop).view(torch.uint8), other.read(start, stop).view(torch.uint8)):
                return False
    return True


def _rows(found: Sequence[Facts]) -> list[Row]:
    table: list[dict[str, Any]] = []
    for one in found:
        shape, tokens = one.architecture, one.tokenizer
        row: dict[str, Any] = {"type": shape.model_type, "class": next(iter(shape.classes), None), "head": shape.head}
        for stack in shape.stacks:
            prefix = f"{stack.name} " if stack.name else ""
            row |= {f"{prefix}layers": stack.layers, f"{prefix}width": stack.hidden, f"{prefix}heads": stack.heads}
            row |= {f"{prefix}key-value heads": stack.kv_heads, f"{prefix}feed-forward width": stack.ffn}
        row |= {"vocabulary": shape.vocabulary, "context": shape.context, "positions": shape.positions.kind}
        row |= {"tied": shape.tied, "labels": shape.labels, "parameters": one.size.parameters}
        row |= {"dtypes": ", ".join(one.size.dtypes) or None, "tokenizer": tokens.hash if tokens else None}
        row |= {"licence": ", ".join(one.card.licences) or None}
        table.append(row)
    keys = list(dict.fromkeys(key for row in table for key in row))
    columns = {key: tuple(row.get(key) for row in table) for key in keys}
    return [Row(key, values, len(set(values)) == 1) for key, values in columns.items()]


def _families(n: int, pairs: Sequence[Pair]) -> list[list[int]]:
    """Models connected by measured relation, in order."""
    group = list(range(n))
    for pair in pairs:
        if pair.distance.verdict not in ("unrelated", "unknown"):
            old, new = group[pair.b], group[pair.a]
            group = [new if g == old else g for g in group]
    return [[i for i in range(n) if group[i] == g] for g in dict.fromkeys(group)]


class _Judge:
    """Looks for the first obstacle to each operation."""

    def __init__(
        self, models: Sequence[Model], base: Model | None, pairs: Sequence[Pair], scans: Sequence[Scan | None]
    ) -> None:
        self._models, self._base, self._pairs, self._scans = models, base, pairs, scans
        self._to_base = [_pair([base, m], 0, 1) for m in models] if base is not None else []

    def verdict(self, name: str) -> Operation:
        found = next(self._obstacles(name), None)
        if found is not None:
            return Operation(name, False, found.code, found.reason, found.fix)
        if all(pair.identical for pair in self._pairs):
            return Operation(name, True, "", "the models are identical, so the result is the same model", "")
        return Operation(name, True, "", _WHY[name], "")

    def _obstacles(self, name: str) -> Iterator[Obstacle]:
        n = len(self._models)
        if name in ("slerp", "layer_swap") and n != 2:
            yield Obstacle("RG305", f"{name} takes 2 models, not {n}", "choose two, or merge in several steps")
        if name in ("layer_swap", "passthrough"):
            yield from self._unknown_layers(single=name == "passthrough")
        for pair in self._pairs:
            yield from self._between(name, self._models[pair.a], self._models[pair.b], pair)
        for model, scan in zip(self._models, self._scans, strict=True):
            yield from of_values(model, scan)
        if name not in _WITH_BASE:
            return
        if self._base is None:
            yield Obstacle("RG304", f"{name} needs the base that the models come from", "name it as the base")
        for model, pair in zip(self._models, self._to_base, strict=False):
            assert self._base is not None
            if pair.identical:
                reason = f"{model.name} is identical to the base {self._base.name}, so it adds nothing"
                yield Obstacle("RG305", reason, "leave it out")
            yield from self._between(name, self._base, model, pair)

    def _unknown_layers(self, *, single: bool) -> Iterator[Obstacle]:
        for model in self._models:
            stacks = model.layout.stacks
            if not stacks or (single and (len(stacks) != 1 or not model.layout.layer_count_key)):
                kind = model.checkpoint.model_type or model.name
                have = "no known layers" if not stacks else f"{len(stacks)} stacks of layers: {', '.join(stacks)}"
                yield Obstacle("RG208", f"{kind} has {have}", "merge whole models instead")

    @staticmethod
    def _between(name: str, a: Model, b: Model, pair: Pair) -> Iterator[Obstacle]:
        stacked = name == "passthrough"
        depth = [o for o in of_architecture(a, b) if not stacked or a.checkpoint.model_type != b.checkpoint.model_type]
        yield from depth
        yield from of_layers(a, b) if stacked else of_tensors(a, b)
        yield from of_vocabulary(a, b)
        yield from of_config(a, b, pair.config, ignore=_outside_keys(a, b) if stacked else frozenset())
        yield from of_origin(a, b, pair.distance)


def _outside_keys(a: Model, b: Model) -> frozenset[str]:
    """Keys that say nothing about a single layer, and may differ between models whose layers are stacked."""
    keys = {key.rpartition(".")[2] for key in a.layout.layer_count_key.values()} | {"layer_types"}
    mine, theirs = a.find(a.layout.tokens), b.find(b.layout.tokens)
    if mine is not None and theirs is not None and mine.shape[0] != theirs.shape[0]:
        keys.add("vocab_size")  # each goes with its own embedding; where those agree, one of the two is wrong
    return frozenset(keys)


_WHY: Mapping[str, str] = {
    "linear": "same tensors, configuration and tokenizer, and a common start",
    "slerp": "two models with the same tensors and a common start",
    "task_arithmetic": "all models are fine-tunes of this base; this holds for ties, dare and their relatives too",
    "model_stock": "all models are fine-tunes of this base",
    "layer_swap": "two models with the same layers and a common start",
    "passthrough": "layers of one shape, which can be stacked in any order",
}
