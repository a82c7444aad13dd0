"""A few values of the base, kept in the delta, so that another base can be told how far it is from the right one.

From every weight matrix 256 values are taken in four pieces of neighbours, always the same ones: a kilobyte at most per
tensor, with which `relative_distance` answers as it does for whole models. For strangers the cosine of one matrix is
then off by 0.06, and the median that it goes by is nearer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from regraft.checkpoint.distance import Distance, relative_distance
from regraft.checkpoint.model import Checkpoint
from regraft.checkpoint.shards import TensorSpec
from regraft.checkpoint.tensor import MemoryTensor, TensorSource, numel, stored_dtype

_PIECES = 4
_LENGTH = 64


def sketched(sources: Iterable[TensorSource]) -> list[TensorSource]:
    """Those of the tensors of which values are kept."""
    return [source for source in sources if source.dtype.is_floating_point and len(source.shape) > 1 and numel(source)]


def spec(source: TensorSource) -> TensorSpec:
    """What the values are stored as."""
    return TensorSpec(f"sketch/{source.name}", (1, min(numel(source), _PIECES * _LENGTH)), stored_dtype(source))


def sketch(source: TensorSource) -> torch.Tensor:
    """The values of a tensor that are kept, in one row."""
    count = numel(source)
    if count <= _PIECES * _LENGTH:
        return source.read()
    gap = (count - _LENGTH) // (_PIECES - 1)
    return torch.cat([source.read(i * gap, i * gap + _LENGTH) for i in range(_PIECES)])


def is_own(parts: Mapping[str, TensorSource], base: Checkpoint) -> bool:
    """Whether a base has the values, bit for bit, that the sketch in `parts` was taken from."""
    own = {f"sketch/{source.name}": source for source in sketched(base.tensors.values())}
    if {name for name in parts if name.startswith("sketch/")} != own.keys():
        return False
    return all(_same(parts[name], sketch(source)) for name, source in own.items())


def _same(stored: TensorSource, values: torch.Tensor) -> bool:
    if stored.dtype != values.dtype or numel(stored) != values.numel():
        return False
    return torch.equal(stored.read().view(torch.uint8), values.contiguous().view(torch.uint8))


def distance_to_own(parts: Mapping[str, TensorSource], base: Checkpoint) -> Distance:
    """How far a base is from the one that the sketch in `parts` was taken from."""
    own: dict[str, TensorSource] = {}
    given: dict[str, TensorSource] = {}
    for source in sketched(base.tensors.values()):
        stored = parts.get(f"sketch/{source.name}")
        if stored is not None and stored.shape == spec(source).shape and stored.dtype.is_floating_point:
            own[source.name] = stored
            given[source.name] = MemoryTensor(source.name, sketch(source).view(1, -1))
    return relative_distance(dataclasses.replace(base, tensors=own), dataclasses.replace(base, tensors=given))
