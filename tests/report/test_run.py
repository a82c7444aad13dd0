"""Sections made from what a run leaves behind: scores, and a lineage file per model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from regraft.checkpoint.lineage import InputRecord, Lineage, OptionGroup
from regraft.errors import UserError
from regraft.report.lineage import brief_options, read_lineages
from regraft.report.page import render
from regraft.report.run import run_sections
from regraft.report.sections import Figure, Graph, Table


@dataclass(frozen=True)
class Scored:
    model: str
    value: float
    metric: str = "accuracy"
    step: str = "test"
    groups: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> dict[str, Any]:
        groups = {name: {"value": value, "n": 5} for name, value in self.groups.items()}
        return {"value": self.value, "n": 10, "interval": [0.0, 1.0], "per_group": groups}


def save(folder: Path, method: str, options: list[dict[str, Any]], *models: str, base: str = "") -> Path:
    folder.mkdir()
    inputs = [InputRecord(name=m, ref=m, digest=f"{m}-digest") for m in models]
    inputs += [InputRecord(name=base, ref=base, role="base")] if base else []
    groups = [OptionGroup(options=o, tensors=["x"], count=1) for o in options]
    diagnostics: dict[str, Any] = {}
    if base:
        more = {"base_norm": 4.0, "sign_conflict": 0.25}
        layers = [{"stack": "", "layer": i, "norms": [1.0 + i, 2.0], **more} for i in range(5)]
        diagnostics = {"models": list(models), "cosine": [[1.0, 0.2], [0.2, 1.0]], "layers": layers}
    lineage = Lineage(method=method, inputs=inputs, options=groups, key=f"key-{folder.name}", diagnostics=diagnostics)
    lineage.write(folder)
    return folder


@pytest.fixture
def artefacts(tmp_path: Path) -> dict[str, Path]:
    return {
        "first": save(tmp_path / "first", "linear", [{"weight": [1.0, 1.0], "normalize": True}], "a", "b"),
        "ties@lambda=0.5": save(
            tmp_path / "ties", "ties", [{"lambda": 0.5, "density": [0.2, 0.2]}], "a", "b", base="o"
        ),
        "top": save(tmp_path / "top", "linear", [{"weight": [1.0, 3.0]}, {"weight": [1.0, 1.0]}], "first", "a"),
    }


def test_a_run_becomes_sections(artefacts: dict[str, Path]) -> None:
    scores = [Scored("o", 0.5, groups={"x": 0.4, "y": 0.6}), Scored("top", 0.9, groups={"x": 0.9, "y": 0.5})]
    parts = run_sections(scores, artefacts)
    titles = [part.title for part in parts]
    assert titles[:3] == ["Scores", "Scores: overall", "Scores: gain over o"]
    assert {"Lineage", "Cosines of task vectors", "Change by layer", "How each model was made"} <= set(titles)
    gains = next(p for p in parts if isinstance(p, Figure) and "gain" in p.title)
    assert "+50.0" in gains.drawing
    assert "−10.0" in gains.drawing
    assert render("t", parts)


def test_the_lineage_leads_from_the_base_through_fine_tunes_and_merges(artefacts: dict[str, Path]) -> None:
    graph = next(p for p in run_sections([], artefacts) if isinstance(p, Graph))
    edges = {(e.source, e.target) for e in graph.edges}
    assert {("o", "a"), ("o", "b"), ("a", "first"), ("b", "first"), ("first", "top"), ("a", "top")} <= edges
    assert ("o", "ties@lambda=0.5") not in edges  # drawn through its fine-tunes
    assert {n.key: n.kind for n in graph.nodes} == {
        "a": "model", "b": "model", "o": "base", "first": "merge", "top": "merge", "ties@lambda=0.5": "merge",
    }  # fmt: skip


def test_what_is_shown_brings_what_it_was_made_from(artefacts: dict[str, Path]) -> None:
    assert list(read_lineages(artefacts, ["top"])) == ["first", "top"]
    assert list(read_lineages(artefacts)) == list(artefacts)
    assert [p.title for p in run_sections([Scored("o", 0.5)], artefacts, show=[])] == []


def test_only_options_beside_the_defaults_are_told(artefacts: dict[str, Path]) -> None:
    lineages = read_lineages(artefacts)
    assert brief_options(lineages["first"]) == []
    assert brief_options(lineages["ties@lambda=0.5"]) == ["lambda 0.5"]
    assert brief_options(lineages["top"]) == ["weight varied"]


def test_other_metrics_get_a_table_only(artefacts: dict[str, Path]) -> None:
    parts = run_sections([Scored("a", 12.5, "perplexity"), Scored("top", 11.5, "perplexity")], {})
    assert len(parts) == 1
    assert isinstance(parts[0], Table)


def test_a_folder_without_lineage_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run_sections([], {"x": tmp_path})
    assert caught.value.code == "RG105"


def test_probes_show_answers_and_no_best_without_labels() -> None:
    from regraft.recipe.run import Evaluation
    from regraft.report.scores import score_sections

    def probed(model: str, output: str, truth: str | None) -> Evaluation:
        answer = {"input": "one", "output": output, "value": 0.5, "truth": truth}
        score = {"value": 0.5, "n": 1, "answers": [answer]}
        return Evaluation("look", "probe", model, "probes.jsonl", score)

    table, answers = score_sections("Scores", [probed("a", "x", None), probed("b", "y", None)], {})
    assert table.columns[1].better is None
    assert "(best)" not in table.html()
    assert list(answers.rows[0]) == ["one", "x (0.50)", "y (0.50)"]
    labelled, _ = score_sections("Scores", [probed("a", "x", "x"), probed("b", "y", "x")], {})
    assert labelled.columns[1].better == "high"


def test_names_in_records_are_only_texts(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    lineage = Lineage(
        step=nasty, method=nasty, kind=nasty, key=nasty, recipe=nasty, warnings=[nasty], licence=nasty, started=nasty,
        inputs=[InputRecord(name=f"a{nasty}", ref=nasty, digest=nasty, licence=nasty, role="base")],
        settings={nasty: nasty}, options=[OptionGroup(options={nasty: nasty}, tensors=[nasty], count=1)],
        diagnostics={"models": [nasty, "b"], "cosine": [[1.0, 0.5], [0.5, 1.0]]},
    )  # fmt: skip
    lineage.write(tmp_path)
    scores = [Scored(nasty, 0.5, step=nasty, groups={nasty: 0.5}), Scored(f"a{nasty}", 0.4, step=nasty)]
    page = render(nasty, run_sections(scores, {nasty: tmp_path}))
    assert page.count("<script") == 1
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 15
    assert brief_options(Lineage.read(tmp_path)) == [f"{nasty} {nasty}"]


def test_a_sweep_of_one_number_is_a_curve_and_of_two_a_map() -> None:
    from regraft.report.scores import sweep_figures

    one = [Scored(f"ties@lambda={x}", 0.5 + x / 10) for x in (0.3, 1.0, 0.5)]
    two = [Scored(f"dare@lambda={x},density={y}", x * y) for x in (0.5, 1.0) for y in (0.1, 0.2)]
    words = [Scored(f"pick@which={x}", 0.5) for x in ("a", "b")]
    grid, curve = sweep_figures([*one, *two, *words, Scored("plain", 0.5)])
    assert isinstance(curve, Figure)
    assert curve.title == "Sweep of lambda"
    assert curve.values is not None
    assert [row[0] for row in curve.values.rows] == ["0.3", "0.5", "1"]
    assert isinstance(grid, Figure)
    assert grid.title == "Sweep of dare"
    assert grid.values is not None
    assert [list(row) for row in grid.values.rows] == [["lambda 0.5", 0.05, 0.1], ["lambda 1", 0.1, 0.2]]
