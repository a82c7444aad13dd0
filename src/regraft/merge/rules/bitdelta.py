"""BitDelta as a merge: one bit per entry and one scale per tensor stand for each task vector, and are summed.

    sᵢ = mean |δᵢ|,   δ̂ᵢ = +sᵢ where δᵢ > 0, −sᵢ elsewhere        per tensor of two axes or more
    θ  = θ₀ + λ Σ wᵢ δ̂ᵢ

Use it to see what is left of fine-tunes, or of their sum, when each is stored by its signs: the result is that of
`task_arithmetic` on deltas of the kind `bits` (`regraft delta extract --kind bits`), without storing them. sᵢ is the
scale nearest to the task vector in least squares. Tensors of one axis (biases, norms) take part as they are.

The paper then trains the scales on text, so that the outputs are those of the fine-tune (scale distillation). That
needs data and is not done here: this is where that training starts. An entry that did not change moves down by sᵢ, as
one bit has no third value (the official code moves it up); a tensor that did not change at all stays. The official code
leaves embeddings and head as the fine-tune has them, here they are matrices like others. `weight` and sums of several
models are not the paper's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.checkpoint.onebit import rises, stepped, takes_bits
from regraft.merge.consensus import TaskVectorOptions, added, blended, changed
from regraft.merge.rule import Chunk, Steps, Unit, rule
from regraft.merge.statistics import Sum, task_vectors
from regraft.methods import Paper

if TYPE_CHECKING:
    from torch import Tensor


@rule(
    summary="sum the signs of task vectors, each times its mean size",
    options=TaskVectorOptions,
    needs_base=True,
    in_mergekit=False,
    papers=[Paper("BitDelta: Your Fine-Tune May Only Be Worth One Bit", "Liu et al.", "NeurIPS 2024", "2402.10193")],
)
def bitdelta(unit: Unit[TaskVectorOptions]) -> Steps:
    factors = [unit.options.lambda_ * weight for weight in unit.options.weight]
    if not takes_bits(unit.infos[0].shape):
        return blended(factors, has_base=True)
    (sizes,) = yield [Sum(task_vectors, absolute=True)]
    scales = (sizes / unit.numel).tolist()
    unit.note(scales=scales)
    steps = [factor * scale for factor, scale in zip(factors, scales, strict=True)]

    def combine(c: Chunk[TaskVectorOptions]) -> Tensor:
        return changed(c.base, added(stepped(rises(c.deltas), c.per_model(steps))))

    return combine
