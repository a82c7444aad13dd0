"""What a model is: the facts of one checkpoint, from headers, config, tokenizer and card; unknown is None.

Nothing from the model's folder is run, and no weights are read unless `stats` asks for it. A folder whose weights
cannot be opened (stubs of git-LFS, packed weights, an adapter or a delta without its base) still has facts: `look`
gives them, with the reason as a remark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regraft.axes import Layout, layout
from regraft.checkpoint import Checkpoint, nbytes, open_checkpoint, read_json
from regraft.checkpoint.delta_record import Delta
from regraft.checkpoint.model import open_shell
from regraft.checkpoint.paths import located
from regraft.checkpoint.tensor import numel, stored_dtype
from regraft.checkpoint.weights import ADAPTER_CONFIG, is_delta
from regraft.errors import UserError
from regraft.inspect.architecture import Architecture, architecture, counts
from regraft.inspect.card import CardFacts, Contradiction, card, contradictions
from regraft.inspect.deltas import rank_bases
from regraft.inspect.scan import Scan, scan
from regraft.inspect.tokenizer import TokenizerFacts, tokenizer

# What a folder may have instead of weights that can be used; its other files are still worth a look.
_STILL_A_MODEL = ("RG102", "RG106", "RG107", "RG108", "RG109", "RG111", "RG113")


@dataclass(frozen=True)
class Size:
    """How large a model is; None where no weights could be opened.

    Attributes:
        parameters: elements of float tensors; tied ones once, stored constants not.
        embeddings, head: of these, in input embeddings (of tokens, positions, patches) and in heads.
        tensors: stored tensors.
        bytes: of all tensors.
        disk: of the weight files.
        dtypes: name as in safetensors headers -> elements.
    """

    parameters: int | None
    embeddings: int | None
    head: int | None
    tensors: int | None
    bytes: int | None
    disk: int | None
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter, as its config says."""

    kind: str | None
    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    base: str | None


