"""What a model costs: parameters, floating-point operations of a pass, and its measured time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from regraft.train.tap import look


def parameters(model: Any) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def flops(model: Any, batch: Mapping[str, Any]) -> int:
    """Floating-point operations of matrix products in one pass (a multiplication and an addition are two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        look(model.eval(), batch)
    return int(counter.get_total_flops())


def seconds(models: Mapping[str, Any], batch: Mapping[str, Any], *, repeats: int = 7) -> dict[str, float]:
    """Median time of one pass of each model; they take turns, so that a busy moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):  # the first two warm up
        for name, model in models.items():
            model.eval()
            with torch.inference_mode():
                begun = time.perf_counter()
                look(model, batch)
                if next(model.parameters()).is_cuda:
                    torch.cuda.synchronize()
            if turn > 1:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def summary(cost: Mapping[str, Any]) -> dict[str, float]:
    """What is left of parameters, operations and time, as shares of the original's; for tables and cards."""
    pairs = {"parameters left": cost["parameters"], "operations left": cost["flops"]}
    pairs |= {f"time left, batch of {size}": times for size, times in cost["seconds"].items()}
    return {name: pair["after"] / pair["before"] for name, pair in pairs.items()}


def compared(before: Any, after: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, operations and time of two models on a batch and on its first example, where the second one is."""
    device = next(after.parameters()).device
    before.to(device)
    inputs = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
        if k not in ("labels", "return_loss")
    }
    size = next(v.shape[0] for v in inputs.values() if isinstance(v, torch.Tensor))
    one = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    pair = {"before": before, "after": after}
    found: dict[str, Any] = {"parameters": {name: parameters(model) for name, model in pair.items()}}
    found["flops"] = {name: flops(model, inputs) for name, model in pair.items()}
    found["batch"] = size
    found["seconds"] = {"1": seconds(pair, one), str(size): seconds(pair, inputs)}
    return found
