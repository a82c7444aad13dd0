"""Which example comes when: a function of (seed, epoch) alone, so that any point of a run can be entered directly.

All epochs of a run are one sequence of batches. Processes take its batches in turn, each its own, so that two processes
see what one process with twice the batch would see, where batches fill the epoch; a run that goes on begins in the
midst of it and reads nothing of what lies before (a stream has to be read over, and is).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset, IterableDataset

from regraft.errors import UserError

Example: TypeAlias = "Mapping[str, Any]"


def example_seed(seed: int, epoch: int, number: int) -> int:
    """What an example draws from: 63 bits of a hash, so that neighbouring numbers share nothing."""
    digest = hashlib.blake2b(f"{seed} {epoch} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int) -> torch.Generator:
    """A source of random numbers for one example."""
    return torch.Generator().manual_seed(seed)


@dataclass
class Order:
    """The batches of a run over data with a length; iterating gives those of one process from `start` on.

    Attributes:
        length: examples in the data.
        batch: examples in a batch.
        batches: batches of the whole run, for all processes together.
        start: the first batch (of this process) to give.
    """

    length: int
    batch: int
    batches: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    rank: int = 0
    world: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.per_epoch == 0:
            what = f"{self.length} examples do not fill a batch of {self.batch}"
            raise UserError("RG601", what, fix="make the batch smaller, or set drop_last to false")

    @property
    def per_epoch(self) -> int:
        return self.length // self.batch if self.drop_last else math.ceil(self.length / self.batch)

    def __len__(self) -> int:
        return self.batches // self.world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (epoch, number of the example)."""
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for position in range(self.start * self.world + self.rank, self.batches, self.world):
            if position // self.per_epoch != epoch:
                epoch = position // self.per_epoch
                order = self.permutation(epoch)
            first = position % self.per_epoch * self.batch
            yield [(epoch, int(i)) for i in order[first : first + self.batch]]

    def permutation(self, epoch: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        return torch.randperm(self.length, generator=generator(example_seed(self.seed, epoch, -1)))


class Keyed(Dataset[tuple[int, Example]]):
    """Data with a length; an item is (what it draws from, the example)."""

    def __init__(self, data: Sequence[Example], seed: int) -> None:
        self._data, self._seed = data, seed

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, Example]:
        epoch, number = place
        return example_seed(self._seed, epoch, number), self._data[number]


class Stream(IterableDataset[tuple[int, Example]]):
    """Data without a length, in its own order, begun again when it ends; batches are dealt to processes in turn.

    Args:
        data: gives the same examples each time it is iterated.
        skip: batches of this process that were taken before.
    """

    def __init__(self, data: Iterable[Example], seed: int, batch: int, *, rank: int = 0, world: int = 1, skip: int = 0):
        self._data, self._seed, self._batch = data, seed, batch
        self._rank, self._world, self._skip = rank, world, skip

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        worker = torch.utils.data.get_worker_info()
        parts, part = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        position = 0
        for epoch in itertools.count():
            empty = True
            for number, example in enumerate(self._data):
                empty = False
                batch = position // self._batch
                own = batch // self._world - self._skip
                # Workers take whole batches in turn, as the loader asks them for batches in turn.
                if batch % self._world == self._rank and own >= 0 and own % parts == part:
                    yield example_seed(self._seed, epoch, number), example
                position += 1
            if empty:
                raise UserError("RG601", "the stream holds no examples", fix="check the data")
