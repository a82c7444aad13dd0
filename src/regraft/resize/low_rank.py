"""A linear layer as the product of two small ones: I -> r -> O, with the old bias behind the second.

A matrix that is several in one (queries, keys and values of GPT-2) can become that many products of rank r, one for
each part of the outputs: the factors A of all parts stand below one another in `down`, and the factors B in `up`.

`weight` is None on purpose: models that look at it (to learn a dtype, say) see that there is no dense matrix, and
nobody takes a product of O x r x I for an attribute that costs nothing. `dense()` computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import UserError


class LowRankLinear(nn.Module):
    """y = B (A x) + b, with A (r, I) in `down` and B (O, r), b (O,) in `up`.

    With p `parts`, A is (p r, I), and part j of the outputs is B_j (A_j x) + b_j.
    """

    weight = None

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool = True, parts: int = 1, **place: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.parts = in_features, out_features, rank, parts
        self.down = nn.Linear(in_features, parts * rank, bias=False, **place)
        self.up = nn.Linear(rank, out_features, bias=bias, **place)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.parts == 1:
            y: Tensor = self.up(self.down(x))
            return y
        z = self.down(x).unflatten(-1, (self.parts, self.rank))
        y = torch.einsum("...pr,por->...po", z, self.up.weight.unflatten(0, (self.parts, -1))).flatten(-2)
        return y if self.up.bias is None else y + self.up.bias

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix that the two stand for, (O, I), computed in a dtype."""
        up: Tensor = self.up.weight
        down: Tensor = self.down.weight
        if dtype is not None:
            up, down = up.to(dtype), down.to(dtype)
        if self.parts == 1:
            return up @ down
        blocks: Tensor = up.unflatten(0, (self.parts, -1)) @ down.unflatten(0, (self.parts, -1))
        return blocks.flatten(0, 1)

    def extra_repr(self) -> str:
        parts = f", parts={self.parts}" if self.parts > 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{parts}"


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one dense float matrix: `nn.Linear`, or the Conv1D of GPT-2."""
    if type(module) is nn.Linear:
        return module.weight.is_floating_point()
    return _is_conv1d(module)


def weight_of(module: nn.Module) -> Tensor:
    """The matrix of a linear module as (O, I), whichever way round it is stored; it shares memory with the module."""
    weight = module.dense() if isinstance(module, LowRankLinear) else module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if _is_conv1d(module) else weight


def low_rank_like(module: nn.Module, rank: int, parts: int = 1) -> LowRankLinear:
    """A module of a rank, not initialised, in the place of a linear one: same sizes, bias, dtype, device and mode."""
    if not is_linear(module):
        what = f"a {type(module).__name__} is no linear layer"
        raise UserError("RG309", what, fix="leave it out, or merge what wraps it first")
    weight = weight_of(module)
    place: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    new = LowRankLinear(weight.shape[1], weight.shape[0], rank, bias=module.bias is not None, parts=parts, **place)
    return new.train(module.training)


def factorised(module: nn.Module, up: Tensor, down: Tensor, parts: int = 1) -> LowRankLinear:
    """The low-rank module with these factors (O, r) and (parts r, I), and the bias of the linear one it stands for."""
    new = low_rank_like(module, up.shape[1], parts)
    with torch.no_grad():
        new.up.weight.copy_(up)
        new.down.weight.copy_(down)
        if isinstance(module.bias, Tensor):
            new.up.bias.copy_(module.bias)
    return new


def folded(module: LowRankLinear, like: nn.Module) -> nn.Module:
    """`like`, a linear module of the same sizes, filled with the product; computed in float64 and rounded once."""
    with torch.no_grad():
        dense = module.dense(torch.float64)
        weight = like.weight
        assert isinstance(weight, Tensor)
        weight.copy_(dense.t() if _is_conv1d(like) else dense)
        if module.up.bias is not None:
            assert isinstance(like.bias, Tensor)
            like.bias.copy_(module.up.bias)
    return like


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
