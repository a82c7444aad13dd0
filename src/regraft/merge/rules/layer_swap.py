"""Layer swapping: outer layers from a language expert, inner layers from a task expert.

The models are, in this order, the task expert (for example mathematics, tuned in English) and the language expert
(instructions in the target language), fine-tuned from one base. Layers below `bottom` and the last `top` layers come
whole from the language expert, `transition_bottom` and `transition_top` layers next to them are averages of the two,
all others come whole from the task expert. Tensors outside the layers (embedding, final norm, head) are averaged.

Use it to give a task skill to a language for which there is no data of that task. Both experts should be lightly tuned.
The paper found many settings about equally good; its default for 32 layers, 5 at the bottom and 2 at the top with one
transition layer each, is scaled to other depths, at least one layer each. In an encoder-decoder each stack is swapped
on its own.

Whole layers are copied bit for bit, and the other expert's are not read. `match_magnitude` brings the two task
vectors to equal mean magnitude before they are averaged, so that the expert with larger updates does not dominate; it
needs a base and is not the paper's default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from regraft.errors import UserError
from regraft.merge.consensus import added, changed
from regraft.merge.rule import Chunk, Copy, Steps, Unit, rule
from regraft.merge.statistics import Sum
from regraft.methods import Options, Paper

if TYPE_CHECKING:
    from torch import Tensor

_TASK, _LANGUAGE = 0, 1


class LayerSwapOptions(Options):
    bottom: int | None = Field(None, ge=0, description="first layers from the language expert; 5 of 32 by default")
    top: int | None = Field(None, ge=0, description="last layers from the language expert; 2 of 32 by default")
    transition_bottom: int = Field(1, ge=0, description="averaged layers above the bottom ones")
    transition_top: int = Field(1, ge=0, description="averaged layers below the top ones")
    transition_weight: float = Field(0.5, ge=0, le=1, description="share of the language expert in averages")
    outside: Literal["average", "language", "task", "base"] = Field(
        "average", description="where embedding, final norm and head come from"
    )
    match_magnitude: bool = Field(False, description="bring the task vectors to equal mean magnitude before averaging")


@rule(
    summary="outer layers of a language expert around inner layers of a task expert",
    options=LayerSwapOptions,
    min_models=2,
    max_models=2,
    takes_base=True,
    in_mergekit=False,
    papers=[
        Paper(
            "Layer Swapping for Zero-Shot Cross-Lingual Transfer in Large Language Models",
            "Bandarkar et al.",
            "ICLR 2025",
            "2410.01335",
            51,
        )
    ],
)
def layer_swap(unit: Unit[LayerSwapOptions]) -> Steps:
    share = _language_share(unit)
    if share is None:
        return lambda c: c.base.clone()
    if share in (0, 1):
        return Copy(_LANGUAGE if share else _TASK)
    factors = [1.0, 1.0]
    if unit.options.match_magnitude:
        (sums,) = yield [Sum(lambda c: c.deltas, absolute=True)]
        mean = float(sums.mean())
        factors = [mean / float(s) if s > 0 else 1.0 for s in sums]
        unit.note(magnitude_factors=factors)

    def combine(c: Chunk[LayerSwapOptions]) -> Tensor:
        if unit.options.match_magnitude:
            scaled = c.deltas * c.per_model([(1 - share) * factors[_TASK], share * factors[_LANGUAGE]])
            return changed(c.base, added(scaled))
        return changed(c.models[_TASK], share * (c.models[_LANGUAGE] - c.models[_TASK]))

    return combine


def _language_share(unit: Unit[LayerSwapOptions]) -> float | None:
    """Share of the language expert in this tensor, None if it is the base's."""
    (info,), o = unit.infos, unit.options
    if not unit.has_base and (o.match_magnitude or o.outside == "base"):
        option = "match_magnitude" if o.match_magnitude else "outside: base"
        raise UserError(
            "RG304", f"layer_swap with {option} needs a base model", fix="name the base, or change the option"
        )
    depth = info.num_layers
    if depth is None:
        fix = "use a model of a known family, or stack layers with passthrough slices"
        raise UserError("RG208", f"layer_swap does not know in which layer {info.name} is", fix=fix)
    bottom = max(1, round(5 * depth / 32)) if o.bottom is None else o.bottom
    top = max(1, round(2 * depth / 32)) if o.top is None else o.top
    asked = bottom + top + o.transition_bottom + o.transition_top
    if asked > depth:
        parts = f"bottom {bottom} + top {top} + transitions {o.transition_bottom} and {o.transition_top}"
        raise UserError("RG303", f"{parts} are more than the {depth} layers of the model", fix="choose smaller numbers")
    if info.layer is None:
        return {"average": o.transition_weight, "language": 1.0, "task": 0.0, "base": None}[o.outside]
    if info.layer < bottom or info.layer >= depth - top:
        return 1.0
    if info.layer < bottom + o.transition_bottom or info.layer >= depth - top - o.transition_top:
        return o.transition_weight
    return 0.0
