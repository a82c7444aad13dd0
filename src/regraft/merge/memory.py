"""Tensors and state dicts in memory as jobs for the engine: `regraft.merge.ties([a, b], base=base)`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regraft.axes import layout
from regraft.checkpoint.dtypes import as_tensor, dtype_name, is_storable
from regraft.checkpoint.tensor import MemoryTensor
from regraft.errors import UserError, UserWarningMessage
from regraft.merge.engine import run_jobs
from regraft.merge.jobs import Job
from regraft.merge.rule import Rule, TensorInfo

if TYPE_CHECKING:
    import numpy as np


def merge_in_memory(
    rule: Rule[Any],
    models: Sequence[Any],
    base: Any = None,
    options: Mapping[str, Any] | None = None,
    *,
    workers: int = 1,
    chunk: int | None = None,
    allow_nan: bool = False,
    device: str = "cpu",
) -> Any:
    """Merge tensors or state dicts that are in memory; see `Rule.__call__`."""
    jobs, outputs = as_jobs(rule, models, base, options or {})

    def write(name: str, start: int, values: np.ndarray) -> None:
        out = outputs[name].view(-1)
        out[start : start + len(values)] = as_tensor(values, dtype_name(out.dtype))

    outcome = run_jobs(jobs, write, workers=workers, chunk=chunk, allow_nan=allow_nan, device=device)
    for warning in outcome.warnings:
        warnings.warn(warning, UserWarningMessage, stacklevel=3)
    return outputs if isinstance(models[0], Mapping) else outputs["tensor"]


def as_jobs(
    rule: Rule[Any], models: Sequence[Any], base: Any, options: Mapping[str, Any]
) -> tuple[list[Job], dict[str, Tensor]]:
    """Jobs and the tensors that they fill, by name (one named "tensor" if the models are tensors).

    The template (the base, else the first model) decides names and dtypes; integer and bool tensors are its own.

    Raises:
        UserError: RG109 for a dtype that no checkpoint can hold; RG304 without the base that the rule needs; RG201,
            RG202 for shapes and names that differ; RG302, RG303, RG305 for options and counts.
    """
    if not models:
        rule.check_count(0)
    if rule.needs_base and base is None:
        raise UserError("RG304", f"{rule.name} needs the base model that the others come from", fix="pass base=...")
    resolved = rule.resolve(len(models), options)
    dicts = [_as_dict(m) for m in models]
    base_dict = _as_dict(base) if base is not None else None
    template = base_dict if base_dict is not None else dicts[0]
    _check_names([*dicts, template])
    places = layout({}, template)
    jobs, outputs = [], {}
    labels = (*(f"model {i + 1}" for i in range(len(dicts))), "base")
    for name, reference in template.items():
        for dtype in {tensors[name].dtype for tensors in (template, *dicts)}:
            if not is_storable(dtype):
                what = f"{name} has the dtype {dtype}, which no checkpoint can hold"
                raise UserError("RG109", what, fix="convert it to another one")
        outputs[name] = torch.empty_like(reference, memory_format=torch.contiguous_format)
        sources = tuple(MemoryTensor(name, d[name]) for d in dicts)
        for label, source in zip(labels, sources, strict=False):
            if source.shape != tuple(reference.shape):
                what = f"{name} has shape {source.shape} in {label} and {tuple(reference.shape)} in the template"
                raise UserError("RG201", what, fix="merge models of one architecture and vocabulary")
        info = TensorInfo.of(name, tuple(reference.shape), places)
        if not reference.is_floating_point():
            jobs.append(Job(info, (MemoryTensor(name, reference),), dtype_name(reference.dtype), labels=labels))
            continue
        base_source = MemoryTensor(name, base_dict[name]) if base_dict is not None else None
        jobs.append(Job(info, sources, dtype_name(reference.dtype), rule, resolved, base_source, labels))
    return jobs, outputs


def _as_dict(model: Any) -> dict[str, Tensor]:
    if isinstance(model, Tensor):
        return {"tensor": model}
    if isinstance(model, Mapping):
        return dict(model)
    if isinstance(model, torch.nn.Module):
        return dict(model.state_dict())
    raise TypeError(f"expected a tensor, a state dict or a module, not {type(model).__name__}")


def _check_names(dicts: Sequence[Mapping[str, Tensor]]) -> None:
    names = set(dicts[-1])
    for i, other in enumerate(dicts[:-1]):
        if missing := names - set(other):
            raise UserError(
                "RG202", f"model {i + 1} has no tensor {min(missing)!r}", fix="merge models of one architecture"
            )
        if extra := set(other) - names:
            raise UserError(
                "RG202", f"only model {i + 1} has a tensor {min(extra)!r}", fix="merge models of one architecture"
            )
