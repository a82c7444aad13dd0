"""What whitening needs: the second moments of the inputs of layers, from some rows of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from regraft.axes.module_map import modules_of
from regraft.methods import Options
from regraft.resize.factorise import LowRankOptions, plan
from regraft.train.masks import valid
from regraft.train.objective import Batch, Collate
from regraft.train.tap import look


class WhiteningOptions(Options):
    """What the factors are best for."""

    init: Literal["svd", "whitened"] = Field(
        "svd", description="factors that are best for the weights, or for the outputs on the data"
    )
    calibration_rows: int = Field(256, ge=1, description="rows of the data that whitening looks at")


def collated(collate: Collate, examples: Sequence[Mapping[str, Any]], size: int) -> list[Batch]:
    """The batches of some examples; where something is drawn for these, the same for all."""
    groups = [examples[i : i + size] for i in range(0, len(examples), size)]
    return [collate(group, [0] * len(group)) for group in groups]


def moments_for(model: Any, batches: Sequence[Batch], options: LowRankOptions) -> dict[str, Tensor]:
    """The moments of the inputs of all layers that `factorise` will make low-rank with these options."""
    return input_moments(model, batches, [layer.name for layer in plan(model, options).factorised])


def input_moments(model: Any, batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Tensor]:
    """The mean of x x^T over all inputs of some linear layers, (I, I) each, in float64; padding is left out."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    shown: dict[str, Any] = {}
    places = modules_of(model).places

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        place = places[name]
        # Keys and values of cross-attention are made of what the encoder read.
        reads = "encoder" if place.role in ("cross.key", "cross.value", "cross.kv") else place.stack

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            real = valid(shown, reads, x)
            if real is not None:
                x = x[real]
            rows = x.reshape(-1, x.shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=x.device)) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                shown.clear()
                shown.update(batch)
                look(model, {key: value for key, value in batch.items() if key != "labels"})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}