@dataclass(frozen=True)
class BaseClaim:
    """Where a model may come from.

    `source` is "card", "adapter", "delta", "lineage" or "weights" (measured, nearest first).
    """

    source: str
    model: str
    detail: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything that is known of one model.

    `kind` is "model", "adapter" or "delta"; `scan` is None unless stats were asked for.
    """

    ref: str
    repo_id: str | None
    revision: str | None
    kind: str
    architecture: Architecture
    size: Size
    tokenizer: TokenizerFacts | None
    card: CardFacts
    bases: tuple[BaseClaim, ...]
    adapter: Adapter | None
    contradictions: tuple[Contradiction, ...]
    scan: Scan | None
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def facts(
    checkpoint: Checkpoint,
    *,
    stats: bool = False,
    candidates: Sequence[Checkpoint] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Facts:
    """The facts of an open checkpoint.

    Args:
        stats: also read every weight (NaN, infinity, all-zero tensors, digest).
        candidates: models that it may come from; the related ones are ranked by distance of the weights.

    Raises:
        UserError: RG101 or RG103 if a file has gone or changed since it was opened, RG105 if the config of an adapter
            in the folder cannot be read.
    """
    own = layout(checkpoint.config, checkpoint.tensors)
    shape = architecture(checkpoint, own)
    tokens = tokenizer(checkpoint)
    stated = card(checkpoint)
    size = _size(checkpoint, own)
    adapter = _adapter(checkpoint)
    sizes = [] if size.parameters is None else [size.parameters, size.parameters - (size.embeddings or 0)]
    against = contradictions(checkpoint, task=stated.task, head=shape.head, sizes=sizes, context=shape.context)
    kind = "model"
    if not checkpoint.tensors:
        kind = "adapter" if adapter is not None else "delta" if is_delta(checkpoint.path) else "model"
    return Facts(
        ref=checkpoint.ref,
        repo_id=checkpoint.repo_id or None,
        revision=checkpoint.revision or None,
        kind=kind,
        architecture=shape,
        size=size,
        tokenizer=tokens,
        card=stated,
        bases=tuple(_bases(checkpoint, stated, adapter, candidates)),
        adapter=adapter,
        contradictions=(*against, *_inner(shape, tokens)),
        scan=scan(checkpoint, on_progress=on_progress) if stats and checkpoint.tensors else None,
        remarks=tuple(_remarks(checkpoint, shape, tokens, stated)),
    )


def look(ref: str, *, stats: bool = False, offline: bool = False, candidates: Sequence[Checkpoint] = ()) -> Facts:
    """The facts of a reference, also of a local folder whose weights cannot be opened.

    Raises:
        UserError: as `open_checkpoint`, unless the folder has a config, a card or an adapter's config to tell of.
    """
    opened = open_or_shell(ref, offline=offline)
    return facts(opened, stats=stats, candidates=candidates if opened.tensors else ())


def open_or_shell(ref: str, *, offline: bool = False) -> Checkpoint:
    """An open checkpoint, without tensors if it is a local folder whose weights cannot be opened.

    Raises:
        UserError: as `open_checkpoint`, unless the folder has a config, a card or an adapter's config to tell of.
    """
    try:
        return open_checkpoint(ref, offline=offline)
    except UserError as error:
        folder = located(ref, None)
        told = ("config.json", "README.md", ADAPTER_CONFIG)
        if error.code not in _STILL_A_MODEL or not folder.is_dir() or not any((folder / n).is_file() for n in told):
            raise
        remark = "" if error.code in ("RG108", "RG113") else f"the weights cannot be used: {error.what}"
        return open_shell(ref, folder, remark)


def _size(checkpoint: Checkpoint, own: Layout) -> Size:
    if not checkpoint.tensors:
        return Size(None, None, None, None, None, None, {})
    parameters, embeddings, heads = counts(checkpoint, own)
    dtypes: dict[str, int] = {}
    for source in checkpoint.tensors.values():
        name = stored_dtype(source)
        dtypes[name] = dtypes.get(name, 0) + numel(source)
    disk = 0
    for stamp in checkpoint.stamps:
        name, size, _ = stamp.rsplit(" ", 2)
        disk += int(size) if name not in checkpoint.files else 0
    return Size(
        parameters=parameters,
        embeddings=embeddings,
        head=heads,
        tensors=len(checkpoint.tensors),
        bytes=sum(map(nbytes, checkpoint.tensors.values())),
        disk=disk or None,
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
    )


def _adapter(checkpoint: Checkpoint) -> Adapter | None:
    path = checkpoint.files.get(ADAPTER_CONFIG)
    if path is None:
        return None
    given = read_json(path)
    targets = given.get("target_modules")
    rank, alpha, base = given.get("r"), given.get("lora_alpha"), given.get("base_model_name_or_path")
    return Adapter(
        kind=str(given["peft_type"]) if given.get("peft_type") else None,
        rank=rank if isinstance(rank, int) else None,
        alpha=float(alpha) if isinstance(alpha, (int, float)) else None,
        targets=tuple(sorted(map(str, targets))) if isinstance(targets, list) else ((str(targets),) if targets else ()),
        base=base if isinstance(base, str) and base else None,
    )


def _bases(
    checkpoint: Checkpoint, stated: CardFacts, adapter: Adapter | None, candidates: Sequence[Checkpoint]
) -> list[BaseClaim]:
    found = [BaseClaim("card", name, stated.base_relation or "") for name in stated.base_models]
    if adapter is not None and adapter.base:
        found.append(BaseClaim("adapter", adapter.base))
    if not checkpoint.tensors and is_delta(checkpoint.path):
        base = Delta.read(checkpoint.path).base
        found.append(BaseClaim("delta", base.repo_id or base.name, f"digest {base.digest[:16]}"))
    for candidate, distance in rank_bases(checkpoint, candidates) if checkpoint.tensors else []:
        found.append(BaseClaim("weights", candidate.ref, distance.sentence()))
    return found


def _inner(shape: Architecture, tokens: TokenizerFacts | None) -> list[Contradiction]:
    """Where config, weights and tokenizer disagree with one another."""
    found = []
    for stack in shape.stacks:
        named = f"{stack.name} layers".strip()
        if None not in (stack.layers, stack.configured_layers) and stack.layers != stack.configured_layers:
            found.append(Contradiction(named, f"config.json: {stack.configured_layers}", f"weights: {stack.layers}"))
    rows, configured = shape.vocabulary, shape.configured_vocabulary
    if rows is not None and configured is not None and rows != configured:
        found.append(Contradiction("vocabulary", f"config.json: {configured}", f"weights: {rows} rows"))
    if rows is not None and tokens is not None and tokens.size is not None and tokens.size > rows:
        found.append(Contradiction("vocabulary", f"tokenizer: {tokens.size} tokens", f"weights: {rows} rows"))
    return found


def _remarks(
    checkpoint: Checkpoint, shape: Architecture, tokens: TokenizerFacts | None, stated: CardFacts
) -> list[str]:
    found = [*checkpoint.remarks, *shape.remarks, *(tokens.remarks if tokens else ())]
    files = [Path(stamp.rsplit(" ", 2)[0]).name for stamp in checkpoint.stamps]
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        found.append(f"the weights are pickles ({', '.join(pickles[:3])}), read as plain tensors without running code")
    if checkpoint.adapters:
        found.append(f"{', '.join(checkpoint.adapters)} is applied")
    if shape.generic_labels:
        found.append("the classes are called LABEL_0, LABEL_1, ...: what they mean is not told")
    if stated.remark:
        found.append(stated.remark)
    return found
