"""mergekit's recipes (`merge_method:` at the top level), read as they are into one merge step of dialect "mergekit".

What the same words mean there where it differs from ours (defaults, REQUIRED weights, gradients behind the layers) is
written in each rule and applied by `resolve`. mergekit ignores keys that it does not know, and options that stand
where they have no effect; here both are errors, as are features that regraft does not have. Options that mergekit
accepts for a method without using them are accepted too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from regraft.checkpoint.paths import WEIGHT_SUFFIXES
from regraft.merge.rule import Rule
from regraft.methods import methods
from regraft.recipe.chat_templates import chat_template
from regraft.recipe.document import (
    MAX_MODELS,
    STATE_DICT,
    Input,
    MergeStep,
    ModulePart,
    Recipe,
    Setting,
    Slice,
    VocabularyChoice,
)
from regraft.recipe.fields import Field
from regraft.recipe.names import Names, check_name
from regraft.recipe.option_values import OptionReader
from regraft.recipe.tokens import read_source, read_tokenizer

TOP_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
STEP = "merged"
# What a slice cannot have, and why.
NOT_IN_SLICES = {
    "residual_weight": (
        "residual_weight changes nothing in mergekit's results, and regraft does not have it",
        "remove it",
    ),
    "merge_method": (
        "a recipe has one merge_method, and mergekit ignores that of a slice",
        "merge by each method in a document of its own, and stack the results in a last one",
    ),
}
# Options that mergekit takes for a method but that change nothing in its result.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "task_arithmetic": ("int8_mask", "density", "rescale"),
    "ties": ("int8_mask",),
    "dare_linear": ("int8_mask",),
    "dare_ties": ("int8_mask",),
    "della": ("int8_mask",),
    "della_linear": ("int8_mask",),
    "breadcrumbs": ("int8_mask",),
    "breadcrumbs_ties": ("int8_mask",),
    "sce": ("int8_mask",),
}


def read_recipe(roots: Sequence[Field], *, path: Path | None, text: str) -> Recipe:
    """The typed form of a mergekit file: a step for each of its documents, in the order in which they need one another.

    Raises:
        UserError: RG301 to RG309; RG309 for what regraft does not do.
    """
    if len(roots) == 1:
        root = roots[0]
        return Recipe({}, (_Reader(root, _name(root) or STEP).step(),), path, text)
    bodies: dict[str, Field] = {}
    for root in roots:
        name = _name(root)
        if (name or STEP) in bodies:
            what = f"{name} is the name of two documents" if name else f"two documents have no name, or that of {STEP}"
            raise root.error("RG307", what, "give each document but the last a name of its own")
        bodies[name or STEP] = root
    steps = {name: _Reader(root, name, bodies).step() for name, root in bodies.items()}
    ordered: dict[str, MergeStep] = {}
    while len(ordered) < len(steps):
        ready = [n for n in steps if n not in ordered and _needs(steps[n], steps) <= ordered.keys()]
        if not ready:
            waiting = [n for n in steps if n not in ordered]
            what = f"the documents {', '.join(waiting)} need one another in a circle"
            raise bodies[waiting[0]].error("RG307", what, "let one of them do without the others")
        ordered |= {name: steps[name] for name in ready}
    return Recipe({}, tuple(ordered.values()), path, text)


def _name(root: Field) -> str | None:
    """What the document calls its result."""
    items = root.items()
    if "name" not in items or items["name"].is_null:
        return None
    name = items["name"].text("a name")
    check_name(items["name"], name, "step")
    return name


def _needs(step: MergeStep, steps: Collection[str]) -> set[str]:
    """The other documents whose results a step uses."""
    return {name for name in step.references if name in steps}


class _Reader:
    """Reads one file. References are texts of the form model[@revision][+adapter]."""

    def __init__(self, root: Field, name: str, others: Collection[str] = ()) -> None:
        self.root, self.name, self.others = root, name, others
        self.top = root.check_keys(TOP_KEYS, "a mergekit recipe")
        self.rule = _rule(self.top["merge_method"])
        self.reader = OptionReader(self.rule, "mergekit")
        self.base = self._reference(self.top["base_model"]) if self._has("base_model") else None
        self.same = Names({}).same

    def step(self) -> MergeStep:
        """The file as one merge step."""
        kind, field = self._one_of(self.root, self.top, ("models", "slices", "modules"))
        inputs = self._inputs(field) if kind == "models" else ()
        slices = self._slices(field) if kind == "slices" else ()
        modules = tuple(self._module(*m) for m in self._modules(field)) if kind == "modules" else ()
        groups = [*slices, *(piece for part in modules for piece in part.slices)]
        settings = self._parameters(self.top, self._count(inputs, groups))
        dtype, out_dtype = (self._dtype(key) for key in ("dtype", "out_dtype"))
        vocabulary = self._vocabulary()
        step = MergeStep(
            name=self.name,
            method=self.rule.name,
            base=self._common_base(groups),
            inputs=inputs,
            slices=slices,
            modules=modules,
            settings=settings,
            dtype=dtype,
            out_dtype=out_dtype,
            tokenizer_from=vocabulary.source if vocabulary is not None else None,
            vocabulary=vocabulary,
            chat_template=self._chat_template(),
            dialect="mergekit",
            where=f"{self.root.file}, line {self.top['merge_method'].node.line}, merge_method {self.rule.name}",
        )
        return replace(step, output=STATE_DICT) if _of_files(step) else step

    def _one_of(self, place: Field, items: dict[str, Field], kinds: tuple[str, ...]) -> tuple[str, Field]:
        """Which of the keys is given, of which there must be one, and what it holds."""
        given = [k for k in kinds if k in items and not items[k].is_null]
        if len(given) != 1:
            *most, last = given or kinds
            named = f"{', '.join(most)} {'and' if given else 'nor'} {last}"
            if not given:
                named = named.replace(", ", " nor ")
            what = f"{place.key} has {'both ' if given else 'neither '}{named}"
            raise place.error("RG303", what, "give one of them")
        return given[0], items[given[0]]

    def _common_base(self, slices: Sequence[Slice]) -> str | None:
        """The recipe's base; without one that of its slices, as long as those that name one name the same."""
        own = [piece.base for piece in slices if piece.base is not None]
        if self.base is not None or not own or not all(self.same(base, own[0]) for base in own):
            return self.base
        return own[0]

    def _modules(self, field: Field) -> list[tuple[str, Field]]:
        found = list(field.items("a mapping: the name of each module and what it is made of").items())
        if not found:
            raise field.error("RG303", "modules is empty", "give default: {models: [...]}")
        return found

    def _module(self, name: str, field: Field) -> ModulePart:
        items = field.check_keys(("models", "slices", "parameters"), "a module")
        kind, given = self._one_of(field, items, ("models", "slices"))
        inputs = self._inputs(given) if kind == "models" else ()
        slices = self._slices(given) if kind == "slices" else ()
        return ModulePart(name, inputs, slices, self._parameters(items, self._count(inputs, slices)), field.where)

    def _inputs(self, field: Field) -> tuple[Input, ...]:
        entries = field.entries("a list")
        items = [e.check_keys(("model", "parameters"), "an entry of models") for e in entries]
        names = [self._model(e, i) for e, i in zip(entries, items, strict=True)]
        if len(names) > MAX_MODELS:
            what = f"{len(names):,} models are too many for one merge"
            raise self.root.error("RG305", what, f"merge at most {MAX_MODELS:,}")
        if (i := Names({}).repeated(names)) is not None:
            raise entries[i].error("RG305", f"{names[i]} is listed twice among the models", "list it once")
        n = len(self._besides_base([Input(name) for name in names], self.base))
        inputs = tuple(Input(name, self._parameters(i, n, name)) for name, i in zip(names, items, strict=True))
        listed = self.base is not None and any(self.same(name, self.base) for name in names)
        if self.base is not None and not listed and not self.rule.reads_base:
            if not self.rule.base_first:
                what = f"{self.rule.name} uses no base, and base_model {self.base} is not among its models"
                raise self.top["base_model"].error("RG305", what, "list it under models, or remove it")
            inputs = (Input(self.base), *inputs)
        return self._checked_group(field, inputs, self.base)

    def _slices(self, field: Field) -> tuple[Slice, ...]:
        return tuple(self._slice(entry) for entry in field.entries("a list"))

    def _slice(self, field: Field) -> Slice:
        known = ("sources", "base_model", "parameters")
        items = field.check_keys((*known, *NOT_IN_SLICES), "a slice")
        for key, (what, fix) in NOT_IN_SLICES.items():
            if key in items and not items[key].is_null:
                raise items[key].error("RG309", what, fix)
        if "sources" not in items:
            raise field.error("RG303", "the slice has no sources", "add sources: [{model: ..., layer_range: [0, 4]}]")
        own = "base_model" in items and not items["base_model"].is_null
        base = self._reference(items["base_model"]) if own else self.base
        entries = items["sources"].entries("a list of {model: ..., layer_range: [0, 4]}")
        sources = []
        for entry in entries:
            one = entry.check_keys(("model", "layer_range", "parameters"), "a source")
            if "layer_range" not in one:
                raise entry.error("RG303", "the source has no layer_range", "add layer_range: [first, last]")
            sources.append((entry, one, self._model(entry, one), one["layer_range"].layers()))
        lengths = [high - low for *_, (low, high) in sources]
        if len(set(lengths)) > 1:
            what = f"the sources of a slice give different numbers of layers ({', '.join(map(str, lengths))})"
            raise items["sources"].error("RG303", what, "give ranges of one length")
        n = len(self._besides_base([Input(model) for _, _, model, _ in sources], base))
        inputs = tuple(Input(model, self._parameters(one, n, model), layers) for _, one, model, layers in sources)
        return Slice(self._checked_group(items["sources"], inputs, base), base, self._parameters(items, n))

    def _checked_group(self, field: Field, inputs: tuple[Input, ...], base: str | None) -> tuple[Input, ...]:
        """The models that are merged at one place, as many as the rule takes, with the base that it needs.

        For rules whose first model is what mergekit calls the base, they begin with it.
        """
        if base is None and (self.rule.needs_base or self.rule.base_first):
            what = f"{self.rule.name} needs a base model"
            raise field.error("RG304", what, "add base_model: <one of the models, or the one they come from>")
        self.rule.check_count(len(self._besides_base(inputs, base)), where=field.where)
        if not self.rule.base_first:
            return inputs
        first = [i for i in inputs if base is not None and self.same(i.model, base)]
        if not first:
            what = f"base_model {base} is not among the models of each slice"
            raise field.error("RG305", what, f"{self.rule.name} merges the base and one other model")
        return (*first, *(i for i in inputs if i not in first))

    def _count(self, inputs: Sequence[Input], slices: Sequence[Slice]) -> int:
        """How many models are merged besides the base: in the first slice, if there are slices."""
        if slices:
            return len(self._besides_base(slices[0].inputs, slices[0].base))
        return len(self._besides_base(inputs, self.base))

    def _besides_base(self, inputs: Sequence[Input], base: str | None) -> list[Input]:
        if base is None or not self.rule.reads_base:
            return list(inputs)
        return [i for i in inputs if not self.same(i.model, base)]

    def _parameters(self, items: dict[str, Field], n: int, model: str | None = None) -> dict[str, Setting]:
        """The `parameters` of one level; `model`: of this model's entry."""
        if "parameters" not in items or items["parameters"].is_null:
            return {}
        items = items["parameters"].items("a mapping of options")
        harmless = [n for n in WITHOUT_EFFECT.get(self.rule.name, ()) if n not in self.reader.names]
        kept = {name: item for name, item in items.items() if name not in harmless}
        return self.reader.settings(kept, max(n, 1), of_model=model is not None)

    def _model(self, entry: Field, items: dict[str, Field]) -> str:
        if "model" not in items:
            raise entry.error("RG303", "the entry names no model", "add model: <path or Hub id>")
        return self._reference(items["model"])

    def _reference(self, field: Field) -> str:
        """A text, or mergekit's longer form {model: {path, revision}, lora: {path, revision}}."""
        if not field.is_mapping:
            return self._checked(field, field.text("a path or Hub id"))
        items = field.check_keys(("model", "lora", "override_architecture"), "a model")
        if "override_architecture" in items and not items["override_architecture"].is_null:
            what = "override_architecture is not needed: what a tensor is, its name and the configuration tell"
            fix = "remove it; change architectures in the model's config.json if another class is to load the result"
            raise items["override_architecture"].error("RG309", what, fix)
        if "model" not in items:
            raise field.error("RG303", "the entry names no model", "add model: <path or Hub id>")
        parts = [_path(items[k]) for k in ("model", "lora") if k in items and not items[k].is_null]
        return self._checked(field, "+".join(parts))

    def _checked(self, field: Field, reference: str) -> str:
        """The reference; what another document makes has neither revisions nor adapters."""
        head = re.split(r"[@+]", reference)[0]
        if head in self.others and head != reference:
            what = f"{reference} asks for a revision of, or an adapter or delta on, what the document {head} makes"
            raise field.error("RG309", what, "apply adapters before merging")
        if reference == self.name and reference in self.others:
            raise field.error("RG307", f"the document {reference} refers to itself", "name another model")
        return reference

    def _dtype(self, key: str) -> str | None:
        return self.top[key].dtype() if self._has(key) else None

    def _vocabulary(self) -> VocabularyChoice | None:
        given = {k: self.top[k] for k in ("tokenizer_source", "tokenizer") if self._has(k)}
        if len(given) == 2:
            raise given["tokenizer"].error("RG303", "the recipe has tokenizer and tokenizer_source", "give one of them")
        if "tokenizer" in given:
            return read_tokenizer(given["tokenizer"], self._token_model, self.base, union_by_default=True)
        if "tokenizer_source" in given:
            return read_source(given["tokenizer_source"], self._token_model, self.base)
        return None

    def _token_model(self, field: Field) -> str:
        """A reference where the word base stands for base_model, which is not there if this is asked for it."""
        if field.value == "base":
            what = f"{field.key} is base, and the recipe has no base_model"
            raise field.error("RG304", what, "add base_model, or name a model")
        return self._reference(field)

    def _chat_template(self) -> str | None:
        field = self.top.get("chat_template")
        if field is None or field.is_null or field.value == "auto":
            return None
        return chat_template(field, "auto, ")

    def _has(self, key: str) -> bool:
        return key in self.top and not self.top[key].is_null


