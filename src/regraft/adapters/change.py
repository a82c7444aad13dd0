"""What became of the change of a tensor on its way into an adapter, and how much of it is kept."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from regraft.adapters.factors import Factors, residual, square

if TYPE_CHECKING:
    from torch import Tensor

LOW_RANK, SAVED, LEFT_OUT = "low rank", "saved", "left out"


@dataclass(frozen=True)
class Change:
    """What became of the change of a tensor.

    Attributes:
        name: of the parameter in the loaded model.
        kind: "low rank", "saved" or "left out".
        rank: of its factors, None if it has none.
        norm: ‖delta‖.
        error: ‖delta - B A‖ / ‖delta‖.
    """

    name: str
    kind: str
    rank: int | None
    norm: float
    error: float

    @property
    def energy(self) -> float:
        """The share of ‖delta‖² that is kept."""
        return 1 - self.error**2

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the energy."""
        return asdict(self) | {"energy": self.energy}


def measured(name: str, matrix: Tensor, stored: Factors) -> Change:
    """What factors make of a change."""
    norm = math.sqrt(square(matrix))
    return Change(name, LOW_RANK, stored.rank, norm, math.sqrt(residual(matrix, stored)) / norm)


def total_error(changes: Collection[Change]) -> float:
    """The relative error of all changes together; 0 if nothing changed."""
    lost = math.fsum((change.norm * change.error) ** 2 for change in changes)
    all_of_it = math.fsum(change.norm**2 for change in changes)
    return math.sqrt(lost / all_of_it) if all_of_it else 0.0
