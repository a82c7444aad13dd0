"""DARE with task arithmetic: drop entries of each task vector at random, rescale the rest, add them to the base.

    δ̂ᵢ = mask · δᵢ / density,   mask ~ Bernoulli(density) per entry;   θ = θ₀ + λ Σ wᵢ δ̂ᵢ

Use it before summing several fine-tunes whose changes are small (|δ| mostly below 0.002: light instruction tuning):
there 90 % and more can be dropped without loss. It is not expected to work after continued pre-training, whose changes
are ten times larger; `regraft inspect` measures that.

Draws are counter-based: keyed by seed, model, tensor and entry, so that the same recipe gives the same bits on any
machine and for any number of workers. `rescale: l1` is mergekit's estimator (restore the tensor's L1 norm): the same in
the limit of large tensors, biased for biases and norms. In a mergekit recipe `rescale: true` means that, `density` is 1
by default and `weight` must be given; its own draws cannot be reproduced, as they depend on the order of tasks.
"""

from __future__ import annotations

from regraft.merge.consensus import onto_base, total
from regraft.merge.dare import DareOptions, dare_rule, rescaled, sparse_before
from regraft.merge.rule import Steps, Unit


@dare_rule(
    summary="drop task-vector entries at random and rescale, then sum",
    options=DareOptions,
)
def dare_linear(unit: Unit[DareOptions]) -> Steps:
    sparse = yield from rescaled(unit)
    return onto_base(sparse, total, sparse_before(unit))