def _of_files(step: MergeStep) -> bool:
    """Whether a recipe merges bare files of weights, as for mergekit-pytorch, and asks for nothing that only models
    have."""
    more = (step.slices, step.modules, step.vocabulary, step.chat_template)
    return not any(more) and all(name.endswith(WEIGHT_SUFFIXES) for name in step.references)


def _path(field: Field) -> str:
    if not field.is_mapping:
        return field.text("a path or Hub id")
    items = field.check_keys(("path", "revision"), "a model")
    if "path" not in items:
        raise field.error("RG303", "the model has no path", "add path: <path or Hub id>")
    revision = items["revision"].text("a revision") if "revision" in items and not items["revision"].is_null else ""
    path = items["path"].text("a path or Hub id")
    return f"{path}@{revision}" if revision else path


def _rule(field: Field) -> Rule:
    name = field.text("the name of a method")
    known: dict[str, Rule] = {m.name: m for m in methods("merge")}
    if name in known and known[name].in_mergekit:
        return known[name]
    if name in known:
        what = f"{name} is a method of regraft that mergekit does not have"
        raise field.error("RG309", what, f"write a regraft recipe: steps: {{merged: {{merge: {name}, ...}}}}")
    ours = sorted(n for n, r in known.items() if r.in_mergekit)
    close = difflib.get_close_matches(name, ours, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise field.error("RG301", f"unknown merge method {name!r}", f"{hint}(known: {', '.join(ours)})")
