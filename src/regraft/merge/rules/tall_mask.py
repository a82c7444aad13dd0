"""TALL masks: give each task back from one merged task vector and a mask.

    τ  = Σ wᵢ δᵢ                          merge, as task arithmetic
    mₜ = 1 where |δₜ| > λₜ |τ − δₜ|        mask, per task: where the fine-tune is far from the base, and near the merge
    θ  = θ₀ + λ mₜ τ

Use it when the task of an input is known when the model is chosen: with `task` the result is that task's model as
τ gives it back. What a task needs beside the base and τ is one bit per entry; `sweep: {task: [maths, code]}` writes
one model for each. Without `task` no mask is applied, and the result is what all of them apply to, the model of
`task_arithmetic`. For one model that does all tasks, see `consensus_task_arithmetic`.

The larger `tall_mask_lambda` (λₜ), the fewer entries a mask has. The paper chooses it for each task among 0.2, 0.3,
0.4, 0.5 and 0.6 by validation data, so sweep it; the default is the middle, FusionBench's is 0.6. Masks are of the
unscaled sum, and `lambda` multiplies afterwards (the official code has no such factor here). One model comes back.
Masks are those of the paper and the official code; FusionBench takes the task vector from the base's weights where
these take the fine-tune. `weight` is not the paper's.
"""

from __future__ import annotations

from regraft.merge.rule import Combine, Unit
from regraft.merge.tall import TaskMaskOptions, of_task, summed, tall_rule


@tall_rule(
    summary="one merged task vector, from which a mask per task gives each model back",
    options=TaskMaskOptions,
)
def tall_mask(unit: Unit[TaskMaskOptions]) -> Combine:
    return of_task(summed)
