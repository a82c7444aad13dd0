"""What a model card leaves out, and what it says that the files beside it do not bear out.

A card should say what was measured or inherited, and nothing else. So a field that can be read off the files is offered
as a value with its source, for `card_fix` to enter; a field that only the author can know (licence of an original work,
training data, languages, what the model is for) is listed as missing, whatever it may probably be. Statements are
checked against config, weights, and the record of how the model was made, regraft.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.checkpoint import Checkpoint
from regraft.checkpoint.licences import front_matter, on_hub, read_licence, short_name, strings
from regraft.checkpoint.lineage import FILE_NAME, Lineage
from regraft.errors import UserError, nearest
from regraft.inspect.card import TASK_HEADS
from regraft.inspect.card_sections import sections
from regraft.inspect.facts import Facts, facts

# What is looked for: field -> what it is. The last two are sections of the text.
FIELDS = {
    "license": "licence",
    "language": "languages",
    "datasets": "training data",
    "base_model": "base model",
    "base_model_relation": "how it was made from its base",
    "pipeline_tag": "task",
    "library_name": "library that loads it",
    "model-index": "evaluation results",
    "intended-use": "what it is for",
    "limits": "limits and risks",
}
# The names of all findings.
RULES = (
    "no-card",
    "front-matter",
    *(f"missing-{field.replace('_', '-')}" for field in FIELDS),
    "missing-license-name",
    "missing-license-link",
    "unlisted-license",
    "unsupported-license",
    "wrong-task",
    "wrong-parameters",
    "wrong-context-length",
    "wrong-base-model",
    "wrong-license",
    "wrong-score",
)
_SECTIONS = {
    "intended-use": re.compile(r"\b(intended|direct) use|\buses\b|\buse cases?\b|\bwhat it is for\b", re.IGNORECASE),
    "limits": re.compile(r"\blimit|\bbias|\brisk|\bout.of.scope", re.IGNORECASE),
}
# Texts that templates and this package leave for the author to replace.
_PLACEHOLDER = re.compile(
    r"\[?more information needed\]?\.?|\bTODO\b.*|<!--.*?-->|intended use is for the author of this model to write.*",
    re.IGNORECASE | re.DOTALL,
)
# Other text under a heading that says how to load a model is no statement of what it is for.
_HOW_TO = re.compile(r"```.*?```|^#.*$", re.DOTALL | re.MULTILINE)
_CLAIMS = ("task", "parameters", "context length")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Finding:
    """One thing to mend.

    Attributes:
        rule: its name, by which it can be ignored: "missing-license", "wrong-task", ...
        field: the key of the front matter or the section concerned.
        message: what is the matter.
        value: what the field can be filled with; None if that is not known from the files.
        source: where the value comes from.
    """

    rule: str
    field: str
    message: str
    value: Any = None
    source: str = ""


@dataclass(frozen=True)
class CardReport:
    """The result of `lint`: `stated` of the `wanted` fields are there."""

    model: str
    wanted: tuple[str, ...]
    stated: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def score(self) -> float:
        """Share of the wanted fields that are stated, 0 to 1."""
        return len(self.stated) / len(self.wanted) if self.wanted else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"score": round(self.score, 4)}


def lint(checkpoint: Checkpoint, known: Facts | None = None) -> CardReport:
    """Look through the card of a model.

    Args:
        checkpoint: opened, or a shell without tensors.
        known: its facts, where the caller has them already.

    Raises:
        UserError: RG105 if regraft.json is there and cannot be read.
    """
    found = known if known is not None else facts(checkpoint)
    lineage = Lineage.read(checkpoint.path) if FILE_NAME in checkpoint.files else None
    data, remark = front_matter(checkpoint)
    wanted = [field for field in FIELDS if field != "language" or _reads_text(found)]
    stated = [field for field in wanted if _is_stated(field, checkpoint, data)]
    findings = []
    if remark:
        rule = "no-card" if "README.md" not in checkpoint.files else "front-matter"
        findings.append(Finding(rule, "README.md", remark))
    derived = dict(_derived(checkpoint, found, lineage))
    for field in wanted:
        if field not in stated:
            value, source = derived.get(field, (None, ""))
            what = f"{FIELDS[field]}: not stated"
            findings.append(Finding(f"missing-{field.replace('_', '-')}", field, what, value, source))
    findings += _wrong(checkpoint, found, lineage, data)
    return CardReport(short_name(checkpoint), tuple(wanted), tuple(stated), tuple(findings))


def _is_stated(field: str, checkpoint: Checkpoint, data: Mapping[str, Any]) -> bool:
    if field == "license":
        return bool(read_licence(checkpoint).ids)
    if field in _SECTIONS:
        return any(
            _SECTIONS[field].search(section.heading) and _says_something(section.text)
            for section in sections(checkpoint)
        )
    return data.get(field) not in (None, "", "~", "null", [], {})  # the loader takes scalars as texts


def _says_something(text: str) -> bool:
    return len(_PLACEHOLDER.sub("", _HOW_TO.sub("", text)).split()) >= 3


def _reads_text(found: Facts) -> bool:
    return found.tokenizer is not None or found.architecture.configured_vocabulary is not None


def _derived(checkpoint: Checkpoint, found: Facts, lineage: Lineage | None) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Field -> (value, source), for what the files tell."""
    sentences = "modules.json" in checkpoint.files
    if found.kind == "adapter" or found.adapter is not None:
        yield "library_name", ("peft", "adapter_config.json")
        yield "base_model_relation", ("adapter", "adapter_config.json")
        base = found.adapter.base if found.adapter else None
        if base and _HUB_ID.fullmatch(base) and not Path(base).exists():
            yield "base_model", (base, "adapter_config.json")
    elif sentences:
        yield "library_name", ("sentence-transformers", "modules.json")
    elif checkpoint.model_type:
        yield "library_name", ("transformers", "config.json")
    tasks = [task for task, heads in TASK_HEADS.items() if found.architecture.head in heads]
    if sentences:
        yield "pipeline_tag", ("sentence-similarity", "modules.json")
    elif found.architecture.head is not None:
        alone = [task for task in tasks if len(TASK_HEADS[task]) == 1 or TASK_HEADS[task][0] == found.architecture.head]
        if len(alone) == 1:
            yield "pipeline_tag", (alone[0], f"config.json: a {found.architecture.head} head")
    if lineage is None:
        return
    if ids := list(dict.fromkeys(record.repo_id for record in lineage.inputs if record.repo_id)):
        yield "base_model", (ids, FILE_NAME)
    if lineage.kind == "merge" and sum(record.role != "base" for record in lineage.inputs) > 1:
        yield "base_model_relation", ("merge", FILE_NAME)
    if lineage.licence:
        yield "license", (lineage.licence, f"{FILE_NAME}: combined from the cards of its parents")
    if lineage.scores:
        yield "model-index", (_index(checkpoint, lineage), FILE_NAME)


