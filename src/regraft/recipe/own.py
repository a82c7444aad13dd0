"""regraft's own recipes: named models, and steps in order, each with a verb that names its method.

    models: {base: org/base@rev, maths: org/maths, code: ./code+./code-lora}
    steps:
      merged: {merge: ties, base: base, models: {maths: {weight: 0.6}, code: {weight: 0.4}}, density: 0.2}
      score: {evaluate: accuracy, models: [base, merged], data: test.parquet}

Names are defined before they are used, so that the order of the file is the order of the work. Every value is checked
here, where its line is known; what depends on the models themselves is left to the plan.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from regraft.adapters.factors import Truncation
from regraft.errors import UserError, nearest
from regraft.merge.rule import Rule
from regraft.methods import ROOMS, method
from regraft.recipe.chat_templates import chat_template
from regraft.recipe.document import (
    MAX_MODELS,
    MAX_STEPS,
    OUTPUTS,
    STATE_DICT,
    TENSORS,
    EvaluateStep,
    Input,
    MakeStep,
    MergeStep,
    Recipe,
    Setting,
    Slice,
    VocabularyChoice,
)
from regraft.recipe.fields import Field
from regraft.recipe.names import Names, check_name
from regraft.recipe.option_values import OptionReader
from regraft.recipe.own_make import MAKE_VERBS, read_make
from regraft.recipe.sweep import Member, read_sweep
from regraft.recipe.tokens import read_source, read_tokenizer

TOP_KEYS = ("models", "steps", "seed")
MERGE_KEYS = (
    "merge",
    "base",
    "models",
    "slices",
    "dtype",
    "out_dtype",
    "exclude",
    "config_from",
    "tokenizer_from",
    "tokenizer",
    "chat_template",
    "seed",
    "sweep",
    "output",
    "rank",
    "energy",
    "max_rank",
    "tensors",
)
EVALUATE_KEYS = ("evaluate", "models", "data")
MAX_SEED = 2**63 - 1


def read_recipe(root: Field, *, path: Path | None, text: str) -> Recipe:
    """The typed form of a recipe in regraft's own language.

    Raises:
        UserError: RG301 to RG309, with file, line, step and key.
    """
    top = root.check_keys(TOP_KEYS, "a recipe")
    if "steps" not in top:
        raise root.error("RG303", "the recipe has no steps", "add steps: {merged: {merge: linear, models: [...]}}")
    seed = top["seed"].integer(0, MAX_SEED) if "seed" in top else 0
    models = _models(top["models"]) if "models" in top else {}
    bodies = top["steps"].items("a mapping: the name of each step and what it does")
    if not bodies:
        raise top["steps"].error("RG303", "the recipe has no steps", "add one: merged: {merge: linear, models: [...]}")
    names = Names(models, tuple(bodies))
    steps: list[MergeStep | MakeStep | EvaluateStep] = []
    for name, entry in bodies.items():
        check_name(entry, name, "step")
        if name in models:
            raise entry.error("RG307", f"{name} is the name of a model and of a step", "rename one of them")
        body = entry.in_step(name)
        verb = _verb(body)
        if verb in MAKE_VERBS:
            steps.append(read_make(body, verb, names, seed))
            names.done[name] = [name]
        elif verb == "merge":
            members = _Merge(body, names, seed).steps()
            names.done[name] = [s.name for s in members]
            steps += members
            if len(steps) > MAX_STEPS:
                what = f"the recipe has more than {MAX_STEPS:,} steps, with the members of sweeps"
                raise entry.error("RG303", what, "write several recipes")
        else:
            steps.append(_evaluate(body, names))
            names.scores.add(name)
    return Recipe(models, tuple(steps), path, text)


def _models(field: Field) -> dict[str, str]:
    found = {}
    for name, entry in field.items("a mapping: names and what they stand for").items():
        check_name(entry, name, "model")
        found[name] = entry.text("a path, or the id of a model on the Hub")
    return found


def _verb(body: Field) -> str:
    keys = body.items("a mapping, such as {merge: linear, models: [...]}")
    verbs = [verb for verb in ROOMS if verb in keys]
    if len(verbs) == 1:
        return verbs[0]
    if verbs:
        raise body.error("RG302", f"the step has several verbs: {', '.join(verbs)}", "make a step for each")
    first = next(iter(keys), "")
    what = f"the step does not say what it does (its first key is {first!r})" if first else "the step is empty"
    raise body.error("RG302", what, f"begin with a verb: {nearest(first, ROOMS)}")


class _Merge:
    """Reads the body of one merge step."""

    def __init__(self, body: Field, names: Names, seed: int) -> None:
        self.body, self.names = body, names
        self.items = body.items()
        self.rule: Rule = method("merge", self.items["merge"].text("a method"), where=self.items["merge"].where)
        self.reader = OptionReader(self.rule)
        known = [*MERGE_KEYS, *self.reader.names]
        body.check_keys(known, f"a step with merge: {self.rule.name}")
        self.seed = self.items["seed"].integer(0, MAX_SEED) if "seed" in self.items else seed

    def steps(self) -> list[MergeStep]:
        """The step, or the members of its sweep."""
        if ("models" in self.items) == ("slices" in self.items):
            found = "both models and slices" if "models" in self.items else "neither models nor slices"
            raise self.body.error("RG303", f"the step has {found}", "give one of them")
        inputs, slices, base, n = self._inputs()
        groups = [s.inputs for s in slices] or [inputs]
        self.reader = replace(self.reader, models=[i.model for group in groups for i in group])
        own = {k: v for k, v in self.items.items() if k in self.reader.names and k not in MERGE_KEYS}
        settings = self.reader.settings(own, n)
        members = [Member()]
        if "sweep" in self.items:
            hidden = set.intersection(*(set(i.settings) for group in groups for i in group))
            hidden |= set.intersection(*(set(s.settings) for s in slices)) if slices else set()
            members = read_sweep(self.items["sweep"], self.reader, n, hidden)
        self._check_required(inputs, slices, {*settings, *members[0].settings})
        dtype, out_dtype = (self.items[k].dtype() if k in self.items else None for k in ("dtype", "out_dtype"))
        config, tokenizer = (
            self.names.one(self.items[k]) if k in self.items else None for k in ("config_from", "tokenizer_from")
        )
        vocabulary = self._vocabulary(base)
        exclude, template = self._exclude(), self._chat_template()
        output, cut = self._output()
        tensors = self._tensors(output)
        return [
            MergeStep(
                name=self.body.step + member.suffix,
                method=self.rule.name,
                base=base,
                inputs=inputs,
                slices=slices,
                settings={**settings, **member.settings},
                dtype=dtype,
                out_dtype=out_dtype,
                exclude=exclude,
                config_from=config,
                tokenizer_from=vocabulary.source if vocabulary is not None else tokenizer,
                vocabulary=vocabulary,
                chat_template=template,
                seed=self.seed if member.seed is None else member.seed,
                where=self.body.where,
                sweep=member.values,
                output=output,
                cut=cut,
                tensors=tensors,
            )
            for member in members
        ]

    def _inputs(self) -> tuple[tuple[Input, ...], tuple[Slice, ...], str | None, int]:
        """(models, slices, base, number of models besides the base)."""
        base = self.names.one(self.items["base"]) if "base" in self.items else None
        if "slices" in self.items:
            slices, base = self._slices(base)
            self._check_base(base)
            return (), slices, base, len(slices[0].inputs)
        self._check_base(base)
        given = self.items["models"]
        entries = given.items() if given.is_mapping else {}
        listed = list(entries.values()) or given.entries("a list of models, or a mapping with options for each")
        names = [self.names.one(self._named(e)) if given.is_mapping else self.names.one(e) for e in listed]
        _check_number(given, len(listed))
        if (i := self.names.repeated(names)) is not None:
            raise listed[i].error("RG305", f"{names[i]} is listed twice among the models", "list it once")
        for entry, name in zip(listed, names, strict=True):
            self._check_single(entry, name, base)
        first = [base] if self.rule.base_first and base is not None else []
        n = len(first) + len(names)
        self.rule.check_count(n, where=given.where)
        settings = [self._of_model(e, n) if given.is_mapping else {} for e in listed]
        inputs = [Input(name) for name in first] + [Input(*pair) for pair in zip(names, settings, strict=True)]
        return tuple(inputs), (), base, n

    def _named(self, entry: Field) -> Field:
        """The key of a mapping `models:` as a text to look up."""
        return Field(type(entry.node)(entry.key, entry.node.line, entry.key), entry.file, entry.path, entry.step)

    def _of_model(self, entry: Field, n: int) -> dict[str, Setting]:
        if entry.is_null:
            return {}
        return self.reader.settings(entry.items("the model's options, such as {weight: 0.5}"), n, of_model=True)

    def _check_single(self, entry: Field, name: str, base: str | None) -> None:
        uses_base = self.rule.reads_base or self.rule.base_first
        if base is not None and uses_base and self.names.same(name, base):
            what = f"the base is also listed among the models ({name})"
            raise entry.error("RG305", what, "list only the other models")

    def _check_base(self, base: str | None) -> None:
        if self.rule.needs_base and base is None:
            fix = "add base: <the model that the others were fine-tuned from>"
            raise self.body.error("RG304", f"{self.rule.name} needs a base model", fix)

    def _slices(self, base: str | None) -> tuple[tuple[Slice, ...], str | None]:
        entries = self.items["slices"].entries("a list of {models: [{model: ..., layers: [first, last]}]}")
        counts = []
        slices = []
        for entry in entries:
            items = entry.check_keys(("models", "base", *self.reader.names), "a slice")
            if "models" not in items:
                raise entry.error("RG303", "the slice has no models", "add models: [{model: ..., layers: [0, 4]}]")
            if "base" in items:
                own = self.names.one(items["base"])
                if base is not None and not self.names.same(own, base):
                    raise items["base"].error("RG309", f"the step has two bases, {base} and {own}", "use one base")
                base = own
            listed = items["models"].entries("a list of {model: ..., layers: [first, last]}")
            n = len(listed)
            _check_number(items["models"], n)
            self.rule.check_count(n, where=items["models"].where)
            inputs = tuple(self._slice_input(e, n) for e in listed)
            _check_lengths(items["models"], inputs)
            wide = {k: v for k, v in items.items() if k not in ("models", "base")}
            reader = replace(self.reader, models=[i.model for i in inputs])
            slices.append(Slice(inputs, None, reader.settings(wide, n)))
            counts.append(n)
        if len(set(counts)) > 1:
            what = f"the slices have different numbers of models ({', '.join(map(str, counts))})"
            raise self.items["slices"].error("RG305", what, "give each slice the same number")
        return tuple(replace(piece, base=base) for piece in slices), base

    def _slice_input(self, entry: Field, n: int) -> Input:
        items = entry.check_keys(("model", "layers", *self.reader.names), "a model of a slice")
        for key in ("model", "layers"):
            if key not in items:
                raise entry.error("RG303", f"a model of a slice needs {key!r}", "write {model: ..., layers: [0, 4]}")
        options = {k: v for k, v in items.items() if k not in ("model", "layers")}
        settings = self.reader.settings(options, n, of_model=True)
        return Input(self.names.one(items["model"]), settings, items["layers"].layers())

    def _check_required(self, inputs: tuple[Input, ...], slices: tuple[Slice, ...], wide: set[str]) -> None:
        for name, attribute in self.reader.names.items():
            if not self.rule.options.model_fields[attribute].is_required() or name in wide:
                continue
            for group, level in [(s.inputs, s.settings) for s in slices] or [(inputs, {})]:
                missing = [i.model for i in group if name not in i.settings and name not in level]
                if missing:
                    who = f" for {missing[0]}" if name in self.reader.per_model else ""
                    raise self.body.error("RG303", f"{self.rule.name} needs {name!r}{who}", f"add {name}: ...")

    def _output(self) -> tuple[str, Truncation | None]:
        """What the step makes, and where an adapter is cut off."""
        output = self.items["output"].text(f"one of {', '.join(OUTPUTS)}") if "output" in self.items else "model"
        if output not in OUTPUTS:
            raise self.items["output"].error("RG303", f"output is {output!r}", nearest(output, OUTPUTS))
        given = {key: self.items[key] for key in ("rank", "energy", "max_rank") if key in self.items}
        if not given:
            return output, None
        first = next(iter(given.values()))
        if output != "lora":
            raise first.error("RG303", f"{first.key} is for adapters", "add output: lora, or leave it out")
        try:
            return output, Truncation(**{key: item.value for key, item in given.items()})
        except UserError as error:
            raise first.error(error.code, error.what, error.fix) from None

    def _tensors(self, output: str) -> str:
        """What becomes of tensors that only some state dicts have."""
        if "tensors" not in self.items:
            return "same"
        item = self.items["tensors"]
        tensors = item.text(f"one of {', '.join(TENSORS)}")
        if tensors not in TENSORS:
            raise item.error("RG303", f"tensors is {tensors!r}", nearest(tensors, TENSORS))
        if output != STATE_DICT:
            raise item.error("RG303", "tensors is for state dicts", f"add output: {STATE_DICT}, or leave it out")
        return tensors

    def _exclude(self) -> tuple[str, ...]:
        if "exclude" not in self.items:
            return ()
        item = self.items["exclude"]
        listed = item.entries("regular expressions") if item.is_list else [item]
        return tuple(e.text("a regular expression for tensor names") for e in listed)

    def _vocabulary(self, base: str | None) -> VocabularyChoice | None:
        if "tokenizer" not in self.items:
            return None
        field = self.items["tokenizer"]
        if "tokenizer_from" in self.items:
            fix = "give tokenizer alone, for vocabularies that differ, or tokenizer_from for files"
            raise field.error("RG303", "the step has tokenizer and tokenizer_from", fix)
        word = None if self._is_name("base") else base
        if not field.is_mapping:
            return read_source(field, self._token_model, word)
        return read_tokenizer(field, self._token_model, word, union_by_default=False)

    def _is_name(self, text: str) -> bool:
        return text in self.names.models or text in self.names.done

    def _token_model(self, field: Field) -> str:
        if field.value == "base" and not self._is_name("base"):
            what = f"{field.key} is base, and the step has no base"
            raise field.error("RG304", what, "add base, or name a model")
        return self.names.one(field)

    def _chat_template(self) -> str | None:
        if "chat_template" not in self.items:
            return None
        return chat_template(self.items["chat_template"])


def _check_number(field: Field, n: int) -> None:
    if n > MAX_MODELS:
        raise field.error("RG305", f"{n:,} models are too many for one merge", f"merge at most {MAX_MODELS:,}")


def _check_lengths(field: Field, inputs: tuple[Input, ...]) -> None:
    lengths = [high - low for low, high in (i.layers or (0, 0) for i in inputs)]
    if len(set(lengths)) > 1:
        what = f"the models of a slice give different numbers of layers ({', '.join(map(str, lengths))})"
        raise field.error("RG303", what, "give ranges of one length")


def _evaluate(body: Field, names: Names) -> EvaluateStep:
    items = body.items()
    metric = method("evaluate", items["evaluate"].text("a metric"), where=items["evaluate"].where)
    reader = OptionReader(metric)
    body.check_keys([*EVALUATE_KEYS, *reader.names], f"a step with evaluate: {metric.name}")
    if "models" not in items:
        raise body.error("RG303", "the step names no models to evaluate", "add models: [...]")
    given = items["models"]
    listed = given.entries("a list of models") if given.is_list else [given]
    models = list(dict.fromkeys(name for e in listed for name in names.several(e)))
    options = {}
    for key, item in items.items():
        if key not in EVALUATE_KEYS:
            options[key] = reader.check(key, item, 1)
    data = items["data"].text("the path of a data file") if "data" in items else ""
    return EvaluateStep(body.step, metric.name, tuple(models), data, options, body.where)
