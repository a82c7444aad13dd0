"""The repository's claims: each runs, says what it must, and the documentation shows what its results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regraft.claims.find import Found, claims
from regraft.claims.page import page
from regraft.claims.paper_scale import read_inputs
from regraft.claims.plot import draw
from regraft.claims.results import results_of
from regraft.claims.run import run_claims
from regraft.methods import methods

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "claims"
ALL = claims(FOLDER)


def test_the_claims_on_merging_are_there() -> None:
    assert {"12", "16", "18", "28", "51", "60", "65"} <= {one.name for one in ALL}


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_it_runs_and_gives_all_figures_that_it_speaks_of(one: Found, tmp_path: Path) -> None:
    (result,) = run_claims([one], [0], tmp_path, scale="smoke", jobs=1)
    figures = result.figures["0"]
    assert all(isinstance(value, float) for value in figures.values())
    for check in one.claim.checks:
        assert isinstance(float(check.effect(figures)), float), check.says
    assert {row.figure for row in one.claim.plot.rows} <= set(figures)
    assert result.seeds["0"]["models"], "it uses models of the zoo"
    assert result.verdict == "not judged"


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_it_names_its_paper_its_baselines_and_what_decides(one: Found) -> None:
    known = {paper.number: paper.arxiv for method in methods() for paper in method.papers if paper.number}
    assert known[one.claim.number] == one.claim.paper.arxiv
    assert one.claim.baselines
    assert any(check.decides for check in one.claim.checks)
    assert all(check.beyond in (0.0, check.least) or check.beyond < 0 for check in one.claim.checks)
    assert one.doc


def test_the_documentation_shows_what_the_results_say() -> None:
    results = [results_of(one, FOLDER / "results", "laptop", any_code=True) for one in ALL]
    fix = "run `regraft claims table`"
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == page(ALL, results), fix
    for one, kept in zip(ALL, results, strict=True):
        plot = ROOT / "docs" / "assets" / "claims" / f"{one.name}.svg"
        assert plot.exists() == bool(kept.seeds), fix
        if kept.seeds:
            assert plot.read_text(encoding="utf-8") == draw(one.claim.plot, kept.figures) + "\n", fix


def test_results_tell_nothing_of_the_machine() -> None:
    for path in (FOLDER / "results").glob("*.json"):
        assert not re.search(r"/(root|home|tmp|work|Users)/", path.read_text(encoding="utf-8")), path


def test_the_scale_of_papers_merges_and_scores_models_that_are_given(tmp_path: Path) -> None:
    from claims import vision

    data = {}
    for part in ("validation", "test"):
        split = vision.splits(0, "smoke")[part]
        small = vision.digits.Split(split.images[:6], split.labels[:6])
        path = tmp_path / f"{part}.jsonl"
        vision.digits.write_data(path, small)
        data[part] = path.name
    base = vision.digits_vit(seed=0, scale="smoke")
    experts = {s: str(vision.digits_skill(skill=s, seed=0, scale="smoke")) for s in ("rotated", "framed")}
    inputs = tmp_path / "inputs.yaml"
    inputs.write_text(
        f"base: {base}\nexperts: {experts}\nmetric: accuracy\n"
        f"validation: {dict.fromkeys(experts, data['validation'])}\ntest: {dict.fromkeys(experts, data['test'])}\n"
    )
    (one,) = claims(FOLDER, ["28"])
    (result,) = run_claims([one], [0], tmp_path / "results", scale="paper", inputs=read_inputs(inputs), jobs=1)
    assert set(result.figures["0"]) == {"base", "mean single/noisy", "uniform/noisy"}
    assert all(0 <= value <= 1 for value in result.figures["0"].values())
    assert result.path.name == "28.paper.json"
    (ties,) = claims(FOLDER, ["65"])
    (result,) = run_claims([ties], [0], tmp_path / "results", scale="paper", inputs=read_inputs(inputs), jobs=1)
    assert {"averaging/2", "arithmetic/2", "ties/2", "base", "experts"} == set(result.figures["0"])
