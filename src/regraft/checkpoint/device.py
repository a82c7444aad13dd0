"""The device that tensors are computed on, tried before any work."""

from __future__ import annotations

import torch

from regraft.errors import UserError


def usable_device(name: str, *, fix: str = "use --device cpu", dtype: str = "float64") -> torch.device:
    """A device by its name in torch.

    Args:
        dtype: what has to be computed there, by its name in torch; sums of merges need double precision.

    Raises:
        UserError: RG406 if torch does not know it or cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=getattr(torch, dtype), device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError("RG406", f"device {name!r} cannot be used: {reason}", fix=fix) from None
    return device
