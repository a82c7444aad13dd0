"""From a model, or from other adapters, to a folder that PEFT loads: weights, regraft.json and card, all at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.adapters.change import Change, total_error
from regraft.adapters.extract import FACTORS, Extraction, Wanted
from regraft.adapters.folder import Adapter
from regraft.checkpoint import Checkpoint
from regraft.checkpoint.card import AdapterFacts, write_card
from regraft.checkpoint.delta import check_bases
from regraft.checkpoint.job_folder import JobFolder
from regraft.checkpoint.licences import combine
from regraft.checkpoint.lineage import InputRecord, Lineage, Output
from regraft.checkpoint.output import remove
from regraft.checkpoint.sidecars import copy_licences, copy_tokenizer
from regraft.checkpoint.surroundings import done_before, run_key, surroundings
from regraft.checkpoint.writer import size_on_disk
from regraft.errors import UserError
from regraft.methods import Method


@dataclass(frozen=True)
class Made:
    """An adapter on disk.

    Attributes:
        out: its folder.
        changes: what became of every tensor that changed.
        lineage: the record beside it.
    """

    out: Path
    changes: list[Change]
    lineage: Lineage

    @property
    def error(self) -> float:
        """‖delta - B A‖ / ‖delta‖ over all that changed."""
        return total_error(self.changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        facts = self.lineage.model_dump(mode="json", include={"output", "licence", "wall_seconds", "warnings"})
        return {"out": str(self.out), **facts, **summary(self.changes)}


def summary(changes: Collection[Change]) -> dict[str, Any]:
    """The figures of an adapter, in total and per tensor."""
    error = total_error(changes)
    return {
        "relative_error": error,
        "energy": 1 - error**2,
        "largest_rank": max((change.rank or 0 for change in changes), default=0),
        "tensors": [change.to_dict() for change in changes],
    }


def extract_lora(
    model: Checkpoint,
    base: Checkpoint,
    out: Path,
    wanted: Wanted | None = None,
    *,
    force: bool = False,
    accept_licenses: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Made:
    """Write the difference between a fine-tune and its base as a LoRA adapter.

    The same call goes on with what an unfinished one has decomposed, and does nothing after a finished one.

    Args:
        model, base: opened by `open_checkpoint`; they are read tensor by tensor.
        out: the folder to make.
        wanted: ranks, and what is to become of which tensor.
        force: replace an output that exists, and go on although the model does not look like a fine-tune of the base.
        accept_licenses: go on although the licences of the two do not agree.
        on_progress: called with (elements done, elements in all).

    Raises:
        UserError: before work starts what `Extraction` and `OutputFolder` raise, and RG404; RG206 during it.
    """
    wanted = wanted or Wanted()
    key = run_key({"settings": _settings(wanted), "digests": [base.digest(), model.digest()]})
    if not force and (done := done_before(out, key)) is not None:
        return Made(Path(out), [_change(one) for one in done.diagnostics["tensors"]], done)
    extraction = Extraction(model, base, wanted, force=force)
    parents = [base, model]
    check_licences(parents, accept_licenses)
    lineage = Lineage(
        kind="extract-lora",
        method="extract-lora",
        key=key,
        inputs=[InputRecord.sampled(one, role, role) for one, role in ((base, "base"), (model, "model"))],
        settings=_settings(wanted),
    )
    remarks = check_bases(parents, force=force)
    depends_on = {"key": key, **surroundings(parents)}
    with JobFolder(out, extraction.parts, depends_on, force=force) as folder:
        adapter, changes = extraction.run(on_progress, folder)
        sentence = f"What distinguishes a fine-tune from its base, as a LoRA adapter of rank {_ranks(adapter)}."
        tokenizer = extraction.tokenizer
        lineage.sources = {"tokenizer": "model" if tokenizer is not None else "base"}
        if extraction.tokens is not None:
            remarks.append(f"the base is to have {extraction.tokens} rows of embeddings before the adapter is loaded")
        lineage.warnings = [*extraction.remarks, *remarks]
        facts = AdapterFacts(base, adapter.skeleton.class_name, sentence, extraction.tokens, tokenizer is not None)
        remove(folder.staging / FACTORS)
        write(folder.staging, adapter, parents, lineage, changes, facts, name=folder.out.name, tokenizer=tokenizer)
        folder.publish()
    return Made(folder.out, changes, lineage)


def _change(told: Mapping[str, Any]) -> Change:
    """What `Change.to_dict` told."""
    return Change(**{name: value for name, value in told.items() if name != "energy"})


def check_licences(parents: Sequence[Checkpoint], accepted: bool) -> None:
    """Raise RG404 for licences that do not go together, unless accepted."""
    conflicts = combine(parents).conflicts
    if conflicts and not accepted:
        raise UserError("RG404", "; ".join(conflicts), fix="if you may combine them, add --accept-licenses")


def write(
    staging: Path,
    adapter: Adapter,
    parents: Sequence[Checkpoint],
    lineage: Lineage,
    changes: Collection[Change],
    facts: AdapterFacts,
    *,
    name: str,
    tokenizer: Checkpoint | None = None,
    recipe: str = "",
    registered: Method | None = None,
) -> None:
    """Fill a staging folder: the adapter's files, regraft.json, licences, card.

    Args:
        parents: the inputs of the lineage, in its order.
        lineage: what is known beside output and figures, which are entered here.
        facts: what the card says of it.
        tokenizer: whose tokenizer goes beside the adapter, if it needs one.
        recipe, registered: of a merge.
    """
    adapter.write(staging, facts.base)
    if tokenizer is not None:
        copy_tokenizer(staging, tokenizer)
    specs = adapter.specs
    lineage.output = Output(
        tensors=len(specs),
        parameters=sum(spec.numel for spec in specs),
        bytes=size_on_disk(specs),
        dtype=str(adapter.dtype).removeprefix("torch."),
    )
    lineage.licence = combine(parents).licence
    lineage.diagnostics = summary(changes)
    lineage.finish()
    lineage.write(staging)
    copy_licences(staging, parents)
    write_card(
        staging,
        lineage,
        parents,
        recipe=recipe,
        name=name,
        registered=registered,
        adapter=facts,
    )


def _ranks(adapter: Adapter) -> str:
    ranks = sorted(set(adapter.ranks.values()))
    return "0" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _settings(wanted: Wanted) -> dict[str, Any]:
    cut = wanted.cut
    return {
        "rank": cut.most if cut.energy is None else None,
        "energy": cut.energy,
        "max_rank": cut.most if cut.energy is not None else None,
        "include": list(wanted.include),
        "exclude": list(wanted.exclude),
        "save_modules": list(wanted.save),
        "embeddings": wanted.embeddings,
        "dtype": str(wanted.dtype).removeprefix("torch.") if wanted.dtype else None,
    }
