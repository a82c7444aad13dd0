"""A LoRA adapter from two models: what fine-tuning did to each matrix, as a product of two thin ones.

Tensors are read one after another, each once; both models are never in memory. What cannot be a product (norms, biases)
is saved whole if that is asked for, left out if it is excluded, and otherwise named before any work starts. The error
that is told is that of the factors as they are stored, rounding included, against the difference of the two models;
in total it counts what is left out as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from regraft.adapters.change import LEFT_OUT, SAVED, Change, measured
from regraft.adapters.factors import Factors, Truncation, decompose, rounding_noise, square
from regraft.adapters.folder import Adapter, named_modules
from regraft.adapters.skeleton import EMBEDDING, Parameter, Skeleton
from regraft.checkpoint import Checkpoint, TensorSource, numel
from regraft.checkpoint.adapter_model import configs
from regraft.checkpoint.distance import check_base
from regraft.checkpoint.dtypes import DTYPES, from_torch_name, main_dtype
from regraft.checkpoint.job_folder import JobFolder
from regraft.checkpoint.sidecars import same_tokenizer
from regraft.checkpoint.tensor import stored_dtype
from regraft.errors import UserError, nearest
from regraft.inspect.config_keys import config_differences
from regraft.inspect.obstacles import LABEL_KEYS

if TYPE_CHECKING:
    from torch import Tensor

ALL, BIASES = "all", "bias"
FACTORS = "factors"  # a folder in the staging folder, for factors of an extraction that goes on
_DTYPES = ("float32", "float16", "bfloat16")
_PIECE = 1 << 22  # elements


@dataclass(frozen=True)
class Wanted:
    """What is to become of which tensor.

    Attributes:
        cut: where decompositions end.
        include, exclude: regular expressions for names of tensors; what is not included, or is excluded, stays as it
            is in the base.
        save: modules to save whole, by the ends of their paths; "bias" for the biases of layers, "all" for everything
            that changed and cannot be a product of factors.
        embeddings: factors for embeddings, too.
        dtype: of the factors; that of most of the model's weights if None.
    """

    cut: Truncation = field(default_factory=Truncation)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    save: Sequence[str] = ()
    embeddings: bool = False
    dtype: torch.dtype | None = None


def factor_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of this name.

    Raises:
        UserError: RG303 for one that no factors are stored in.
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise UserError("RG303", f"{name!r} is no dtype for factors", fix=nearest(name, _DTYPES))
    return DTYPES[from_torch_name(name)]


class Extraction:
    """The difference of two models on its way into an adapter: checked here, computed by `run`.

    Args:
        model, base: fine-tune, and what it was fine-tuned from.
        wanted: see there.
        force: go on although the model does not look like a fine-tune of the base, or is configured otherwise.

    Raises:
        UserError: RG201, RG202, RG203, RG205, RG207, RG209 for models that do not belong together, RG308 for patterns
            and names that select nothing, RG309 for changes that an adapter cannot hold as wanted.
    """

    def __init__(self, model: Checkpoint, base: Checkpoint, wanted: Wanted, *, force: bool = False) -> None:
        self.model, self.base, self.wanted = model, base, wanted
        self.remarks: list[str] = []
        _check_configurations(model, base, force)
        self.skeleton = Skeleton(model)
        self._after, strange = self.skeleton.sources(model)
        self._before, _ = self.skeleton.sources(base)
        if strange:
            what = f"{strange[0]} has no place of its own in a {self.skeleton.class_name} as transformers loads it"
            raise UserError("RG309", what, where=model.ref, fix="save the model with a current transformers first")
        self._resized: set[str] = set()
        self._patterns = [_compiled(wanted.include, self.skeleton), _compiled(wanted.exclude, self.skeleton)]
        self._check_shapes()
        if not force:
            _check_origin(model, base)
        self._modules: list[str] = []
        for name in wanted.save:
            found = named_modules(self.skeleton, name)
            if not found and name not in (ALL, BIASES):
                last = {module.rpartition(".")[2] for module in self.skeleton.modules}
                raise UserError("RG308", f"no module's path ends in {name!r}", where=model.ref, fix=nearest(name, last))
            self._modules += found
        self._biases: list[Parameter] = []
        self._factored: list[Parameter] = []
        self._left: list[Parameter] = []
        self._sort()
        main = main_dtype((stored_dtype(one), numel(one)) for one in model.tensors.values())
        self.dtype = wanted.dtype or DTYPES[main]

    @property
    def elements(self) -> int:
        """How many of the model's elements `run` reads."""
        return sum(math.prod(p.shape) for p in (*self._factored, *self._left))

    @property
    def parts(self) -> list[str]:
        """Names of the parts of the work, for the folder that notes them."""
        saved = [name for module in self._modules for name in self.skeleton.below(module)]
        measured = [*(p.name for p in (*self._left, *self._biases)), *saved]
        return [f"factors {p.name}" for p in self._factored] + [f"norm {name}" for name in measured]

    def run(
        self, on_progress: Callable[[int, int], None] | None = None, job: JobFolder | None = None
    ) -> tuple[Adapter, list[Change]]:
        """Decompose; what is saved whole is read when the adapter is written.

        Args:
            on_progress: called with (elements done, elements in all).
            job: where parts are noted, and taken from if they are there; files are left in its folder `FACTORS`.

        Raises:
            UserError: RG206 for values that are not finite, RG309 if nothing changed.
        """
        adapter = Adapter(self.skeleton, self.dtype)
        changes: list[Change] = []
        done = 0

        def advance(parameter: Parameter) -> None:
            nonlocal done
            done += math.prod(parameter.shape)
            if on_progress is not None:
                on_progress(done, self.elements)

        for parameter in self._factored:
            found = self._factors(parameter) if job is None else self._noted(parameter, job)
            if found is not None:
                adapter.add(parameter, found[0])
                changes.append(found[1])
            advance(parameter)

        def norm(name: str) -> float:
            if job is None:
                return self._norm(name)
            return float(job.once(f"norm {name}", lambda: {"norm": self._norm(name)})["norm"])

        for parameter in self._left:
            if size := norm(parameter.name):
                changes.append(Change(parameter.name, LEFT_OUT, None, size, 1.0))
            advance(parameter)
        for module in self._modules:
            below = {name: self._source(name) for name in self.skeleton.below(module)}
            adapter.save(module, {name: source for name, source in below.items() if source is not None})
            changes += [Change(name, SAVED, None, norm(name), 0.0) for name in below if name in self._after]
        for bias in self._biases:
            adapter.replace_bias(bias, self._after[bias.name])
            changes.append(Change(bias.name, SAVED, None, norm(bias.name), 0.0))
        if adapter.empty:
            what = "the two models do not differ in what the adapter may hold"
            raise UserError("RG309", what, where=self.model.ref, fix="name a fine-tune, or include more of it")
        return adapter, changes

    def _check_shapes(self) -> None:
        for name, parameter in self.skeleton.parameters.items():
            before, after = self._before.get(name), self._after.get(name)
            if after is None and before is not None:
                raise UserError("RG202", f"the model has no tensor {name}", where=self.model.ref, fix="save it again")
            if after is not None and after.shape != parameter.shape:
                what = f"{name} has shape {list(after.shape)}, and config.json makes it {list(parameter.shape)}"
                raise UserError("RG105", what, where=self.model.ref, fix="repair config.json")
            if before is not None and after is not None and before.shape != after.shape:
                if self._is_resized(before, after):
                    self._resized.add(name)
                    continue
                what = f"{name} has shape {list(after.shape)} in the model and {list(before.shape)} in the base"
                fix = "name the base that it was fine-tuned from; an adapter cannot resize a tensor"
                raise UserError("RG201", what, where=self.model.ref, fix=fix)

    def _sort(self) -> None:
        """Decide over every parameter; raise with the names of those that cannot be held as wanted."""
        stuck: list[str] = []
        for name, parameter in self.skeleton.parameters.items():
            tied = self.skeleton.all_of(parameter)
            if name not in self._after or any(self._within(one.name) for one in tied):
                self._modules += [one.module for one in tied if name in self._after and not self._within(one.name)]
            elif self._replaced(parameter):
                self._modules += [one.module for one in tied]
            elif not self._adapted(name):
                self._left.append(parameter)
            elif (
                parameter.factorable
                and name in self._before
                and name not in self._resized
                and (parameter.kind != EMBEDDING or self.wanted.embeddings)
            ):
                self._factored.append(parameter)
            elif self._changed(name):
                if any(one.bias for one in tied) and {ALL, BIASES} & set(self.wanted.save):
                    self._biases.append(parameter)
                elif ALL in self.wanted.save and all(self.skeleton.savable(one.module) for one in tied):
                    self._modules += [one.module for one in tied]
                else:
                    stuck.append(name)
        self._modules = [m for m in dict.fromkeys(self._modules) if not self._within(m)]
        self._factored = [p for p in self._factored if not any(self._within(t.name) for t in self.skeleton.all_of(p))]
        self._biases = [p for p in self._biases if not self._within(p.name)]
        if stuck:
            raise self._stuck(stuck)

    def _stuck(self, names: Sequence[str]) -> UserError:
        first = self.skeleton.parameters[names[0]]
        resized = first.name in self._resized
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        verb = "are new or changed" if len(names) > 1 else "is new or changed"
        what = f"{', '.join(names[:3])}{more} {verb}, and cannot be of low rank in a LoRA adapter"
        if resized:
            rows = [self._before[first.name].shape[0], self._after[first.name].shape[0]]
            what = f"{first.name} has {rows[1]} rows in the model and {rows[0]} in the base; {what}"
        low = first.kind == EMBEDDING and first.name in self._before and not resized
        ways = ["--embeddings for low rank"] if low else []
        if all(self.skeleton.savable(one.module) for one in self.skeleton.all_of(first)) or first.bias:
            ways.append("--save-modules all to save what cannot be factors whole")
        ways.append("--exclude to leave it as it is in the base")
        return UserError("RG309", what, where=self.model.ref, fix=f"give {', or '.join(ways)}")

    def _is_resized(self, before: TensorSource, after: TensorSource) -> bool:
        """Whether two tensors differ by words that were added to, or taken from, a vocabulary."""
        sizes = [{part.get("vocab_size") for part in configs(one.config)} for one in (self.base, self.model)]
        rows = before.shape[:1], after.shape[:1]
        return before.shape[1:] == after.shape[1:] and all({*row} & size for row, size in zip(rows, sizes, strict=True))

    @property
    def tokens(self) -> int | None:
        """Rows of the embedding that the base is to have before the adapter is loaded; None if it has them."""
        saved = [name for name in self._resized if any(map(self._within, self._names_of(name)))]
        return max((self._after[name].shape[0] for name in saved), default=None)

    @property
    def tokenizer(self) -> Checkpoint | None:
        """The fine-tune, if its tokenizer belongs to the adapter; None if it is the base's, or has words left out."""
        if same_tokenizer(self.model, self.base):
            return None
        if self._resized and self.tokens is None:
            self.remarks.append("the rows of the fine-tune's new tokens are left out, and so is its tokenizer")
            return None
        return self.model

    def _names_of(self, name: str) -> list[str]:
        return [one.name for one in self.skeleton.all_of(self.skeleton.parameters[name])]

    def _replaced(self, parameter: Parameter) -> bool:
        """Whether the module of a parameter is to be saved whole, although nobody asked for it by name."""
        return False

    def _within(self, name: str) -> bool:
        """Whether a parameter belongs to a module that is saved whole."""
        return any(name.startswith(f"{module}.") for module in self._modules)

    def _adapted(self, name: str) -> bool:
        include, exclude = self._patterns
        return (not include or any(p.search(name) for p in include)) and not any(p.search(name) for p in exclude)

    def _changed(self, name: str) -> bool:
        before, after = self._before.get(name), self._after[name]
        if before is None or before is after:
            return before is None
        if name in self._resized:
            return True
        pieces = range(0, numel(after), _PIECE)
        return not all(torch.equal(*(s.read(at, at + _PIECE).double() for s in (before, after))) for at in pieces)

    def _source(self, name: str) -> TensorSource | None:
        return self._after.get(self.skeleton.tied.get(name, name))

    def _delta(self, name: str) -> tuple[Tensor, float]:
        """(fine-tune - base, ‖fine-tune‖²), the former flat, in float32 or float64; made of pieces, to be held once."""
        before, after = self._before[name], self._after[name]
        wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
        delta = torch.empty(numel(after), dtype=wide)
        energy = 0.0
        for at in range(0, numel(after), _PIECE):
            piece = after.read(at, at + _PIECE).to(wide)
            energy += square(piece)
            delta[at : at + _PIECE] = piece - before.read(at, at + _PIECE).to(wide)
        if not bool(torch.isfinite(delta).all()):
            what = f"{name} holds values that are NaN or infinite"
            raise UserError("RG206", what, where=self.model.ref, fix=f"repair the model, or --exclude {name}")
        return delta, energy

    def _norm(self, name: str) -> float:
        """‖delta‖, ‖fine-tune‖ of what the base does not have."""
        total = 0.0
        before, after = self._before.get(name), self._after[name]
        for at in range(0, numel(after), _PIECE):
            piece = after.read(at, at + _PIECE).double()
            if before is not None:  # rows that it does not have count as they are
                own = before.read(at, at + _PIECE).double()[: piece.numel()]
                piece[: own.numel()] -= own
            total += float(piece.square().sum())
        return math.sqrt(total)

    def _factors(self, parameter: Parameter) -> tuple[Factors, Change] | None:
        """The factors of a change as they are stored, and what they make of it; None if there is no change."""
        delta, energy = self._delta(parameter.name)
        if not bool(delta.any()):
            return None
        matrix = parameter.matrix(delta)
        noise = rounding_noise(energy, matrix.shape, self._after[parameter.name].dtype)
        stored = decompose(matrix, self.wanted.cut, noise).to(self.dtype)
        return stored, measured(parameter.name, matrix, stored)

    def _noted(self, parameter: Parameter, job: JobFolder) -> tuple[Factors, Change] | None:
        """As `_factors`, by way of a file, where the next run finds them if this one dies."""
        name = f"factors {parameter.name}"
        path = job.staging / FACTORS / f"{self._factored.index(parameter)}.safetensors"
        if job.done.get(name) and not path.is_file():
            del job.done[name]

        def work() -> dict[str, Any]:
            from safetensors.torch import save

            found = self._factors(parameter)
            if found is None:
                return {}
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(save({"up": found[0].up, "down": found[0].down}))
            part.replace(path)
            return asdict(found[1])

        facts = job.once(name, work)
        if not facts:
            return None
        from safetensors.torch import load_file

        tensors = load_file(path)
        return Factors(tensors["up"], tensors["down"]), Change(**facts)


