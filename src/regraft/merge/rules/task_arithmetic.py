"""Add task vectors to the base: each model's difference to the base, weighted and summed.

    θ = θ₀ + λ Σ wᵢ (θᵢ − θ₀)

Use it to give one base several skills, to add an instruction vector to a domain model without instruction data
(arXiv:2409.19854: both weights 1), or to remove a skill by a negative weight. With many task vectors the sum
overshoots: λ of 0.3 to 0.4 is usual then, best chosen on validation data by a sweep.

Differences are formed in float32 or better. If λ w is exactly 1 for one model, the sum starts from that model instead
of the base: the same number with one rounding less, so that a single model with weight 1 comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from regraft.merge.consensus import ABOUT_ZERO, Sparse, TaskVectorOptions, blended, onto_base, total
from regraft.merge.kernels import mixture
from regraft.merge.rule import REQUIRED, Combine, Copy, Unit, rule
from regraft.methods import Paper


class TaskArithmeticOptions(TaskVectorOptions):
    normalize: bool = Field(False, description="divide the sum of task vectors by the sum of the weights")


def _combination(options: TaskArithmeticOptions) -> Sequence[float]:
    total = sum(options.weight)
    divisor = total if options.normalize and abs(total) >= ABOUT_ZERO else 1.0
    return [options.lambda_ * weight / divisor for weight in options.weight]


@rule(
    summary="base plus weighted sum of task vectors",
    options=TaskArithmeticOptions,
    needs_base=True,
    papers=[
        Paper("Editing Models with Task Arithmetic", "Ilharco et al.", "ICLR 2023", "2212.04089"),
        Paper(
            "The Construction of Instruction-tuned LLMs for Finance without Instruction Data Using Continual"
            " Pretraining and Model Merging",
            "Hirano, Imajo",
            "2024",
            "2409.19854",
            18,
        ),
    ],
    compiled=lambda _: True,
    combination=_combination,
    mergekit_defaults={"weight": REQUIRED},
)
def task_arithmetic(unit: Unit[TaskArithmeticOptions]) -> Combine | Copy:
    o = unit.options
    factors = [o.lambda_ * w for w in o.weight]
    whole = next((i for i, f in enumerate(factors) if f == 1), None)
    if whole is None and o.lambda_ == 1 and not o.normalize:
        return blended(o.weight, has_base=True)
    if o.normalize or whole is None:
        return onto_base(Sparse(unit.n), total)
    others = [f if i != whole else 0.0 for i, f in enumerate(factors)]
    if not any(others):
        return Copy(whole)

    return lambda c: mixture(c, others, whole, of_changes=True)
