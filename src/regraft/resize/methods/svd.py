"""Linear layers become low-rank by a singular value decomposition, and nothing is trained.

    W (O x I)  ~  B A,   A (r x I),  B (O x r),   singular values split evenly between the two

The rank of a layer follows from `ratio` (r = floor(O I / (ratio (O + I))), so that its matrix keeps 1/ratio of its
entries), from `energy` (the share of squared singular values kept), from `target_parameters` (one ratio for all layers
is solved for), or is given. `init: whitened` makes the factors best for the outputs on data instead of for the weights
(SVD-LLM, arXiv 2403.07378), which at equal rank is nearly always better and needs a few hundred examples.

Use it as a baseline, or where there is no data to train on; with data, `pela` comes next to the original.
"""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import Field

from regraft.errors import UserError
from regraft.resize import cost
from regraft.resize.factorise import LowRankOptions, factorise
from regraft.resize.surgery import load
from regraft.resize.whitening import WhiteningOptions, collated, moments_for
from regraft.train.batches import DataOptions, batches_for
from regraft.train.data import opened
from regraft.train.making import Made, Work, chosen, maker
from regraft.train.objective import Batch


class SvdOptions(LowRankOptions, DataOptions, WhiteningOptions):
    """Options of svd."""

    calibration_batch: int = Field(16, ge=1, description="rows per pass")


@maker(
    room="compress", summary="low-rank layers by singular value decomposition, without training", options=SvdOptions,
    data="optional", same_tensors=lambda options: False,
)  # fmt: skip
def svd(work: Work[SvdOptions]) -> Made:
    """Raises RG601 if whitening has no data."""
    o = work.options
    if o.init == "whitened" and work.data is None:
        raise UserError("RG601", "whitening needs data", fix="add data: ..., or set init to svd")
    model = load(work.models["model"])
    moments = None
    batch: Batch | None = None
    if work.data is not None:
        rows = opened(work.data, o)
        examples = list(itertools.islice(iter(rows), o.calibration_rows))
        collate = batches_for(model, work.models["model"], examples[0], chosen(o, DataOptions), data=work.data).collate
        batches = collated(collate, examples, o.calibration_batch)
        batch = batches[0]
        if o.init == "whitened":
            moments = moments_for(model, batches, chosen(o, LowRankOptions))
    made = factorise(
        model, chosen(o, LowRankOptions), moments=moments, on_progress=lambda done, n: work.tell(done, n, {})
    )
    work.message(made.in_words())
    diagnostics: dict[str, Any] = {"low_rank": made.to_dict()}
    if batch is not None:
        measured = cost.compared(load(work.models["model"]), model, batch)
        diagnostics |= cost.summary(measured) | {"cost": measured}
    return Made(model.eval(), diagnostics, made.warnings)
