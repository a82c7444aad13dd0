"""Adapters of one base merged into one adapter, without a model of the size of the base.

Where the rule adds task vectors with fixed factors, the sum of products is again a product: A and B of all adapters
side by side, or the sum of the B where the A are one. That is exact, and its rank is the sum of the ranks. Every other
rule (and DoRA, and IA3) changes the sum entry by entry, which no small product does: its result is computed tensor by
tensor, compared to the base and decomposed, if the user gives a rank or an energy. Modules that an adapter saved whole,
and biases, are merged as such.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from regraft.adapters.change import LOW_RANK, Change
from regraft.adapters.extract import ALL, Extraction, Wanted
from regraft.adapters.factors import Factors, Truncation, added, recompress, size
from regraft.adapters.folder import Adapter
from regraft.adapters.skeleton import EMBEDDING, TRANSPOSED, Parameter
from regraft.checkpoint import Checkpoint, TensorSource
from regraft.checkpoint.dtypes import DTYPES, array_dtype, as_tensor
from regraft.checkpoint.job_folder import JobFolder
from regraft.checkpoint.lora import LoraTensor, Renamed, products
from regraft.errors import UserError
from regraft.merge.engine import run_jobs
from regraft.merge.jobs import Job

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Computing:
    """How merged tensors are computed: see `run_jobs`."""

    workers: int | None = None
    device: str = "cpu"
    allow_nan: bool = False


class _Results:
    """Computes tensors when they are read, and keeps the last one, which is read in pieces."""

    def __init__(self, how: Computing) -> None:
        self._how = how
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._values = torch.empty(0)
        self.warnings: list[str] = []

    def of(self, job: Job) -> Tensor:
        with self._lock:
            if self._job is not job:
                values = np.empty(job.info.numel, array_dtype(job.out_dtype))

                def write(name: str, start: int, piece: np.ndarray) -> None:
                    values[start : start + len(piece)] = piece

                how = self._how
                outcome = run_jobs([job], write, workers=how.workers, device=how.device, allow_nan=how.allow_nan)
                self.warnings += [one for one in outcome.warnings if one not in self.warnings]
                self._job, self._values = job, as_tensor(values, job.out_dtype)
            return self._values


class MergedTensor:
    """A tensor of the merged model that adapters have changed, not rounded to the dtype of the base."""

    def __init__(self, job: Job, results: _Results) -> None:
        models = tuple(m.unrounded() if isinstance(m, LoraTensor) else m for m in job.models)
        self._job = replace(job, models=models, out_dtype=job.arithmetic)
        self.name, self.shape, self.dtype = job.info.name, job.info.shape, DTYPES[job.arithmetic]
        self._results = results
        self.replaced = any(isinstance(model, Renamed) for model in job.models)
        self._found = [products(model) for model in job.models]
        self._weights = _weights(job)

    @property
    def exact(self) -> bool:
        """Whether it is the base plus a sum of products."""
        return self._weights is not None and None not in self._found

    @property
    def rank(self) -> int:
        """Of the sum of products, at most."""
        return sum(one.rank for found in self._found for one in found or ())

    def change(self, *, turned: bool) -> Factors | None:
        """That sum as one product; None if it is zero. `turned`: the tensor is the transpose of the product."""
        parts: list[tuple[float, Factors]] = []
        for weight, found in zip(self._weights or (), self._found, strict=True):
            for one in found or ():
                scaling, up, down = one.product()
                factors = Factors(up, down)
                parts.append((weight * scaling, factors if one.transposed == turned else factors.turned))
        return added(parts)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `[start, stop)`; see `TensorSource.read`."""
        return self._results.of(self._job)[start:stop]


