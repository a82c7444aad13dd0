"""Which of several models is the base of the others, where their files say so. Weights do not tell the direction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.checkpoint import Checkpoint, read_json
from regraft.checkpoint.licences import front_matter, strings
from regraft.checkpoint.lineage import FILE_NAME, Lineage
from regraft.checkpoint.weights import ADAPTER_CONFIG
from regraft.errors import UserError


def stated_base(checkpoints: Sequence[Checkpoint]) -> int | None:
    """The number of the model that all others say they come from; None if no single model is.

    Statements are `base_model` of a card, the base of an adapter's config, and the base in regraft.json, by its digest.
    """
    found = [
        i
        for i, candidate in enumerate(checkpoints)
        if len(checkpoints) > 1 and all(_comes_from(other, candidate) for j, other in enumerate(checkpoints) if j != i)
    ]
    return found[0] if len(found) == 1 else None


def _comes_from(model: Checkpoint, base: Checkpoint) -> bool:
    names = strings(front_matter(model)[0].get("base_model"))
    if ADAPTER_CONFIG in model.files:
        names += strings(_read(model.files[ADAPTER_CONFIG]).get("base_model_name_or_path"))
    if any(_means(name, base) for name in names):
        return True
    if FILE_NAME not in model.files:
        return False
    try:
        records = Lineage.read(model.path).inputs
    except UserError:
        return False  # a damaged record tells nothing, and comparing does not need it
    return any(record.role == "base" and record.digest == base.digest() for record in records)


def _means(name: str, base: Checkpoint) -> bool:
    if name in (base.repo_id, base.ref):
        return True
    path = Path(name)
    return path.is_dir() and path.resolve() == base.path.resolve()


def _read(path: Path) -> dict[str, object]:
    try:
        found: dict[str, object] = read_json(path)
    except UserError:
        return {}
    return found
