"""Tasks of the lm-evaluation-harness: its figures against our own computation, and what is refused without it."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import regraft
from regraft.errors import UserError
from regraft.inspect.metrics.lm_eval import lm_eval
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import run
from regraft.resize.factorise import LowRankOptions, factorise
from regraft.resize.surgery import save
from tiny import save_tiny, write_rows

THERE = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not THERE, reason="the optional package lm-eval is not installed")

TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def questions(n: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "question": f"w{i} w{(i * 3) % 40}",
            "choices": [f"w{(i * 5 + j * 7) % 40} w{j}" for j in range(3)],
            "answer": i % 3,
        }
        for i in range(n)
    ]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in (("first", questions()), ("second", questions(8)[::-1])):
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(TASK.replace("NAME", name).replace("FILE", str(file)))
    return folder


def expected(folder: Path, rows: list[dict[str, Any]]) -> float:
    """The share of questions whose true continuation is the most probable one."""
    whole, tokenizer = regraft.load(folder), hf.AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            before = tokenizer(row["question"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = whole(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(logs[torch.arange(len(logs)), ids[0, 1:]][len(before) - 1 :].sum()))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


@needs_harness
def test_scores_of_tasks_of_ones_own(tasks: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2", initializer_range=0.3)
    first, second = expected(folder, questions()), expected(folder, questions(8))
    one = lm_eval(folder, tasks, tasks=["first"], device="cpu")
    assert one.value == pytest.approx(first)
    assert (one.n, one.unit, one.notes["measure"]) == (12, "questions", "acc")
    assert one.interval is not None
    assert one.interval[0] <= one.value <= one.interval[1]
    assert set(one.notes["measures"]) == {"acc,none", "acc_norm,none"}
    both = lm_eval(folder, tasks, device="cpu")
    assert both.value == pytest.approx((first + second) / 2)
    assert {name: s.value for name, s in both.per_group.items()} == pytest.approx({"first": first, "second": second})
    assert lm_eval(folder, tasks / "second.yaml", device="cpu").n == 8
    assert lm_eval(folder, tasks, tasks=["first"], limit=5, device="cpu").n == 5
    with pytest.raises(UserError, match=r"no task 'frst'.*did you mean 'first'"):
        lm_eval(folder, tasks, tasks=["frst"], device="cpu")
    with pytest.raises(UserError, match=r"the task first has no measure 'f1'"):
        lm_eval(folder, tasks, tasks=["first"], measure="f1", device="cpu")


@needs_harness
def test_compressed_models_are_taken(tasks: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2", initializer_range=0.3)
    whole = regraft.load(folder)
    factorise(whole, LowRankOptions(ratio=2))
    save(whole, tmp_path / "low")
    for file in folder.glob("tok*"):
        (tmp_path / "low" / file.name).write_bytes(file.read_bytes())
    score = lm_eval(tmp_path / "low", tasks, tasks=["first"], device="cpu")
    assert score.value == pytest.approx(expected(tmp_path / "low", questions()))


RECIPE = "models: {a: ./gpt2}\nsteps:\n  s: {evaluate: lm_eval, models: [a], TASKS}\n"


@needs_harness
def test_in_a_recipe(tasks: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "gpt2", "gpt2", initializer_range=0.3)
    recipe = parse_recipe(RECIPE.replace("TASKS", "data: tasks, device: cpu"), path=tmp_path / "recipe.yaml")
    found = run(recipe, tmp_path / "out").evaluations
    assert set(found[0].score["per_group"]) == {"first", "second"}
    without = parse_recipe(RECIPE.replace("TASKS", "tasks: [arc_easy]"), path=tmp_path / "recipe.yaml")
    assert make_plan(without).steps[0].data is None  # type: ignore[union-attr]


def test_without_the_harness_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find, real = importlib.util.find_spec, importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "lm_eval":
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *more: None if n == "lm_eval" else find(n, *more))
    monkeypatch.setattr(importlib, "import_module", absent)
    save_tiny(tmp_path / "gpt2", "gpt2")
    recipe = parse_recipe(RECIPE.replace("TASKS", "tasks: [arc_easy]"), path=tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=r"lm_eval needs the package 'lm_eval'.*regraft\[lm-eval\]") as caught:
        make_plan(recipe)
    assert caught.value.code == "RG602"


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *more: True if n == "lm_eval" else find(n, *more))
    with pytest.raises(UserError, match=r"there is no task \(lm_eval\): name tasks, or give data"):
        lm_eval.check(None, lm_eval.resolve({}))
    with pytest.raises(UserError, match="group has no meaning for tasks"):
        lm_eval.check(None, lm_eval.resolve({"tasks": ["a"], "group": "g"}))
    assert json.dumps(lm_eval.resolve({"tasks": ["a"]}).model_dump(mode="json"))