class Combination(Extraction):
    """Adapters on their way into one: checked here, computed by `run`.

    Args:
        base: the model that all of them are for.
        template: gives the configuration of the merged model.
        jobs: the merge, as of whole models, whose sources are those of models with adapters.
        cut: where the result is cut off; None if it must be exact.
        dtype: of the factors, float32 if None.
        how: see there.
        where: the step, for messages.

    Raises:
        UserError: RG309 for a merge that is not exact without `cut`, and what `Extraction` raises.
    """

    def __init__(
        self,
        base: Checkpoint,
        template: Checkpoint,
        jobs: Sequence[Job],
        cut: Truncation | None,
        *,
        dtype: torch.dtype | None = None,
        how: Computing = Computing(),
        where: str = "",
    ) -> None:
        self._cut, self._results = cut, _Results(how)
        tensors = {job.info.name: self._merged(job, base.tensors) for job in jobs}
        merged = Checkpoint("the merge", base.path, tensors, dict(template.aliases), template.config)
        wanted = Wanted(cut or Truncation(), save=[ALL], embeddings=True, dtype=dtype or torch.float32)
        super().__init__(merged, base, wanted, force=True)
        rough = [] if cut else [p.name for p in self._factored if not self._is_exact(p)]
        if rough:
            more = f" and {len(rough) - 1} more" if len(rough) > 1 else ""
            what = f"the merged change of {rough[0]}{more} is no sum of the adapters' factors"
            fix = "use linear or task_arithmetic on plain LoRA adapters, or give rank or energy to approximate it"
            raise UserError("RG309", what, where=where, fix=fix)

    def run(
        self, on_progress: Callable[[int, int], None] | None = None, job: JobFolder | None = None
    ) -> tuple[Adapter, list[Change]]:
        """As `Extraction.run`; what the merge has to tell is in `remarks` after it."""
        found = super().run(on_progress, job)
        self.remarks += self._results.warnings
        return found

    @property
    def bytes_out(self) -> int:
        """Bytes of the factors at most; what is saved whole is not counted."""
        ranks = [(p, self._largest_rank(p)) for p in self._factored]
        return sum(rank * (p.shape[0] + math.prod(p.shape[1:])) * self.dtype.itemsize for p, rank in ranks)

    def _largest_rank(self, parameter: Parameter) -> int:
        source = self._after[parameter.name]
        if not isinstance(source, MergedTensor):
            return 0
        most = min(parameter.shape[0], math.prod(parameter.shape[1:]))
        return min([most, *([self._cut.most] if self._cut else []), *([source.rank] if source.exact else [])])

    def _merged(self, job: Job, base: Mapping[str, TensorSource]) -> TensorSource:
        if all(products(model) == [] for model in job.models):
            return base.get(job.info.name, job.models[0])
        return MergedTensor(job, self._results)

    def _is_exact(self, parameter: Parameter) -> bool:
        source = self._after[parameter.name]
        return not isinstance(source, MergedTensor) or source.exact

    def _replaced(self, parameter: Parameter) -> bool:
        source = self._after[parameter.name]
        return isinstance(source, MergedTensor) and source.replaced

    def _factors(self, parameter: Parameter) -> tuple[Factors, Change] | None:
        source = self._after[parameter.name]
        if not isinstance(source, MergedTensor):
            return None
        if not source.exact:
            return super()._factors(parameter)
        whole = source.change(turned=parameter.kind in (TRANSPOSED, EMBEDDING))
        norm = size(whole) if whole is not None else 0.0
        if whole is None or not norm:
            return None
        most = min(whole.up.shape[0], whole.down.shape[1])
        cut = self._cut or (Truncation(rank=most) if whole.rank > most else None)
        stored = (recompress(whole, cut) if cut else whole).to(self.dtype)
        return stored, Change(parameter.name, LOW_RANK, stored.rank, norm, size(whole, minus=stored) / norm)


def _weights(job: Job) -> Sequence[float] | None:
    """What each model's change counts for in the result, None if that is not fixed."""
    if job.rule is None:
        return [1.0]
    return job.rule.combination(job.options) if job.rule.combination is not None else None
