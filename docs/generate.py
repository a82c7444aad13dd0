"""The pages that are made from the code: one per method, one per command, the error codes.

`pages()` gives them as Markdown by the path that they have in the site; `hooks.py` hands them to MkDocs, the tests run
the recipes on them. Nothing here is written to disk, so no page can be out of date.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import typer.main

from regraft.axes.families import FAMILIES
from regraft.claims.catalogue import markdown, read_records
from regraft.cli.main import app
from regraft.cli.methods import option_facts
from regraft.errors import CODES
from regraft.inspect.metric import Metric
from regraft.merge.rule import REQUIRED, Rule
from regraft.methods import Method, methods
from regraft.train.making import Maker

ROOT = Path(__file__).parents[1]
VERBS = {"merge": "Merge rules", "compress": "Compression", "train": "Training", "evaluate": "Metrics"}
RANGES = {
    "1": "Files",
    "2": "Models that do not fit together",
    "3": "Recipes and options",
    "4": "Output and resources",
    "5": "Network",
    "6": "Data and evaluation",
    "9": "Claims",
}
# Data that methods take in their examples, where it is not the usual texts; the files of the tests.
EXAMPLES = {
    "ssld": {"data": "images.jsonl", "unlabelled": "more.jsonl"},
    "pretrained_distillation": {"data": "domain.jsonl", "corpus": "texts.jsonl"},
    "gpt4image": {"data": "described.jsonl"},
}
# Names that the recipes on these pages give to their models, in this order.
EXPERTS = ("maths", "code")


def pages() -> dict[str, str]:
    """All generated pages: path below docs/ -> Markdown."""
    made = {"methods/index.md": _methods_index(), "commands/index.md": _commands_index(), "errors.md": _errors()}
    for one in methods():
        made[f"methods/{one.name}.md"] = _method(one)
    for name, command in _commands().items():
        made[f"commands/{name}.md"] = _command(name, command)
    made["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    made["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return made


def nav() -> list[dict[str, Any]]:
    """What the generated pages add to the navigation."""
    rooms = [{title: [f"methods/{m.name}.md" for m in methods(room)]} for room, title in VERBS.items()]
    return [
        {"Methods": ["methods/index.md", *rooms]},
        {"Commands": ["commands/index.md", *(f"commands/{name}.md" for name in _commands())]},
        {"Error codes": "errors.md"},
        {"Project": [{"Contributing": "contributing.md"}, {"Changelog": "changelog.md"}]},
    ]


def rule_table(link: str) -> str:
    """All merge rules. `link` is the place of a rule's page, such as `methods/{}.md`; "" for no links."""
    rows = ["| Rule | What it does | Models | Base | Paper |", "|---|---|---|---|---|"]
    for rule in methods("merge"):
        name = f"[`{rule.name}`]({link.format(rule.name)})" if link else f"`{rule.name}`"
        rows.append(f"| {name} | {rule.summary} | {_count(rule)} | {_base(rule)} | {_papers(rule)} |")
    return "\n".join(rows)


def families() -> str:
    """The model types whose layers are known from a table."""
    return ", ".join(f"`{name}`" for name in sorted(FAMILIES))


def performance() -> str:
    """What the benchmark of speed has measured, from its files of results."""
    return str(_benchmark("tables").pages(ROOT / "benchmarks" / "results"))


def zoo() -> str:
    """The models that the claims start from, from what was measured when they were made."""
    return markdown(read_records(ROOT / "claims" / "results"))


def parity() -> str:
    """How the results of mergekit's recipes compare, from the stored comparison."""
    return str(_benchmark("parity_table").page(ROOT / "benchmarks" / "results" / "parity.json"))


def latency() -> str:
    """How long low-rank models take, from the stored measurement."""
    return str(_benchmark("training_tables").latency(ROOT / "benchmarks" / "results" / "low_rank_latency.json"))


def overhead() -> str:
    """What the training loop costs, from the stored measurement."""
    return str(_benchmark("training_tables").overhead(ROOT / "benchmarks" / "results" / "train_overhead.json"))


def minilm() -> str:
    """What became of MiniLM with half of its matrices, from the stored run."""
    return str(_benchmark("training_tables").minilm(ROOT / "benchmarks" / "results" / "minilm_low_rank.json"))