def _index(checkpoint: Checkpoint, lineage: Lineage) -> list[dict[str, Any]]:
    results = [
        {
            "task": {"type": score.task or "other"},
            "dataset": {"name": Path(score.data).name, "type": Path(score.data).name},
            "metrics": [{"type": score.metric, "value": score.after}],
        }
        for score in lineage.scores
    ]
    return [{"name": short_name(checkpoint), "results": results}]


def _wrong(checkpoint: Checkpoint, found: Facts, lineage: Lineage | None, data: Mapping[str, Any]) -> Iterator[Finding]:
    """Statements that the files contradict, or that nothing bears out."""
    for against in found.contradictions:
        if against.subject in _CLAIMS and "config.json" not in against.card:
            rule = f"wrong-{against.subject.replace(' ', '-')}"
            yield Finding(rule, against.subject, f"the card says {against.card}; the files say {against.found}")
    names = [name.lower() for name in strings(data.get("license"))]
    for name in names:
        if name not in ("other", "unknown", "none", "null") and not on_hub(name):
            what = f"{name} is not in the Hub's list: it wants license: other, with license_name and license_link"
            yield Finding("unlisted-license", "license", what)
    if "other" in names:
        for key in ("license_name", "license_link"):
            if not strings(data.get(key)):
                yield Finding(f"missing-{key.replace('_', '-')}", key, f"license is other, and {key} is not stated")
    stated = read_licence(checkpoint).ids
    adapter_base = found.adapter.base if found.adapter else None
    named = strings(data.get("base_model"))
    if adapter_base and _HUB_ID.fullmatch(adapter_base) and named and adapter_base not in named:
        what = f"the card says {', '.join(named)}; adapter_config.json says {adapter_base}"
        yield Finding("wrong-base-model", "base_model", what)
    if lineage is None:
        return
    if stated and lineage.licence and set(stated) != {lineage.licence.lower()}:
        what = f"the card says {', '.join(stated)}; the parents' licences give {lineage.licence}"
        yield Finding("wrong-license", "license", what)
    elif stated and not lineage.licence and lineage.inputs:
        what = f"the card says {', '.join(stated)}, and the parents' cards do not determine a licence"
        yield Finding("unsupported-license", "license", what)
    ids = {record.repo_id for record in lineage.inputs if record.repo_id}
    if ids and named and not set(named) <= ids:
        others = ", ".join(name for name in named if name not in ids)
        yield Finding("wrong-base-model", "base_model", f"the card names {others}, which it was not made from")
    yield from _wrong_scores(lineage, data)


def _wrong_scores(lineage: Lineage, data: Mapping[str, Any]) -> Iterator[Finding]:
    measured = {(Path(score.data).name, score.metric): score.after for score in lineage.scores}
    for dataset, metric, text in _claimed(data.get("model-index")):
        value = measured.get((dataset, metric))
        if value is not None and not _agrees(text, value):
            what = f"the card says {metric} {text} on {dataset}; {value:.6g} was measured"
            yield Finding("wrong-score", "model-index", what)


def _claimed(index: Any) -> Iterator[tuple[str, str, str]]:
    """(data set, metric, value as written) of a model-index; whatever has another form is passed over."""
    for model in index if isinstance(index, list) else []:
        results = model.get("results") if isinstance(model, dict) else None
        for result in results if isinstance(results, list) else []:
            if not isinstance(result, dict) or not isinstance(result.get("dataset"), dict):
                continue
            metrics = result.get("metrics")
            for metric in metrics if isinstance(metrics, list) else []:
                if isinstance(metric, dict):
                    yield str(result["dataset"].get("name")), str(metric.get("type")), str(metric.get("value"))


def _agrees(text: str, value: float) -> bool:
    """Whether a number as written is that value, rounded to the digits that are written."""
    try:
        number = float(text)
    except ValueError:
        return False
    digits = len(text.partition(".")[2]) if "e" not in text.lower() else 12
    return abs(number - value) <= 0.5000001 * 10.0**-digits or abs(number - value) <= 1e-6 * abs(value)


def check_ignored(names: Sequence[str]) -> None:
    """RG302 for a rule that does not exist."""
    for name in names:
        if name not in RULES:
            raise UserError("RG302", f"there is no rule {name!r} of cards", where="--ignore", fix=nearest(name, RULES))
