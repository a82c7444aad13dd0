"""Which linear layers of a model become low-rank, of which rank, and the replacement itself.

Layers are chosen by role (`regraft.axes.modules`): the projections of attention and the feed-forward matrices, unless
told otherwise. Heads, embeddings, poolers, projections between towers and downsampling stay dense, and so do layers
whose matrix is shared with another, and layers that a rank would not make smaller.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from regraft.axes.module_map import check_roles, modules_of
from regraft.errors import UserError
from regraft.methods import Options
from regraft.resize.low_rank import factorised, is_linear, replace, weight_of
from regraft.resize.surgery import record, surgeries_of
from regraft.resize.svd import EXACT_UP_TO, Factors, spectrum, truncated, whitened

_PARTS = {"qkv": 3, "kv": 2}  # last part of a role -> matrices in one
SLOW_BELOW = 256  # width under which two small products are rarely faster than one dense one on a CPU


class LowRankOptions(Options):
    """Which layers become low-rank, and of which rank; at most one of ratio, rank, energy and target_parameters."""

    ratio: float | None = Field(None, gt=1, le=1000, description="a layer keeps 1/ratio of its matrix; 2 if not given")
    rank: int | None = Field(None, ge=1, description="one rank for all layers")
    energy: float | None = Field(
        None, gt=0, lt=1, description="each layer keeps this share of its squared singular values"
    )
    target_parameters: float | None = Field(
        None, gt=0, lt=1, description="the whole model keeps this share of its parameters; one ratio is solved for"
    )
    include: tuple[str, ...] = Field(("attention", "cross", "ffn"), description="roles of layers to factorise")
    exclude: tuple[str, ...] = Field((), description="roles of layers to leave dense")
    split_qkv: bool = Field(
        False, description="make queries, keys and values that are one matrix (GPT-2) low-rank each by itself"
    )
    svd: Literal["auto", "exact", "randomized"] = Field(
        "auto", description="how factors are found; auto: randomized above 2,048, exact below"
    )

    @model_validator(mode="after")
    def _one_size(self) -> LowRankOptions:
        given = [n for n in ("ratio", "rank", "energy", "target_parameters") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say how small layers become; give one")
        check_roles((*self.include, *self.exclude))
        return self


@dataclass(frozen=True)
class Layer:
    """What becomes of one linear layer: its rank, or why it stays dense; and afterwards the errors of its factors."""

    name: str
    role: str
    shape: tuple[int, int]
    rank: int | None
    why: str = ""
    error: float | None = None
    best: float | None = None
    output_error: float | None = None
    randomized: bool = False
    parts: int = 1

    @property
    def kept(self) -> int:
        """Parameters of its matrix afterwards."""
        rows, columns = self.shape
        return rows * columns if self.rank is None else self.rank * (rows + self.parts * columns)


@dataclass
class Factorisation:
    """What was, or will be, done to a model.

    `parameters` counts those of the whole model before, `kept` after; tied ones once.
    """

    layers: list[Layer]
    parameters: int
    kept: int
    warnings: list[str] = field(default_factory=list)

    @property
    def factorised(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.rank is not None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        layers = [
            {
                "name": la.name,
                "role": la.role,
                "shape": list(la.shape),
                "rank": la.rank,
                "parts": la.parts,
                "error": la.error,
                "output_error": la.output_error,
                "randomized": la.randomized,
                "why": la.why,
            }
            for la in self.layers
        ]
        share = self.kept / self.parameters
        return {"parameters": self.parameters, "kept": self.kept, "share": share, "layers": layers}

    def in_words(self) -> str:
        """How many layers became low-rank, and how far from the original's their matrices are before any training."""
        errors = {la.name: la.error for la in self.factorised if la.error is not None}
        worst = max(errors, key=errors.__getitem__)
        sketched = sum(la.randomized for la in self.factorised)
        how = f", {sketched} of them by a randomised decomposition" if sketched else ""
        return (
            f"{len(errors)} layers become low-rank{how}, {self.kept / self.parameters:.1%} of the parameters are left; "
            f"relative error of the matrices {sum(errors.values()) / len(errors):.1%} on average, "
            f"{errors[worst]:.1%} at most ({worst})"
        )