def _benchmark(name: str) -> ModuleType:
    """A module beside the benchmarks; those that make tables need nothing but the standard library."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_recipe(method: Method) -> str:
    """A recipe that runs, with every option of the method at its default."""
    if isinstance(method, Metric):
        return (
            "models:\n  base: org/base\n  maths: org/maths\nsteps:\n  scores:\n"
            f"    evaluate: {method.name}\n    models: [base, maths]\n"
            + ("    data: test.jsonl\n" if method.data == "needed" else "    tasks: [arc_easy, hellaswag]\n")
        )
    if isinstance(method, Maker):
        return _making_recipe(method)
    names = _members(method)
    lines = ["models:"]
    lines += [f"  {name}: org/{name}" for name in (*(["base"] if method.needs_base else []), *names)]
    lines += ["steps:", "  merged:", f"    merge: {method.name}"]
    lines += ["    base: base"] if method.needs_base else []
    lines.append(f"    models: [{', '.join(names)}]")
    for option in option_facts(method):
        if option["default"] is not None and option["name"] != "int8_mask":
            lines.append(f"    {option['name']}: {_yaml(option['default'])}")
    return "\n".join(lines) + "\n"


def _making_recipe(maker: Maker[Any]) -> str:
    """A recipe that runs one method, with what is needed and a short training."""
    roles = [role for role, needed in maker.roles.items() if needed]
    lines = ["models:", "  base: org/base", *(["  expert: org/maths"] if roles else [])]
    lines += ["steps:", "  made:", f"    {maker.room}: {maker.name}", "    model: base"]
    lines += [f"    {role}: expert" for role in roles]
    lines += [f"    {key}: {file}" for key, file in _example_data(maker).items()]
    if "max_steps" in maker.options.model_fields:
        lines += ["    max_steps: 2", "    per_device_train_batch_size: 4", "    warmup_ratio: 0.1"]
    return "\n".join(lines) + "\n"


def _example_data(maker: Maker[Any]) -> dict[str, str]:
    return EXAMPLES.get(maker.name, {"data": "texts.jsonl"} if maker.data != "none" else {})


def mergekit_recipe(rule: Rule[Any]) -> str:
    """The same merge as a mergekit file, with what mergekit requires."""
    names = _members(rule)
    facts = {o["name"]: o for o in option_facts(rule)}
    required = [facts[n] for n, value in rule.mergekit_defaults.items() if value is REQUIRED]
    of_models = [o for o in required if o["per_model"]]
    of_all = [o for o in required if not o["per_model"]]
    lines = [f"merge_method: {rule.name}"]
    if rule.needs_base or rule.base_first:
        lines.append(f"base_model: org/{'base' if rule.needs_base else names[0]}")
    lines.append("models:")
    for name in names:
        lines.append(f"  - model: org/{name}")
        if of_models:
            lines.append(f"    parameters: {_flow(of_models)}")
    if of_all:
        lines.append(f"parameters: {_flow(of_all)}")
    return "\n".join([*lines, "dtype: float32", ""])


def _flow(options: list[dict[str, Any]]) -> str:
    return "{" + ", ".join(f"{o['name']}: {_yaml(o['default'])}" for o in options) + "}"


def _members(rule: Any) -> tuple[str, ...]:
    return EXPERTS[: min(rule.max_models or 2, 2)]


def _method(method: Method) -> str:
    kinds = {"merge": "merge rule", "compress": "way to compress", "train": "way to train", "evaluate": "metric"}
    verb = kinds[method.room]
    parts = [f"# {method.name}", f"*A {verb}: {method.summary}.*", method.doc.strip()]
    if isinstance(method, Rule):
        parts.append(f"Models: {_count(method)}. Base: {_base(method)}.")
    if isinstance(method, Maker) and method.sources:
        named = "\n".join(f"- `{name}`: {what}." for name, what in method.sources.items())
        parts += ["## Further data", f"Beside `data` a step may name, relative to its recipe:\n\n{named}"]
    parts += ["## Options", _options(method), "## Recipe"]
    if isinstance(method, Rule):
        parts.append("Every option that has a default stands at it; leave out what you do not change.")
    parts.append(f'```yaml title="{method.name}.yaml"\n{own_recipe(method)}```')
    if isinstance(method, Rule):
        if method.in_mergekit:
            parts += ["As a mergekit file:", f'```yaml title="mergekit.yaml"\n{mergekit_recipe(method)}```']
        else:
            parts.append("mergekit does not have this method.")
        parts += ["## In Python", _python(method)]
    elif isinstance(method, Maker):
        parts += ["## In Python", _python_maker(method)]
    else:
        parts += ["## In Python", _python_metric(method)]
    if method.papers:
        cited = [f"- {p.cite()}" + (f" ([arXiv]({p.url}))" if p.url else "") for p in method.papers]
        parts += ["## Papers", "\n".join(cited)]
        parts += _own_checks(method)
    return "\n\n".join(parts) + "\n"


def _own_checks(method: Method) -> list[str]:
    """What our own experiments on the method's papers found, whether they held or not; nothing if there are none."""
    numbers = {paper.number for paper in method.papers if paper.number}
    found = []
    for path in sorted((ROOT / "claims" / "results").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.get("claim") in numbers:
            seeds = len(told.get("seeds", {}))
            found.append(f"- {told['sentence']} **{told['verdict']}** over {seeds} seeds ([figures](../claims.md)).")
    return ["## Our own checks", "\n".join(found)] if found else []


def _options(method: Method) -> str:
    with_mergekit = isinstance(method, Rule) and method.in_mergekit and bool(method.mergekit_defaults)
    head = ["Option", "Values", "Default", *(["In mergekit recipes"] if with_mergekit else []), "Meaning"]
    rows = [_row(head), _row(["---"] * len(head))]
    for option in option_facts(method):
        meaning = option["description"] + (" (one for all models, or one each)" if option["per_model"] else "")
        cells = [f"`{option['name']}`", option["values"], _default(option)]
        if isinstance(method, Rule) and with_mergekit:
            cells.append(_in_mergekit(method, option) or "the same")
        rows.append(_row([*cells, meaning]))
    return "\n".join(rows)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(c.replace(" | ", " or ").replace("|", "\\|") for c in cells) + " |"


def _default(option: dict[str, Any]) -> str:
    if option["required"]:
        return "required"
    return "none" if option["default"] is None else f"`{_yaml(option['default'])}`"


def _in_mergekit(rule: Rule[Any], option: dict[str, Any]) -> str:
    """The default in a mergekit recipe where it differs, in mergekit's spelling; "" where it does not."""
    name = option["name"]
    if not rule.in_mergekit or name not in rule.mergekit_defaults:
        return ""
    value = rule.mergekit_defaults[name]
    if value is REQUIRED:
        return "required"
    spelt = next((theirs for theirs, ours in rule.mergekit_values.get(name, {}).items() if ours == value), value)
    means = f" (our `{_yaml(value)}`)" if spelt != value else ""
    return f"`{_yaml(spelt)}`{means}"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _python(rule: Rule[Any]) -> str:
    names = ["a", "b"][: len(_members(rule))]
    base = ", base=base" if rule.needs_base else ""
    tensors = [*names, *(["base"] if rule.needs_base else [])]
    made = "\n".join(f'{name} = {{"layers.0.weight": torch.randn(8, 8)}}' for name in tensors)
    if rule.name == "layer_swap":
        return "It needs to know in which layer a tensor is, so it is used on models, through a recipe."
    call = f"merged = merge.{rule.name}([{', '.join(names)}]{base})"
    return f"Tensors, or state dicts:\n\n```python\nimport torch\nfrom regraft import merge\n\n{made}\n{call}\n```"


def _python_metric(metric: Metric[Any]) -> str:
    name = metric.name
    given = '"test.jsonl"' if metric.data == "needed" else 'tasks=["arc_easy"]'
    code = (
        f'from regraft.inspect.metrics.{name} import {name}\n\nscore = {name}("org/base", {given})\n'
        "print(score.value, score.interval)"
    )
    return f"```python\n{code}\n```"


def _python_maker(maker: Maker[Any]) -> str:
    arguments = ['"org/base"', *(f'{role}="org/maths"' for role, needed in maker.roles.items() if needed)]
    arguments += [f'{key}="{file}"' for key, file in _example_data(maker).items()]
    arguments += ['folder="checkpoints"', *(["max_steps=2"] if "max_steps" in maker.options.model_fields else [])]
    batch = maker.options.model_fields.get("per_device_train_batch_size")
    if batch is not None and batch.default > 8:  # more than the example's data fills
        arguments.append("per_device_train_batch_size=4")
    home = "regraft.resize.methods" if maker.room == "compress" else "regraft.train.methods"
    call = f"made = {maker.name}({', '.join(arguments)})"
    code = f"from {home}.{maker.name} import {maker.name}\n\n{call}\nprint(made.diagnostics)"
    return f"```python\n{code}\n```"


def _count(rule: Rule[Any]) -> str:
    low, high = rule.min_models, rule.max_models
    if high == low:
        return str(low)
    return f"{low} or more" if high is None else f"{low} to {high}"


def _base(rule: Rule[Any]) -> str:
    if rule.needs_base:
        return "required"
    return "optional" if rule.takes_base else "the first model may be named so" if rule.base_first else "none"


def _papers(method: Method) -> str:
    cited = (f"[{p.arxiv}]({p.url})" if p.arxiv else f"{p.authors}, {p.venue}" for p in method.papers)
    return ", ".join(cited) or "—"


def _methods_index() -> str:
    parts = [
        "# Methods",
        "Each method is one file; this list, its page and the schema of recipes are made from it. "
        "`regraft methods NAME` prints the same in a terminal.",
        "## Merge rules",
        rule_table("{}.md"),
        "## Compression",
        _maker_table("compress"),
        "## Training",
        _maker_table("train"),
        "## Metrics",
        "| Metric | What it measures |\n|---|---|",
    ]
    parts[-1] += "".join(f"\n| [`{m.name}`]({m.name}.md) | {m.summary} |" for m in methods("evaluate"))
    return "\n\n".join(parts) + "\n"


def _maker_table(room: str) -> str:
    rows = ["| Method | What it does | Paper |", "|---|---|---|"]
    rows += [f"| [`{m.name}`]({m.name}.md) | {m.summary} | {_papers(m)} |" for m in methods(room)]
    return "\n".join(rows)


def _errors() -> str:
    parts = [
        "# Error codes",
        "A command that ends with one of these says in one sentence what is wrong, where, and what to do. The exit "
        "status is 2, and nothing has been written, except that a run keeps the steps that it had finished.",
    ]
    for digit, title in RANGES.items():
        parts.append(f"## {title}")
        for code, (name, meaning) in CODES.items():
            if code.startswith(f"RG{digit}"):
                parts.append(f"### {code}: {name}\n\n{meaning}")
    return "\n\n".join(parts) + "\n"


def _commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _commands_index() -> str:
    main = typer.main.get_command(app)
    rows = [f"| [`regraft {name}`]({name}.md) | {_flat(command.help)} |" for name, command in _commands().items()]
    return "\n\n".join(
        [
            "# Commands",
            _flat(main.help),
            "\n".join(["| Command | What it does |", "|---|---|", *rows]),
            "Results go to stdout; progress, notes and errors to stderr. The exit status is 0 if all is done, 2 if the "
            "input is wrong, 130 after Ctrl-C, 1 for anything else.",
            "## Options of `regraft` itself",
            _parameters(main),
        ]
    )


def _command(name: str, command: Any) -> str:
    """The page of a command; of a group of commands, one section for each."""
    inner = getattr(command, "commands", {})
    if not inner:
        return _usage(name, command, "#")
    parts = [f"# regraft {name}", _flat(command.help)]
    return "\n\n".join([*parts, *(_usage(f"{name} {verb}", one, "##") for verb, one in inner.items())])


def _usage(name: str, command: Any, heading: str) -> str:
    arguments = " ".join(_argument(p) for p in command.params if p.param_type_name == "argument")
    usage = " ".join(filter(None, ["regraft", name, "[OPTIONS]", arguments]))
    parts = [f"{heading} regraft {name}", _flat(command.help), f"```text\n{usage}\n```", _parameters(command)]
    return "\n\n".join(parts) + "\n"


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    name += "..." if parameter.nargs == -1 else ""
    return name if parameter.required else f"[{name}]"


def _parameters(command: Any) -> str:
    rows = ["| Argument or option | Meaning | Default |", "|---|---|---|"]
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            rows.append(_row(list(_parameter(parameter))))
    return "\n".join(rows)


def _parameter(parameter: Any) -> Iterator[str]:
    if parameter.param_type_name == "argument":
        yield f"`{_argument(parameter)}`"
    else:
        value = "" if parameter.is_flag else f" {parameter.metavar or _kind(parameter)}"
        yield ", ".join(f"`{name}{value}`" for name in parameter.opts)
    yield _flat(parameter.help or "")
    default = parameter.default
    default = default.value if isinstance(default, Enum) else default
    yield "" if default in (None, False, []) else f"`{default}`"


def _kind(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return "{" + ",".join(str(m.value) for m in annotation) + "}"
    return "N"


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
