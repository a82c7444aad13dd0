"""The model card: README.md with the Hub's metadata and a text, generated from the lineage and the parents' cards.

Only facts: each line is measured, or stated by a parent and said to be. What is not known is listed as not stated,
rather than left out or guessed; what only the author can know (what the model is for) is left to be written. No path of
the machine gets into a card, because cards are published: local parents appear by the name of their folder.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from regraft.checkpoint.licences import LicenceVerdict, combine, front_matter, on_hub, read_licence, short_name, strings
from regraft.checkpoint.lineage import Lineage, Score
from regraft.checkpoint.private_paths import PrivatePaths
from regraft.methods import Method, method

if TYPE_CHECKING:
    from regraft.checkpoint.model import Checkpoint

FILE_NAME = "README.md"
# Kind of a lineage -> what the Hub calls the relation to the base model; and what was done to it, in words.
_RELATIONS = {"merge": "merge"}
_MADE = {"compress": "compressed", "train": "trained"}


@dataclass(frozen=True)
class AdapterFacts:
    """What the card of a LoRA adapter says instead of that of a model.

    Attributes:
        base: the model that it is loaded on.
        class_name: of that model with its adapter.
        summary: a sentence on what it is; the method of the lineage need not be registered then.
        tokens: rows of embeddings that the base is to have before; None if it has them.
        tokenizer: whether a tokenizer lies beside it.
    """

    base: Checkpoint
    class_name: str
    summary: str
    tokens: int | None = None
    tokenizer: bool = False


def write_card(
    staging: Path,
    lineage: Lineage,
    parents: Sequence[Checkpoint],
    *,
    recipe: str,
    before_after: Sequence[Score] | None = None,
    name: str = "",
    registered: Method | None = None,
    adapter: AdapterFacts | None = None,
    bare: bool = False,
) -> Path:
    """Write README.md.

    Args:
        staging: the folder to write into.
        lineage: the facts; its inputs are the parents, in the same order.
        parents: the opened inputs, base included.
        recipe: text of the recipe, "" if there is none.
        before_after: measured values, those of the lineage if None.
        name: title of the card; the name of the output folder if empty.
        registered: the method, looked up by `lineage.method` if None and the lineage is that of a model.
        adapter: given if the folder holds an adapter.
        bare: the folder holds tensors by name, and no model that transformers loads.

    Raises:
        UserError: RG301 if the method of the lineage is not registered.
    """
    title = name or staging.name.removeprefix(".").removesuffix(".regraft-partial")
    found = registered if registered or adapter else method(lineage.kind, lineage.method)
    scores = list(lineage.scores if before_after is None else before_after)
    verdict = combine(parents)
    data = _metadata(title, lineage, parents, verdict, scores, adapter)
    if (staging / "modules.json").is_file():
        data["library_name"] = "sentence-transformers"
    use = _BARE_USAGE if bare else _use(lineage, parents, data["library_name"], adapter)
    if bare:
        del data["library_name"]
    refs = {ref for parent in parents for ref in (parent.ref, str(parent.path), *parent.adapters)}
    hide = PrivatePaths(refs | {record.ref for record in lineage.inputs})
    sections = [
        f"# {title}",
        _summary(lineage, found, adapter.summary if adapter else ""),
        _parents(lineage, parents),
        "## Recipe\n\n" + _fenced("yaml", recipe.strip()) if recipe else "",
        "## Use\n\n" + _fenced("python", use),
        _diagnostics(lineage),
        _scores(scores),
        _licence(verdict),
        _limits(lineage, data),
        _made(lineage),
    ]
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=False)
    path = staging / FILE_NAME
    body = hide("\n\n".join(section for section in sections if section))
    path.write_text(f"---\n{head}---\n\n{body}\n", encoding="utf-8", errors="replace")
    return path


def _metadata(
    title: str,
    lineage: Lineage,
    parents: Sequence[Checkpoint],
    verdict: LicenceVerdict,
    scores: Sequence[Score],
    adapter: AdapterFacts | None,
) -> dict[str, Any]:
    """Front matter as the Hub defines it; keys that nothing is known for are absent."""
    cards = [front_matter(parent)[0] for parent in parents]
    data: dict[str, Any] = {}
    of = [adapter.base] if adapter else parents
    if ids := list(dict.fromkeys(parent.repo_id for parent in of if parent.repo_id)):
        data["base_model"] = ids
    data["base_model_relation"] = "adapter" if adapter else _RELATIONS.get(lineage.kind, "finetune")
    data["library_name"] = "peft" if adapter else "transformers"
    data["tags"] = ["lora" if adapter else lineage.kind, "regraft", lineage.method]
    if verdict.licence and on_hub(verdict.licence):
        data["license"] = verdict.licence
    elif verdict.licence:
        data |= {"license": "other", "license_name": verdict.licence}
        if verdict.link:
            data["license_link"] = verdict.link
    for key in ("language", "datasets"):
        if union := sorted({value for card in cards for value in strings(card.get(key))}):
            data[key] = union
    tags = {value for card in cards for value in strings(card.get("pipeline_tag"))}
    if len(tags) == 1:
        data["pipeline_tag"] = tags.pop()
    if scores:
        results = [_result(score, data.get("pipeline_tag", "")) for score in scores]
        data["model-index"] = [{"name": title, "results": results}]
    return data


def _result(score: Score, pipeline_tag: str) -> dict[str, Any]:
    task = score.task or pipeline_tag or "other"
    dataset = Path(score.data).name
    return {
        "task": {"type": task},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": [{"type": score.metric, "value": score.after}],
    }


def _summary(lineage: Lineage, found: Method | None, first: str) -> str:
    n = sum(record.role != "base" for record in lineage.inputs)
    base = " and a base" if len(lineage.inputs) > n else ""
    lines = [first] if first else []
    if found and not first and lineage.kind in _MADE:
        others = "".join(f", {r.role} `{r.name}`" for r in lineage.inputs[1:])
        lines.append(f"`{lineage.inputs[0].name}` {_MADE[lineage.kind]} by `{found.name}`{others}: {found.summary}.")
    elif found and not first:
        lines.append(f"A merge of {n} model{'s' if n != 1 else ''}{base} by `{found.name}`: {found.summary}.")
    if lineage.output:
        out = lineage.output
        lines.append(f"{out.parameters:,} parameters in {out.tensors:,} tensors, {out.bytes:,} bytes, {out.dtype}.")
    for paper in found.papers if found else ():
        link = f" <{paper.url}>" if paper.url else ""
        lines.append(f"Method: {paper.cite()}.{link}")
    return "\n\n".join(lines)


def _parents(lineage: Lineage, parents: Sequence[Checkpoint]) -> str:
    rows = []
    for record, parent in zip(lineage.inputs, parents, strict=True):
        revision = f"`{record.revision[:12]}`" if record.revision else "local"
        digest = f"`{record.digest[:16]}`" if record.digest else "not computed"
        licence = ", ".join(read_licence(parent).ids) or "not stated"
        who = short_name(parent) + "".join(f" + {Path(adapter).name}" for adapter in parent.adapters)
        rows.append([record.name, record.role, who, revision, digest, licence])
    return "## Parents\n\n" + _table(["name", "role", "model", "revision", "digest", "licence"], rows)


def _use(lineage: Lineage, parents: Sequence[Checkpoint], library: str, adapter: AdapterFacts | None) -> str:
    if lineage.surgeries:
        return 'import regraft\n\nmodel = regraft.load("path/to/this/folder")'
    return _adapter_usage(adapter) if adapter else _usage(parents[0], library)


def _usage(parent: Checkpoint, library: str) -> str:
    if library == "sentence-transformers":
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("path/to/this/folder")'
        )
    name = _auto_class(next(iter(parent.architectures), ""), parent.model_type or "")
    return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("path/to/this/folder", dtype="auto")'


_BARE_USAGE = (
    "from pathlib import Path\n\nfrom safetensors.torch import load_file\n\nstate_dict = {}\n"
    'for file in sorted(Path("path/to/this/folder").glob("*.safetensors")):\n    state_dict |= load_file(file)'
)


def _adapter_usage(adapter: AdapterFacts) -> str:
    base, name = adapter.base, _auto_class(adapter.class_name, adapter.base.model_type)
    names = f"{name}, AutoTokenizer" if adapter.tokenizer else name
    lines = [
        f"from peft import PeftModel\nfrom transformers import {names}\n",
        f'model = {name}.from_pretrained("{base.repo_id or "path/to/" + short_name(base)}", dtype="auto")',
    ]
    if adapter.tokens is not None:
        lines.append(f"model.resize_token_embeddings({adapter.tokens})")
    lines.append('model = PeftModel.from_pretrained(model, "path/to/this/folder")')
    if adapter.tokenizer:
        lines.append('tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")')
    return "\n".join(lines)


# Of transformers 5, to which importing it for one name would add a second to every merge.
# fmt: off
_AUTO = frozenset((
    "AudioClassification", "AudioFrameClassification", "AudioTokenization", "AudioXVector", "CTC", "CausalLM",
    "Decision", "DepthEstimation", "DocumentQuestionAnswering", "ImageClassification", "ImageMatting",
    "ImageSegmentation", "ImageTextToText", "ImageToImage", "InstanceSegmentation", "KeypointDetection",
    "KeypointMatching", "MaskGeneration", "MaskedImageModeling", "MaskedLM", "MultimodalLM", "MultipleChoice",
    "NextSentencePrediction", "NormalEstimation", "ObjectDetection", "PointmapEstimation", "PoseEstimation",
    "PreTraining", "QuestionAnswering", "RNNT", "SemanticSegmentation", "Seq2SeqLM", "SequenceClassification",
    "SpeechSeq2Seq", "TDT", "TableQuestionAnswering", "TableRecognition", "TextEncoding", "TextRecognition",
    "TextToSpectrogram", "TextToWaveform", "TimeSeriesPrediction", "TokenClassification", "UniversalSegmentation",
    "VideoClassification", "VisualQuestionAnswering", "ZeroShotImageClassification", "ZeroShotObjectDetection",
))
# fmt: on


def _auto_class(architecture: str, model_type: str) -> str:
    """The Auto class that gives this architecture, the class itself if there is no such, AutoModel for others."""
    head = re.search(r"For([A-Z]\w*)$", architecture)
    if head and head[1] in _AUTO:
        return f"AutoModelFor{head[1]}"
    return architecture if _defined(architecture, model_type) else "AutoModel"


def _defined(architecture: str, model_type: str) -> bool:
    """Whether transformers has a class of this name for this type of model."""
    package = importlib.util.find_spec("transformers")  # looks for it without importing it
    folder = re.sub(r"\W", "_", model_type)
    if package is None or package.origin is None or not architecture.isidentifier() or not folder:
        return False
    modules = (Path(package.origin).parent / "models" / folder).glob("modeling_*.py")
    return any(re.search(rf"^class {architecture}\(", m.read_text(encoding="utf-8"), re.MULTILINE) for m in modules)


def _diagnostics(lineage: Lineage) -> str:
    flat = {key: value for key, value in lineage.diagnostics.items() if isinstance(value, (int, float, str))}
    rows = [[key.replace("_", " "), _number(value)] for key, value in flat.items()]
    parts = [_table(["diagnostic", "value"], rows)] if rows else []
    return "## Diagnostics\n\n" + "\n\n".join([*parts, "Per tensor: `regraft.json`."]) if lineage.diagnostics else ""


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    names = list(dict.fromkeys(name for score in scores for name in score.before))
    rows = [
        [Path(s.data).name, s.metric + (" (higher is better)" if s.higher_is_better else " (lower is better)")]
        + [_number(s.before[name]) if name in s.before else "" for name in names]
        + [f"**{_number(s.after)}**"]
        for s in scores
    ]
    return "## Evaluation\n\nMeasured in this run.\n\n" + _table(["data", "metric", *names, "this model"], rows)


def _licence(verdict: LicenceVerdict) -> str:
    lines = [f"- Licence: {verdict.licence}, from the parents' cards." if verdict.licence else "- Licence: not stated."]
    lines += [f"- Unknown: {sentence}." for sentence in verdict.unknown]
    lines += [f"- Conflict: {sentence}." for sentence in verdict.conflicts]
    lines += [f"- Inherited: {sentence}." for sentence in verdict.inherited]
    return "## Licence\n\n" + "\n".join(lines) + "\n\nCombined by rule from what the cards state; no legal advice."


def _limits(lineage: Lineage, data: Mapping[str, Any]) -> str:
    stated = {
        "license": "licence", "language": "languages", "datasets": "training data of the parents",
        "pipeline_tag": "task", "model-index": "evaluation of the result", "base_model": "Hub ids of the parents",
    }  # fmt: skip
    missing = [text for key, text in stated.items() if key not in data]
    limits = [f"- {warning}" for warning in lineage.warnings]
    limits.append("- Limits and biases of the parents may remain; the result was not examined for them.")
    lines = ["## Limits", "\n".join(limits), "Not stated: " + ", ".join([*missing, "intended use"]) + "."]
    lines.append("Intended use is for the author of this model to write here before it is published.")
    return "\n\n".join(lines)


def _made(lineage: Lineage) -> str:
    software, hardware = lineage.software, lineage.hardware
    parts = [
        f"regraft {software.regraft}, Python {software.python}, torch {software.torch}, "
        f"transformers {software.transformers}, {software.system}",
        f"{hardware.cpu or 'processor not told'}, {hardware.cores} cores, {hardware.memory_bytes / 2**30:.1f} GiB",
    ]
    if lineage.seeds:
        parts.append("seeds " + ", ".join(f"{key} {value}" for key, value in lineage.seeds.items()))
    if lineage.finished:
        parts.append(f"finished {lineage.finished} after {lineage.wall_seconds} s")
    if lineage.peak_memory_bytes:
        parts.append(f"peak memory {lineage.peak_memory_bytes / 2**20:.0f} MiB")
    text = "## Made with\n\n" + "\n".join(f"- {part}" for part in parts)
    return text + "\n\n`regraft.json` in this folder holds the full record: inputs, digests, options of every tensor."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
