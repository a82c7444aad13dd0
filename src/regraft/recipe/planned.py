"""Checkpoints that an earlier step of the recipe will write: known by their headers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.checkpoint import Checkpoint
from regraft.checkpoint.dtypes import DTYPES
from regraft.checkpoint.writer import TensorSpec

if TYPE_CHECKING:
    import torch


class PlannedTensor:
    """A tensor that an earlier step will write; known by header only."""

    def __init__(self, spec: TensorSpec) -> None:
        self.name, self.shape, self.stored = spec.name, spec.shape, spec.dtype

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored]

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        raise RuntimeError(f"{self.name} belongs to a step that has not run yet")


@dataclass(frozen=True, eq=False)
class PlannedCheckpoint(Checkpoint):
    """The output of an earlier step before it has run.

    `tokenizer_json`: the text of that file where the step makes one; None where `files` has it.
    """

    key: str = ""
    tokenizer_json: str | None = None

    def digest(self) -> str:
        return self.key
