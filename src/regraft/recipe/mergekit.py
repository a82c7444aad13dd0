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

from regraft.merge.rule import Rule
from regraft.methods import methods
from regraft.recipe.chat_templates import chat_template
from regraft.recipe.document import MAX_MODELS, Input, MergeStep, Recipe, Setting, Slice, VocabularyChoice
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
    inputs = [*step.inputs, *(i for piece in step.slices for i in piece.inputs)]
    named = [*(i.model for i in inputs), step.base, step.tokenizer_from]
    return {name for name in named if name is not None and name in steps}


class _Reader:
    """Reads one file. References are texts of the form model[@revision][+adapter]."""

    def __init__(self, root: Field, name: str, others: Collection[str] = ()) -> None:
        self.root, self.name, self.others = root, name, others
        self.top = root.check_keys(TOP_KEYS, "a mergekit recipe")
        self._refuse("modules", "regraft does not merge the modules of a model one by one", "merge whole models")
        self.rule = _rule(self.top["merge_method"])
        self.reader = OptionReader(self.rule, "mergekit")
        self.base = self._reference(self.top["base_model"]) if self._has("base_model") else None
        self.same = Names({}).same

    def step(self) -> MergeStep:
        """The file as one merge step."""
        given = [k for k in ("models", "slices") if self._has(k)]
        if len(given) != 1:
            what = "the recipe has both models and slices" if given else "the recipe has neither models nor slices"
            raise self.root.error("RG303", what, "give one of them")
        entries = self.top[given[0]].entries("a list")
        if given == ["slices"]:
            self._promote_base(entries)
        if self.base is None and (self.rule.needs_base or self.rule.base_first):
            what = f"{self.rule.name} needs a base model"
            raise self.root.error("RG304", what, "add base_model: <one of the models, or the one they come from>")
        inputs = self._inputs(entries) if given == ["models"] else ()
        slices = tuple(self._slice(e) for e in entries) if given == ["slices"] else ()
        groups = [s.inputs for s in slices] or [inputs]
        where = f"{self.root.file}, line {self.top[given[0]].node.line}, {given[0]}"
        for group in groups:
            self.rule.check_count(len(self._besides_base(group)), where=where)
        if slices and self.rule.base_first:
            slices = tuple(replace(s, inputs=self._base_in_front(s.inputs)) for s in slices)
        settings = self._parameters(self.top, len(self._besides_base(groups[0])))
        dtype, out_dtype = (self._dtype(key) for key in ("dtype", "out_dtype"))
        vocabulary = self._vocabulary()
        return MergeStep(
            name=self.name,
            method=self.rule.name,
            base=self.base,
            inputs=inputs,
            slices=slices,
            settings=settings,
            dtype=dtype,
            out_dtype=out_dtype,
            tokenizer_from=vocabulary.source if vocabulary is not None else None,
            vocabulary=vocabulary,
            chat_template=self._chat_template(),
            dialect="mergekit",
            where=f"{self.root.file}, line {self.top['merge_method'].node.line}, merge_method {self.rule.name}",
        )

    def _inputs(self, entries: list[Field]) -> tuple[Input, ...]:
        items = [e.check_keys(("model", "parameters"), "an entry of models") for e in entries]
        names = [self._model(e, i) for e, i in zip(entries, items, strict=True)]
        if len(names) > MAX_MODELS:
            what = f"{len(names):,} models are too many for one merge"
            raise self.root.error("RG305", what, f"merge at most {MAX_MODELS:,}")
        if (i := Names({}).repeated(names)) is not None:
            raise entries[i].error("RG305", f"{names[i]} is listed twice among the models", "list it once")
        n = len(self._besides_base([Input(name) for name in names]))
        inputs = tuple(Input(name, self._parameters(i, n, name)) for name, i in zip(names, items, strict=True))
        listed = self.base is not None and any(self.same(name, self.base) for name in names)
        if self.base is not None and not listed and not self.rule.reads_base:
            if not self.rule.base_first:
                what = f"{self.rule.name} uses no base, and base_model {self.base} is not among its models"
                raise self.top["base_model"].error("RG305", what, "list it under models, or remove it")
            inputs = (Input(self.base), *inputs)
        return self._base_in_front(inputs) if self.rule.base_first else inputs

    def _promote_base(self, slices: list[Field]) -> None:
        """A base_model that slices name is the recipe's, as long as there is only one."""
        for field in slices:
            items = field.items("{sources: [...]}")
            if "base_model" in items and not items["base_model"].is_null:
                own = self._reference(items["base_model"])
                if self.base is not None and not self.same(own, self.base):
                    what = f"the recipe has two base models, {self.base} and {own}"
                    raise items["base_model"].error("RG309", what, "use one base_model for all slices")
                self.base = own

    def _slice(self, field: Field) -> Slice:
        items = field.check_keys(("sources", "base_model", "parameters", "residual_weight"), "a slice")
        if "residual_weight" in items:
            raise items["residual_weight"].error("RG309", "regraft has no residual_weight", "remove it")
        if "sources" not in items:
            raise field.error("RG303", "the slice has no sources", "add sources: [{model: ..., layer_range: [0, 4]}]")
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
        n = len(self._besides_base([Input(model) for _, _, model, _ in sources]))
        inputs = tuple(Input(model, self._parameters(one, n, model), layers) for _, one, model, layers in sources)
        return Slice(inputs, None, self._parameters(items, n))

    def _besides_base(self, inputs: tuple[Input, ...] | list[Input]) -> list[Input]:
        if self.base is None or not self.rule.reads_base:
            return list(inputs)
        return [i for i in inputs if not self.same(i.model, self.base)]

    def _base_in_front(self, inputs: tuple[Input, ...]) -> tuple[Input, ...]:
        """For rules whose first model is what mergekit calls the base."""
        first = [i for i in inputs if self.base is not None and self.same(i.model, self.base)]
        if not first:
            what = f"base_model {self.base} is not among the models of each slice"
            raise self.root.error("RG305", what, f"{self.rule.name} merges the base and one other model")
        return (*first, *(i for i in inputs if i not in first))

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
            raise items["override_architecture"].error("RG309", "regraft does not override architectures", "remove it")
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

    def _refuse(self, key: str, what: str, fix: str) -> None:
        if key in self.top:
            raise self.top[key].error("RG309", what, fix)


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
