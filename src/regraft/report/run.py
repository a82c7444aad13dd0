"""The page of a run, from what the run left behind: scores, training logs, and the lineage file of every model.

Nothing is computed here that is not in those files, so a page can be written again at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from regraft.checkpoint.lineage import Lineage
from regraft.inspect.words import duration, size_in_words
from regraft.report.changes import change_figures, measured_in
from regraft.report.folder import RunFolder
from regraft.report.lineage import kinds_of, lineage_sections, read_lineages, size_on_disk
from regraft.report.page import write_page
from regraft.report.scores import Scored, by_step, findings, score_sections, sweep_figures
from regraft.report.sections import Section, Text
from regraft.report.training import Log, read_logs, recorded_logs, training_sections


def write_report(run: RunFolder, path: Path, *, title: str = "") -> Path:
    """Write the page of a run.

    Raises:
        UserError: RG105 if a record cannot be read, RG405 if the page cannot be written.
    """
    lineages = read_lineages(run.artefacts)
    sections = run_sections(run.evaluations, run.artefacts, logs=run.logs)
    if run.remarks:
        sections.append(Text("Left out", run.remarks))
    return write_page(
        path,
        title=title or run.path.resolve().name,
        sections=sections,
        summary=findings(run.evaluations, kinds_of(lineages)),
        facts=run_facts(lineages, run.artefacts, run.logs),
    )


def run_sections(
    evaluations: Iterable[Scored],
    artefacts: Mapping[str, Path],
    *,
    show: Collection[str] | None = None,
    logs: Sequence[Log] | None = None,
) -> list[Section]:
    """All that can be said of a run.

    Args:
        evaluations: of the run, in order; a table and drawings are made for each step.
        artefacts: step name -> folder of the model it made.
        show: names of the models to show, for example the best of each sweep; all if None.
        logs: of training; those in the artefacts' records and folders if None.

    Raises:
        UserError: RG105 if a lineage file cannot be read.
    """
    lineages = read_lineages(artefacts, show)
    kinds = kinds_of(lineages)
    shown = [one for one in evaluations if show is None or one.model in show]
    sections: list[Section] = []
    steps = by_step(shown)
    for step, scored in steps.items():
        sections += score_sections(f"{step}: {scored[0].metric}" if len(steps) > 1 else "Scores", scored, kinds)
    sections += sweep_figures(shown)
    if logs is None:
        logs = recorded_logs({n: one.diagnostics for n, one in lineages.items()})
        logs += read_logs({n: artefacts[n] for n in lineages})
    sections += training_sections(logs)
    if lineages:
        sections += lineage_sections(lineages, artefacts)
        changes = measured_in(lineages)
        sections += change_figures(changes) if changes is not None else []
        recipes = dict.fromkeys(lineage.recipe for lineage in lineages.values() if lineage.recipe)
        sections += [Text("Recipe", code=text, folded=True) for text in recipes]
    return sections


def run_facts(lineages: Mapping[str, Lineage], artefacts: Mapping[str, Path], logs: Sequence[Log]) -> dict[str, str]:
    """The run in figures, for the head of its page."""
    inputs = {r.name for lineage in lineages.values() for r in lineage.inputs} - lineages.keys()
    facts: dict[str, str] = {}
    if lineages:
        facts |= {"models read": str(len(inputs)), "models made": str(len(lineages))}
    if logs:
        facts["trainings"] = str(len(logs))
    if times := [one.wall_seconds for one in lineages.values() if one.wall_seconds is not None]:
        facts["time to make them"] = duration(sum(times))
    if peaks := [one.peak_memory_bytes for one in lineages.values() if one.peak_memory_bytes]:
        facts["peak memory"] = size_in_words(max(peaks))
    if lineages:
        facts["on disk"] = size_in_words(sum(size_on_disk(artefacts[name]) for name in lineages))
        facts["finished"] = max(one.finished or one.started for one in lineages.values())[:16].replace("T", " ")
        facts["regraft"] = ", ".join(dict.fromkeys(one.software.regraft for one in lineages.values()))
    return facts