def rank_of(rows: int, columns: int, ratio: float) -> int:
    """The rank at which two factors have 1/ratio of the entries of a matrix, rounded down."""
    return math.floor(rows * columns / (ratio * (rows + columns)))


def plan(model: Any, options: LowRankOptions) -> Factorisation:
    """What `factorise` will do, without doing it.

    Raises:
        UserError: RG208 for a family without a table of modules, RG303 for ranks below 1, RG308 if no layer is chosen,
            RG309 for a model that is low-rank already, RG206 for weights that are not finite.
    """
    if surgeries_of(model.config):
        fix = "export it to a dense model first, or factorise the original"
        raise UserError("RG309", "the model is low-rank already", fix=fix)
    roles = modules_of(model)
    modules = dict(model.named_modules())
    chosen = [
        name
        for name, place in roles.places.items()
        if any(place.has(r) for r in options.include)
        and not any(place.has(r) for r in options.exclude)
        and is_linear(modules[name])
    ]
    if not chosen:
        what = f"no linear layer has a role of {', '.join(options.include)}"
        raise UserError("RG308", what, fix="include other roles, such as attention or ffn")
    uses: dict[int, int] = {}
    for module in modules.values():
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            uses[id(weight)] = uses.get(id(weight), 0) + 1
    total = sum(p.numel() for p in model.parameters())
    shapes = {name: tuple(weight_of(modules[name]).shape) for name in chosen}
    parts = {name: _PARTS.get(roles.places[name].role.rpartition(".")[2], 1) for name in chosen}
    parts = {name: n if options.split_qkv else 1 for name, n in parts.items()}
    free = [name for name in chosen if uses[id(modules[name].weight)] == 1]
    ranks = _ranks(modules, shapes, parts, free, total, options)
    layers = []
    for name in chosen:
        rows, columns = shapes[name]
        role = roles.places[name].role
        if name not in free:
            layers.append(Layer(name, role, (rows, columns), None, "its matrix is shared with another module"))
        elif ranks[name] * (rows + parts[name] * columns) >= rows * columns:
            why = f"two factors of rank {ranks[name]} are no smaller"
            layers.append(Layer(name, role, (rows, columns), None, why))
        else:
            layers.append(Layer(name, role, (rows, columns), ranks[name], parts=parts[name]))
    found = Factorisation(layers, total, total - sum(la.shape[0] * la.shape[1] - la.kept for la in layers))
    if not found.factorised:
        raise UserError("RG303", f"no layer becomes smaller: {layers[0].why}", fix="ask for smaller layers")
    dense = [la for la in layers if la.rank is None]
    if dense:
        found.warnings.append(f"{len(dense)} layers stay dense, among them {dense[0].name}: {dense[0].why}")
    if max(min(la.shape) for la in found.factorised) < SLOW_BELOW:
        found.warnings.append(
            f"the matrices are narrower than {SLOW_BELOW}, where two small products may take longer than a dense one"
        )
    return found


