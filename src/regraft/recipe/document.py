"""The typed form of a recipe, whichever language it was written in.

Settings are kept as they were written, with their filters and gradients; `resolve` turns them into one value per
tensor. References to models stay texts: a name that the recipe defines, a step before this one, or a path or Hub id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from regraft.adapters.factors import Truncation

MAX_MODELS = 1000  # in one merge
MAX_STEPS = 2000  # in one recipe, with the members of sweeps
STATE_DICT = "state-dict"
OUTPUTS = ("model", "lora", STATE_DICT)
TENSORS = ("same", "common", "any")  # what becomes of tensors that only some state dicts have


@dataclass(frozen=True, eq=False)
class Condition:
    """A value for the tensors whose name contains `filter` (None or "*": all); a list is a gradient over depth."""

    value: Any
    filter: str | None = None


Setting: TypeAlias = tuple[Condition, ...]


@dataclass(frozen=True, eq=False)
class Input:
    """A model of a merge, with settings of its own; in slices with the layers [first, last) that it gives."""

    model: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Slice:
    """One run of output layers: which layers of which models, settings for them, and the base that they have."""

    inputs: tuple[Input, ...]
    base: str | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ModulePart:
    """A module of the model (`axes.modules`) and what it is made of: whole models, or slices; settings for it."""

    name: str
    inputs: tuple[Input, ...] = ()
    slices: tuple[Slice, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True, eq=False)
class TokenRow:
    """Where a model takes the row of a token from if it lacks the token, or in any case if `force`.

    `model` None: a row of zeros. Without `token` and `token_id` it is that model's row of the same token.
    """

    model: str | None
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    where: str = ""


@dataclass(frozen=True, eq=False)
class VocabularyChoice:
    """The vocabulary of a merge's output.

    Attributes:
        source: the model whose tokenizer it is; None for the union of all, built on that of the base or first model.
        tokens: rows that the recipe chooses; tokens that the tokenizer lacks are added to it.
        pad_to_multiple_of: the number of rows is rounded up to a multiple of it; None to leave it as it is.
        where: file, step and line, for messages.
    """

    source: str | None
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    where: str = ""


@dataclass(frozen=True, eq=False)
class MergeStep:
    """One merge.

    Attributes:
        name: of the step; with the values of a sweep behind an @.
        method: name of a merge rule.
        base, config_from, tokenizer_from: models by reference, or None.
        inputs: the models, unless `slices` or `modules` are given.
        modules: what each module of the model is made of, where they are merged one by one.
        settings: options for all models and tensors, the widest level.
        dtype, out_dtype: names such as "bfloat16"; `dtype` is mergekit's and stands for `out_dtype` where that is None.
        exclude: regular expressions of tensors that are copied from the template.
        vocabulary: how vocabularies that differ become one; None where they have to agree.
        chat_template: Jinja text, or None for the tokenizer's own.
        seed: for rules that draw.
        dialect: "regraft" or "mergekit": whose defaults hold.
        where: file, step and line, for messages.
        sweep: the values of this member of a sweep.
        output: "model", "lora" for an adapter made of adapters, or "state-dict" for bare tensors by name.
        cut: how far an adapter may be cut off; None if it must be exact.
        tensors: of state dicts that differ, "same" if that is an error, "common" for the tensors that all have, "any"
            for those that some have.
    """

    name: str
    method: str
    base: str | None
    inputs: tuple[Input, ...]
    slices: tuple[Slice, ...] = ()
    modules: tuple[ModulePart, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    exclude: tuple[str, ...] = ()
    config_from: str | None = None
    tokenizer_from: str | None = None
    vocabulary: VocabularyChoice | None = None
    chat_template: str | None = None
    seed: int = 0
    dialect: str = "regraft"
    where: str = ""
    sweep: Mapping[str, Any] = field(default_factory=dict)
    output: str = "model"
    cut: Truncation | None = None
    tensors: str = "same"

    @property
    def references(self) -> list[str]:
        """Every model that the step names, each once: those that are merged, then bases and those that lend files."""
        slices = [*self.slices, *(piece for part in self.modules for piece in part.slices)]
        inputs = [i for piece in slices for i in piece.inputs]
        inputs += [*self.inputs, *(i for part in self.modules for i in part.inputs)]
        bases = [self.base, *(piece.base for piece in slices)]
        named = [*(i.model for i in inputs), *bases, self.config_from, self.tokenizer_from]
        return list(dict.fromkeys(name for name in named if name))


@dataclass(frozen=True, eq=False)
class EvaluateStep:
    """One measurement of one or more models on one data set."""

    name: str
    metric: str
    models: tuple[str, ...]
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True, eq=False)
class MakeStep:
    """One model made by running another: compressed or trained.

    Attributes:
        verb: "compress" or "train".
        method: name of a method of that verb.
        models: role ("model", "teacher"; "teacher_2" for the second of several) -> reference.
        data: path of what it is trained on, "" if there is none.
        sources: paths of further data, by the names that the method has for it.
    """

    name: str
    verb: str
    method: str
    models: Mapping[str, str]
    data: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Recipe:
    """A whole recipe: named models and the steps in order, sweeps unrolled."""

    models: Mapping[str, str]
    steps: tuple[MergeStep | MakeStep | EvaluateStep, ...]
    path: Path | None = None
    text: str = ""
