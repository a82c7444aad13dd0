"""Drop And REscale (arXiv:2311.03099): the step and the registration that the DARE rules share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from regraft.merge.consensus import Density, TaskVectorOptions
from regraft.merge.rule import REQUIRED, PerModel, Unit, rule
from regraft.merge.sparsify import Stage, drawn, norms_restored
from regraft.methods import Paper

_DARE = Paper(
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "Yu, Yu, Yu, Huang, Li",
    "ICML 2024",
    "2311.03099",
    60,
)
dare_rule = partial(
    rule,
    needs_base=True,
    compiled=lambda _: True,
    papers=[_DARE],
    mergekit_defaults={"weight": REQUIRED, "density": 1.0, "rescale": "l1"},
    mergekit_values={"rescale": {True: "l1", False: "none"}},
)


def _spelt(value: Any) -> Any:
    return {True: "density", False: "none"}[value] if isinstance(value, bool) else value


class DareOptions(TaskVectorOptions):
    density: PerModel[Density] = Field(
        (0.1,), description="probability that an entry is kept (1 - drop rate), in (0, 1]"
    )
    normalize: bool = Field(False, description="divide by the sum of the weights that take part")
    rescale: Annotated[Literal["density", "l1", "none"], BeforeValidator(_spelt)] = Field(
        "density", description="what makes up for dropped entries: divide by the density, restore the L1 norm, nothing"
    )
    seed: int = Field(0, ge=0, description="seed of the draws")
    int8_mask: bool = Field(False, description="mergekit's saving of memory; has no effect here, masks are never kept")


def rescaled(unit: Unit[DareOptions]) -> Stage:
    """Task vectors with entries dropped at random and the rest scaled up."""
    o = unit.options
    factors = [1 / d for d in o.density] if o.rescale == "density" else [1.0] * unit.n
    sparse = drawn(unit, o.density, factors, o.seed)
    return (yield from norms_restored(unit, sparse)) if o.rescale == "l1" else sparse


def sparse_before(unit: Unit[DareOptions]) -> Callable[[np.ndarray, int], None]:
    """Warn of task vectors that were sparse before, counted in the last pass. Those of frozen tensors do not count."""
    lock = threading.Lock()
    zeros, seen = np.zeros(unit.n, np.int64), 0

    def count(found: np.ndarray, length: int) -> None:
        nonlocal zeros, seen
        with lock:
            zeros, seen = zeros + found, seen + length
            if seen == unit.numel:
                for i in np.flatnonzero((2 * zeros > seen) & (zeros < seen)).tolist():
                    if unit.options.density[i] < 1:
                        unit.warn(
                            f"model {i + 1} does not differ from the base in more than half of the entries of some"
                            " tensors, as after an earlier drop; dare drops from the rest"
                        )

    return count
