"""`regraft card`: what a card lacks and gets wrong, what can be entered into it, how two cards differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from farm_tools import write_card, write_tokenizer
from models import save_model
from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.lineage import InputRecord, Lineage, Score
from regraft.inspect.card_fix import filled
from regraft.inspect.card_lint import FIELDS, Finding, lint
from regraft.inspect.card_sections import sections

COMPLETE = """
license: mit
language: en
datasets: [org/texts]
base_model: org/base
base_model_relation: finetune
pipeline_tag: text-generation
library_name: transformers
model-index: [{name: m, results: []}]
"""
TEXT = "A model.\n\n## Intended use\n\nIt writes small programs.\n\n## Limits\n\nIt knows one language only.\n"


@pytest.fixture
def model(family: Path, tmp_path: Path) -> Path:
    """A model without a card, with a tokenizer."""
    folder = shutil.copytree(family / "a", tmp_path / "model")
    write_tokenizer(folder)
    return folder


def rules(cli: Any, folder: Path, *more: str) -> list[str]:
    done = cli("card", "lint", folder, "--json", *more)
    found = [one["rule"] for one in json.loads(done.stdout)["findings"]]
    assert done.exit_code == (1 if found else 0), done.stderr
    return found


def test_a_complete_card_is_clean(cli, model: Path) -> None:
    write_card(model, COMPLETE, TEXT)
    done = cli("card", "lint", model)
    assert done.exit_code == 0
    assert done.stdout == "model: 10 of 10 fields stated (100%), nothing to mend\n"


@pytest.mark.parametrize("field", [name for name in FIELDS if name not in ("intended-use", "limits")])
def test_each_gap_of_the_front_matter_is_found(cli, model: Path, field: str) -> None:
    front = yaml.safe_load(COMPLETE)
    del front[field]
    write_card(model, yaml.safe_dump(front), TEXT)
    assert rules(cli, model) == [f"missing-{field.replace('_', '-')}"]
    write_card(model, yaml.safe_dump(front | {field: None}), TEXT)
    assert rules(cli, model) == [f"missing-{field.replace('_', '-')}"]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("A model.\n", ["missing-intended-use", "missing-limits"]),
        (TEXT.replace("It writes small programs.", "[More Information Needed]"), ["missing-intended-use"]),
        (TEXT.replace("It writes small programs.", "<!-- say what for -->"), ["missing-intended-use"]),
        (TEXT.replace("It writes small programs.", "TODO: say what it is for"), ["missing-intended-use"]),
        (TEXT.replace("It knows one language only.", "More information needed"), ["missing-limits"]),
        (TEXT.replace("Intended use", "Use").replace("It writes small", "`x`"), ["missing-intended-use"]),
        (f"```\n{TEXT}```\n", ["missing-intended-use", "missing-limits"]),  # headings in code are none
    ],
)
def test_texts_that_only_stand_in_are_gaps(cli, model: Path, text: str, missing: list[str]) -> None:
    write_card(model, COMPLETE, text)
    assert rules(cli, model) == missing


@pytest.mark.parametrize(
    ("old", "new", "rule", "what"),
    [
        ("text-generation", "text-classification", "wrong-task", "causal language model"),
        ("license: mit", "license: my-own", "unlisted-license", "my-own"),
        ("license: mit", "license: other\nlicense_name: mine", "missing-license-link", "license_link"),
    ],
)
def test_statements_that_cannot_be_right_are_found(cli, model: Path, old: str, new: str, rule: str, what: str) -> None:
    write_card(model, COMPLETE.replace(old, new), TEXT)
    assert rules(cli, model) == [rule]
    assert what in cli("card", "lint", model).stdout


def test_the_text_is_held_against_the_files(cli, model: Path) -> None:
    write_card(model, COMPLETE, f"It has 7B parameters and a context length of 4096.\n\n{TEXT}")
    assert rules(cli, model) == ["wrong-parameters", "wrong-context-length"]


def record(folder: Path, licence: str | None, **more: Any) -> None:
    inputs = [InputRecord(name="a", ref="x", repo_id="org/a"), InputRecord(name="b", ref="y", repo_id="org/base")]
    scores = [Score(metric="accuracy", data="test.jsonl", after=0.8125)]
    Lineage(method="linear", inputs=inputs, licence=licence, scores=scores, **more).write(folder)


def test_the_record_of_a_merge_is_held_against_its_card(cli, model: Path) -> None:
    record(model, "mit")
    write_card(model, COMPLETE, TEXT)
    assert rules(cli, model) == []
    write_card(model, COMPLETE.replace("org/base", "org/strange").replace("mit", "apache-2.0"), TEXT)
    assert rules(cli, model) == ["wrong-license", "wrong-base-model"]
    record(model, None)
    write_card(model, COMPLETE, TEXT)
    assert rules(cli, model) == ["unsupported-license"]


@pytest.mark.parametrize(
    ("value", "right"), [("0.8125", True), ("0.81", True), ("0.813", True), ("0.95", False), ("high", False)]
)
def test_scores_are_held_against_those_that_were_measured(cli, model: Path, value: str, right: bool) -> None:
    record(model, "mit")
    results = f"{{dataset: {{name: test.jsonl}}, metrics: [{{type: accuracy, value: {value}}}]}}"
    write_card(model, COMPLETE.replace("results: []", f"results: [{results}]"), TEXT)
    assert rules(cli, model) == ([] if right else ["wrong-score"])


def test_fix_enters_what_the_files_tell_and_nothing_else(cli, model: Path) -> None:
    record(model, "apache-2.0")
    front = "# mine\ntags: [x]   # kept\nlicense:\n"
    write_card(model, front, "Text.\n")
    done = cli("card", "lint", model, "--fix", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["score_before"] == 0.0
    assert told["score"] == 0.6
    assert {one["field"] for one in told["fixed"]} == {
        "license", "base_model", "base_model_relation", "pipeline_tag", "library_name", "model-index"
    }  # fmt: skip
    assert all(one["source"] for one in told["fixed"])
    assert [one["rule"] for one in told["findings"]] == [
        "missing-language", "missing-datasets", "missing-intended-use", "missing-limits"
    ]  # fmt: skip
    text = (model / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n# mine\ntags: [x]   # kept\n")
    assert text.endswith("---\n# Model\n\nText.\n")
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == ["org/a", "org/base"]
    assert data["pipeline_tag"] == "text-generation"
    assert data["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.8125}]
    assert not {"language", "datasets"} & set(data)
    before = (model / "README.md").stat().st_mtime_ns
    assert cli("card", "lint", model, "--fix").exit_code == 1
    assert (model / "README.md").stat().st_mtime_ns == before  # nothing more is known


def test_fix_makes_a_card_where_there_is_none(cli, model: Path) -> None:
    done = cli("card", "lint", model)
    assert done.exit_code == 1
    assert "no-card" in done.stdout
    assert "--fix enters transformers (from config.json)" in done.stdout
    done = cli("card", "lint", model, "--fix")
    assert "entered pipeline_tag: text-generation (from config.json: a causal language model head)" in done.stdout
    text = (model / "README.md").read_text(encoding="utf-8")
    assert text == "---\npipeline_tag: text-generation\nlibrary_name: transformers\n---\n\n# model\n"


def test_front_matter_that_cannot_be_read_is_left_alone(cli, model: Path) -> None:
    write_card(model, "license: [mit", TEXT)
    before = (model / "README.md").read_bytes()
    assert "front-matter" in rules(cli, model, "--fix")
    assert (model / "README.md").read_bytes() == before


def test_line_ends_and_a_card_without_front_matter(model: Path) -> None:
    found = [Finding("missing-license", "license", "", "llama3", "s")]
    assert filled("---\r\na: 1\r\n---\r\ntext", found, name="m") == "---\r\na: 1\r\nlicense: llama3\r\n---\r\ntext"
    assert filled("# T\n", found, name="m") == "---\nlicense: llama3\n---\n\n# T\n"
    named = [Finding("missing-license", "license", "", "mrl", "s")]
    assert filled("", named, name="m") == "---\nlicense: other\nlicense_name: mrl\n---\n\n# m\n"


def test_an_adapter_is_known_by_its_config(cli, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "org/base", "target_modules": ["q_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    cli("card", "lint", tmp_path / "lora", "--fix")
    data = yaml.safe_load((tmp_path / "lora" / "README.md").read_text().split("---\n")[1])
    assert data == {"base_model": "org/base", "base_model_relation": "adapter", "library_name": "peft"}
    write_card(tmp_path / "lora", "base_model: org/other")
    assert "wrong-base-model" in rules(cli, tmp_path / "lora")


def test_what_regraft_writes_lacks_only_what_nobody_told_it(cli, recipe: Path, tmp_path: Path) -> None:
    assert cli("merge", recipe, tmp_path / "merged").exit_code == 0
    assert rules(cli, tmp_path / "merged") == [
        "missing-license", "missing-language", "missing-datasets", "missing-base-model", "missing-pipeline-tag",
        "missing-model-index", "missing-intended-use",
    ]  # fmt: skip


def test_images_have_no_language(cli, tmp_path: Path) -> None:
    assert "language" not in lint(open_checkpoint(str(save_model(tmp_path / "vit", "vit")))).wanted


def test_rules_can_be_ignored_and_must_exist(cli, model: Path) -> None:
    write_card(model, COMPLETE.replace("language: en\n", ""), TEXT)
    assert rules(cli, model, "--ignore", "missing-language") == []
    done = cli("card", "lint", model, "--ignore", "missing-langage")
    assert done.exit_code == 2
    assert done.stderr.startswith("RG302: there is no rule 'missing-langage' of cards (--ignore): did you mean")


def test_a_card_that_cannot_be_written_is_an_error(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    done = cli("card", "lint", model, "--fix")
    assert done.exit_code == 2
    assert done.stderr.startswith("RG405: the card cannot be written: Permission denied")


def test_a_model_that_is_not_there(cli, tmp_path: Path) -> None:
    for command in (["lint", tmp_path / "x"], ["diff", tmp_path / "x", tmp_path / "y"]):
        done = cli("card", *command)
        assert done.exit_code == 2
        assert done.stderr.startswith("RG101: ")


def test_cards_are_compared_field_by_field_and_section_by_section(cli, family: Path, tmp_path: Path) -> None:
    a, b = (shutil.copytree(family / name, tmp_path / name) for name in "ab")
    write_card(a, COMPLETE, TEXT)
    write_card(
        b,
        COMPLETE.replace("mit", "apache-2.0").replace("language: en\n", "tags: [x]\n"),
        TEXT.replace("one language", "two languages") + "\n## New\n\nMore.\n",
    )
    done = cli("card", "diff", a, b, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["same"] is False
    assert found["fields"] == [
        {"field": "license", "a": "mit", "b": "apache-2.0"},
        {"field": "language", "a": "en", "b": None},
        {"field": "tags", "a": None, "b": ["x"]},
    ]
    assert found["sections"] == [
        {"heading": "Limits", "kind": "changed",
         "lines": ["@@ -1 +1 @@", "-It knows one language only.", "+It knows two languages only."]},
        {"heading": "New", "kind": "only in b", "lines": ["@@ -0,0 +1 @@", "+More."]},
    ]  # fmt: skip
    shown = cli("card", "diff", a, b)
    assert "New: only in b" in shown.stdout
    assert "-It knows one language only." in shown.stdout


def test_equal_cards_are_the_same_whatever_the_order(cli, family: Path, tmp_path: Path) -> None:
    a, b = (shutil.copytree(family / name, tmp_path / name) for name in "ab")
    write_card(a, "tags: [x, y]\nlicense: mit", TEXT)
    write_card(b, "license: [mit]\ntags: [y, x]", TEXT)
    done = cli("card", "diff", a, b)
    assert done.exit_code == 0
    assert done.stdout == "the cards say the same\n"
    (b / "README.md").unlink()
    done = cli("card", "diff", a, b)
    assert done.exit_code == 1
    assert "note: b: it has no card" in done.stderr


def test_sections_know_code_from_headings(model: Path) -> None:
    write_card(model, None, "one\n\n~~~\n# no heading\n```\n~~~\n\n## Two ##\ntwo\n")
    found = [(part.heading, part.text) for part in sections(open_checkpoint(str(model)))]
    assert found == [("Model", "one\n\n~~~\n# no heading\n```\n~~~"), ("Two", "two")]
