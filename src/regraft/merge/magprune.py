"""Drop by magnitude (MagPrune, arXiv:2406.11617): the step and the registration that the DELLA rules share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from regraft.merge.consensus import Density, TaskVectorOptions
from regraft.merge.rule import REQUIRED, PerModel, Unit, rule
from regraft.merge.sparsify import Stage, norms_restored, ranked
from regraft.methods import Paper

if TYPE_CHECKING:
    from typing_extensions import Self

_DELLA = Paper(
    "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    "Deep, Bhardwaj, Poria",
    "2024",
    "2406.11617",
)
della_rule = partial(
    rule,
    needs_base=True,
    compiled=lambda _: True,
    span=lambda _: "rows",
    papers=[_DELLA],
    mergekit_defaults={"weight": REQUIRED, "density": 1.0, "rescale": "l1"},
    mergekit_values={"rescale": {True: "l1", False: "none"}},
)


def _spelt(value: object) -> object:
    return {True: "probability", False: "none"}[value] if isinstance(value, bool) else value


class DellaOptions(TaskVectorOptions):
    density: PerModel[Density] = Field((0.5,), description="mean probability that an entry is kept, in (0, 1]")
    epsilon: PerModel[Annotated[float, Field(ge=0, lt=0.5)]] = Field(
        (0.15,), description="how far the probability of the smallest and the largest entry of a row is from the mean"
    )
    rescale: Annotated[Literal["probability", "l1", "none"], BeforeValidator(_spelt)] = Field(
        "probability",
        description="what makes up for dropped entries: divide each by its probability, restore the L1 norm, nothing",
    )
    seed: int = Field(0, ge=0, description="seed of the draws")
    int8_mask: bool = Field(False, description="mergekit's saving of memory; has no effect here, masks are never kept")

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        spread = self.epsilon * len(self.density) if len(self.epsilon) == 1 else self.epsilon
        means = self.density * len(spread) if len(self.density) == 1 else self.density
        for density, epsilon in zip(means, spread, strict=True):
            if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise ValueError(f"density {density} and epsilon {epsilon} give probabilities outside (0, 1)")
        return self


def dropped(unit: Unit[Any]) -> Stage:
    """Task vectors with entries dropped at random, the smaller of each row more often, and made up for."""
    o: DellaOptions = unit.options
    sparse = ranked(unit, o.density, o.epsilon, o.seed, divide=o.rescale == "probability")
    if o.rescale == "l1":
        sparse = yield from norms_restored(unit, sparse)
    return sparse