def _check_configurations(model: Checkpoint, base: Checkpoint, force: bool) -> None:
    fix = "name the base that it was fine-tuned from"
    if base.adapters:
        what = "the base has an adapter or a delta, on which another adapter cannot be loaded"
        raise UserError("RG309", what, where=base.ref, fix="name the base without it, or merge it into the base first")
    if model.model_type != base.model_type:
        what = f"the model is of type {model.model_type or '?'} and the base of type {base.model_type or '?'}"
        raise UserError("RG203", what, where=model.ref, fix=fix)
    for one in config_differences(base.config, model.config):
        # Of vocabularies the tensors tell more, and label maps come with the head.
        if one.matters and not force and one.key not in (*LABEL_KEYS, "vocab_size"):
            what = f"{one.key} is {one.b!r} in the model and {one.a!r} in the base, and an adapter cannot change it"
            raise UserError("RG207", what, where=model.ref, fix=f"{fix}, or go on with --force")


def _check_origin(model: Checkpoint, base: Checkpoint) -> None:
    if reason := check_base(base, model):
        what = f"the model does not look like a fine-tune of {base.ref}: {reason}"
        fix = "name the base that it was fine-tuned from, or go on with --force"
        raise UserError("RG205", what, where=model.ref, fix=fix)


def _compiled(patterns: Sequence[str], skeleton: Skeleton) -> list[re.Pattern[str]]:
    found = []
    for text in patterns:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UserError("RG303", f"{text!r} is no regular expression: {error}", fix="repair it") from None
        if not any(pattern.search(name) for name in skeleton.parameters):
            names = list(skeleton.parameters)
            fix = f"its names look like {names[len(names) // 2]}"
            raise UserError("RG308", f"{text!r} selects no tensor of the model", fix=fix)
        found.append(pattern)
    return found