def factorise(
    model: Any,
    options: LowRankOptions | None = None,
    *,
    moments: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Factorisation:
    """Replace the chosen layers of a model by low-rank ones, in place, and record that in its configuration.

    Args:
        moments: second moments of the inputs of layers, (I, I) by name; where given, factors are whitened with them.
        on_progress: called with (layers done, layers in all).

    Raises:
        UserError: as `plan`.
    """
    options = options or LowRankOptions()
    found = plan(model, options)
    modules = dict(model.named_modules())
    measured = []
    done = 0
    for layer in found.layers:
        if layer.rank is None:
            measured.append(layer)
            continue
        module = modules[layer.name]
        factors = _factors(module, layer, options, (moments or {}).get(layer.name))
        replace(model, layer.name, factorised(module, factors.up, factors.down, layer.parts))
        errors = {name: getattr(factors, name) for name in ("error", "best", "output_error", "randomized")}
        measured.append(dataclasses.replace(layer, **errors))
        done += 1
        if on_progress is not None:
            on_progress(done, len(found.factorised))
    found.layers = measured
    sizes = {la.name: la.rank if la.parts == 1 else [la.rank, la.parts] for la in found.factorised}
    record(model, "low_rank", sizes)
    return found


def _factors(module: nn.Module, layer: Layer, options: LowRankOptions, moments: Tensor | None) -> Factors:
    weight = weight_of(module)
    if layer.parts == 1:
        return _factors_of(weight, layer, options, moments)
    blocks = weight.unflatten(0, (layer.parts, -1))
    found = [_factors_of(block, layer, options, moments) for block in blocks]
    sizes = [float(torch.linalg.vector_norm(block.double())) for block in blocks]
    error = _together([one.error for one in found], sizes)
    best, output_error = _together([one.best for one in found], sizes), None
    if moments is not None:
        outputs = [float(((b.double() @ moments.double()) * b).sum().clamp(min=0).sqrt()) for b in blocks]
        output_error = _together([one.output_error for one in found], outputs)
    up, down = torch.cat([one.up for one in found]), torch.cat([one.down for one in found])
    return Factors(up, down, error or 0.0, best, output_error, any(one.randomized for one in found))


def _together(errors: Sequence[float | None], sizes: Sequence[float]) -> float | None:
    """The relative error of several blocks, of these norms, as one; None if one is not known, or all are zero."""
    if any(error is None for error in errors) or not any(sizes):
        return None
    return math.hypot(*(e * s for e, s in zip(errors, sizes, strict=True) if e is not None)) / math.hypot(*sizes)


def _factors_of(weight: Tensor, layer: Layer, options: LowRankOptions, moments: Tensor | None) -> Factors:
    assert layer.rank is not None
    sketch = options.svd == "randomized" or (options.svd == "auto" and min(weight.shape) > EXACT_UP_TO)
    if moments is not None:
        return whitened(weight, moments, layer.rank, randomized=sketch, where=layer.name)
    return truncated(weight, layer.rank, randomized=sketch, where=layer.name)


def _ranks(
    modules: Mapping[str, nn.Module],
    whole: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, int],
    free: Sequence[str],
    total: int,
    options: LowRankOptions,
) -> dict[str, int]:
    """The rank of each layer that may be factorised, of each of its parts where it has several."""
    shapes = {name: (whole[name][0] // parts[name], whole[name][1]) for name in free}
    if options.rank is not None:
        return {name: min(options.rank, *shapes[name]) for name in free}
    if options.energy is not None:
        blocks = {name: weight_of(modules[name]).unflatten(0, (parts[name], -1)) for name in free}
        return {name: max(_by_energy(block, options.energy, name) for block in blocks[name]) for name in free}
    if options.target_parameters is not None:
        ratio = _solved(shapes, parts, free, total, options.target_parameters)
    else:
        ratio = options.ratio if options.ratio is not None else 2.0
    ranks = {name: rank_of(shapes[name][0], shapes[name][1], ratio) for name in free}
    for name, rank in ranks.items():
        if rank < 1:
            rows, columns = shapes[name]
            what = f"a ratio of {ratio:.4g} leaves {name} ({rows} x {columns}) a rank of {rank}"
            raise UserError("RG303", what, fix="give a smaller ratio, or exclude its role")
    return ranks


def _by_energy(weight: Tensor, energy: float, where: str) -> int:
    squares = spectrum(weight, where=where).double().square()
    kept = squares.cumsum(0) / squares.sum()
    return min(int((kept < energy).sum()) + 1, len(squares))


def _solved(
    shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, int], free: Sequence[str], total: int, share: float
) -> float:
    """The smallest ratio at which the whole model keeps at most this share of its parameters.

    Args:
        shapes: of one part of each layer.
    """
    dense = sum(parts[name] * shapes[name][0] * shapes[name][1] for name in free)

    def kept(ratio: float) -> int:
        ranks = {name: rank_of(shapes[name][0], shapes[name][1], ratio) for name in free}
        return total - dense + sum(parts[name] * ranks[name] * sum(shapes[name]) for name in free)

    low, high = 1.0, 1000.0
    if kept(high) > share * total:
        least = (total - dense) / total
        what = f"the layers that may be factorised cannot bring the model down to {share:.0%} of its parameters"
        raise UserError("RG303", what, fix=f"ask for more than {least:.0%}, or include more roles")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) <= share * total else (middle, high)
    return high
