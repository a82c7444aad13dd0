"""Tasks of the lm-evaluation-harness: its figures against our own computation, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import regraft
from regraft.cli.main import app
from regraft.errors import UserError
from regraft.inspect.metrics.lm_eval import lm_eval
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import run
from regraft.resize.factorise import LowRankOptions, factorise
from regraft.resize.surgery import save
from tiny import save_tiny, write_rows

THERE = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not THERE, reason='lm-eval is not installed: pip install "regraft[lm-eval]"')

TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: "{{question}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LIKELIHOOD = """
output_type: loglikelihood
doc_to_target: "{{target}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GENERATION = """
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: ["#"], max_gen_toks: 3, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_task(folder: Path, name: str, kind: str, rows: list[dict[str, Any]], more: str = "") -> Path:
    """A task file with its rows beside it."""
    folder.mkdir(exist_ok=True)
    file = write_rows(folder / f"{name}.jsonl", rows)
    path = folder / f"{name}.yaml"
    path.write_text(TASK.replace("NAME", name).replace("FILE", str(file)) + kind + more)
    return path


def questions(n: int = 12) -> list[dict[str, Any]]:
    """Choices are of different lengths, so that dividing by the length matters."""
    return [
        {
            "question": f"w{i} w{(i * 3) % 40}",
            "choices": [" ".join(f"w{(i * 5 + j * 7 + k) % 40}" for k in range(j + 1)) for j in range(3)],
            "answer": (i + i // 4) % 3,
        }
        for i in range(n)
    ]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_task(tmp_path / "tasks", "first", CHOICE, questions(), "tag: both\n")
    write_task(tmp_path / "tasks", "second", CHOICE, questions(8)[::-1], "tag: both\n")
    return tmp_path / "tasks"


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / request.param, request.param, initializer_range=0.3)


class Own:
    """What transformers says of a model, a text at a time and without a cache."""

    def __init__(self, folder: Path) -> None:
        self.whole, self.tokenizer = regraft.load(folder), hf.AutoTokenizer.from_pretrained(folder)

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.whole(input_ids=torch.tensor([ids])).logits[0]

    def likelihood(self, before: str, after: str) -> tuple[float, bool]:
        """The log-probability of what comes after, and whether each of its tokens is the most probable one."""
        begin, ids = len(self.tokenizer(before)["input_ids"]), self.tokenizer(f"{before} {after}")["input_ids"]
        logs = self.logits(ids)[begin - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(ids[begin:])
        return float(logs[torch.arange(len(wanted)), wanted].sum()), bool((logs.argmax(-1) == wanted).all())

    def goes_on(self, before: str, tokens: int) -> str:
        """What the model writes when it always takes the most probable token."""
        ids = self.tokenizer(before)["input_ids"]
        begin = len(ids)
        for _ in range(tokens):
            ids = [*ids, int(self.logits(ids)[-1].argmax())]
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        return str(self.tokenizer.decode(ids[begin:], skip_special_tokens=True))

    def choices(self, rows: list[dict[str, Any]]) -> tuple[float, float]:
        """The shares of questions whose true choice is the most probable one: as it is, and by character."""
        plain = divided = 0
        for row in rows:
            scores = [self.likelihood(row["question"], choice)[0] for choice in row["choices"]]
            by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
            plain += scores.index(max(scores)) == row["answer"]
            divided += by_length.index(max(by_length)) == row["answer"]
        return plain / len(rows), divided / len(rows)


@needs_harness
def test_choices_are_those_of_our_own_computation(model: Path, tasks: Path) -> None:
    own = Own(model)
    (first, divided), (second, _) = own.choices(questions()), own.choices(questions(8))
    one = lm_eval(model, tasks, tasks=["first"], device="cpu")
    assert one.value == pytest.approx(first)
    assert one.notes["measures"] == pytest.approx({"acc,none": first, "acc_norm,none": divided})
    assert (one.n, one.unit, one.notes["measure"]) == (12, "questions", "acc")
    assert one.interval is not None
    half = 1.96 * math.sqrt(first * (1 - first) / 11)
    assert one.interval == pytest.approx((first - half, first + half), abs=1e-4)
    assert lm_eval(model, tasks, tasks=["first"], measure="acc_norm", device="cpu").value == pytest.approx(divided)
    both = lm_eval(model, tasks, device="cpu")
    assert both.value == pytest.approx((first + second) / 2)
    assert {name: s.value for name, s in both.per_group.items()} == pytest.approx({"first": first, "second": second})
    assert lm_eval(model, tasks, tasks=["both"], device="cpu").per_group == both.per_group
    assert lm_eval(model, tasks / "second.yaml", device="cpu").n == 8
    assert lm_eval(model, tasks, tasks=["first"], limit=5, batch_size=1, device="cpu").n == 5


@needs_harness
def test_likelihoods_are_those_of_our_own_computation(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Own(model)
    befores = [f"w{i} w{(i * 3) % 40}" for i in range(6)]
    targets = [own.goes_on(b, 2) if i % 2 else f"w{i} w{i + 9}" for i, b in enumerate(befores)]
    rows = [{"question": b, "target": f" {t}"} for b, t in zip(befores, targets, strict=True)]
    found = [own.likelihood(b, t) for b, t in zip(befores, targets, strict=True)]
    path = write_task(tmp_path / "tasks", "ends", LIKELIHOOD + 'target_delimiter: ""\n', rows)
    score = lm_eval(model, path, device="cpu")
    assert capfd.readouterr().out == ""  # the harness prints what it bootstraps
    assert score.value == pytest.approx(math.exp(-sum(log for log, _ in found) / len(found)), rel=1e-4)
    assert not score.higher_is_better
    share = sum(greedy for _, greedy in found) / len(found)
    assert 0 < share < 1
    assert lm_eval(model, path, measure="acc", device="cpu").value == pytest.approx(share)


@needs_harness
def test_answers_are_those_of_our_own_computation(model: Path, tmp_path: Path) -> None:
    own = Own(model)
    befores = [" ".join(f"w{(i + k) % 40}" for k in range(1 + i)) for i in range(6)]  # padded, as lengths differ
    truths = [own.goes_on(b, 3) if i % 3 else "w1 w1 w1" for i, b in enumerate(befores)]
    rows = [{"question": b, "target": t} for b, t in zip(befores, truths, strict=True)]
    path = write_task(tmp_path / "tasks", "answers", GENERATION, rows)
    score = lm_eval(model, path, device="cpu")
    expected = sum(own.goes_on(b, 3) == t for b, t in zip(befores, truths, strict=True)) / 6
    assert 0 < expected < 1
    assert (score.value, score.n, score.notes["measure"]) == (pytest.approx(expected), 6, "exact_match")
    assert lm_eval(model, path, measure="exact_match,none", device="cpu").value == score.value


@needs_harness
def test_a_group_stands_for_its_members(tasks: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "gpt2", "gpt2", initializer_range=0.3)
    own = Own(model)
    first, second = own.choices(questions())[0], own.choices(questions(8))[0]
    list_of = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tasks / "all.yaml").write_text("group: all\ntask: [both]\n" + list_of)
    score = lm_eval(model, tasks, device="cpu")
    assert score.value == pytest.approx((12 * first + 8 * second) / 20)
    assert (score.n, score.per_group) == (20, {})
    (tasks / "all.yaml").write_text("group: all\ntask: [first, second]\n")
    assert set(lm_eval(model, tasks, device="cpu").per_group) == {"first", "second"}


@needs_harness
def test_solved_examples_and_questions_that_are_cut(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "gpt2", "gpt2", initializer_range=0.3)
    rows = [row | {"question": f"{row['question']} " * 40} for row in questions()]
    long = write_task(tmp_path / "tasks", "long", CHOICE, rows)
    (warning,) = lm_eval(model, long, device="cpu").notes["warnings"]
    assert "exceeds model's maximum length" in warning
    short = write_task(tmp_path / "short", "short", CHOICE, questions())
    assert "warnings" not in lm_eval(model, short, device="cpu").notes
    none, two = (lm_eval(model, short, num_fewshot=n, device="cpu") for n in (0, 2))
    assert none.notes["measures"] != two.notes["measures"]
    fixed = write_task(tmp_path / "fixed", "fixed", CHOICE, questions(), "num_fewshot: 0\n")
    kept = lm_eval(model, fixed, num_fewshot=2, device="cpu")
    assert kept.notes["measures"] == none.notes["measures"]
    assert "asked without solved examples" in kept.notes["warnings"][0]


@pytest.fixture
def ends(tmp_path: Path) -> Path:
    """A task whose measure tells any two ways of asking apart."""
    rows = [{"question": f"w{i} w{(i * 3) % 40}", "target": f"w{i + 5} w{i + 9}"} for i in range(12)]
    return write_task(tmp_path / "ends", "ends", LIKELIHOOD, rows)


@needs_harness
def test_solved_examples_are_those_that_the_harness_draws(model: Path, ends: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs: Any = simple_evaluate(
        model=HFLM(pretrained=str(model), device="cpu"), tasks=["ends"], num_fewshot=3,
        task_manager=TaskManager(include_path=str(ends.parent), include_defaults=False),
    )  # fmt: skip
    value = lm_eval(model, ends, num_fewshot=3, device="cpu").value
    assert value == pytest.approx(theirs["results"]["ends"]["perplexity,none"])
    assert value != pytest.approx(lm_eval(model, ends, device="cpu").value)


@needs_harness
def test_chat_templates_are_put_around_questions(model: Path, ends: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "w7 w3 {% for m in messages %}{{ m['content'] }}{% endfor %} w11 w2 "  # nothing is put behind it
    )
    tokenizer.save_pretrained(model)
    rows = [json.loads(line) for line in ends.with_suffix(".jsonl").read_text().splitlines()]
    own = Own(model)
    logs = [own.likelihood(f"w7 w3 {row['question']} w11 w2", row["target"])[0] for row in rows]
    found = lm_eval(model, ends, chat=True, device="cpu")
    assert found.value == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-4)


@needs_harness
def test_compressed_models_are_taken(tasks: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2", initializer_range=0.3)
    whole = regraft.load(folder)
    factorise(whole, LowRankOptions(ratio=2))
    save(whole, tmp_path / "low")
    for file in folder.glob("tok*"):
        (tmp_path / "low" / file.name).write_bytes(file.read_bytes())
    score = lm_eval(tmp_path / "low", tasks, tasks=["first"], device="cpu")
    assert score.value == pytest.approx(Own(tmp_path / "low").choices(questions())[0])


@needs_harness
def test_encoder_decoders_are_taken(tmp_path: Path) -> None:
    t5 = save_tiny(tmp_path / "t5", "t5")
    path = write_task(tmp_path / "tasks", "first", CHOICE, questions(4))
    assert lm_eval(t5, path, device="cpu").n == 4


RECIPE = "models: {a: ./gpt2}\nsteps:\n  s: {evaluate: lm_eval, models: [a], TASKS}\n"


@needs_harness
def test_in_a_recipe_and_on_the_command_line(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "gpt2", "gpt2", initializer_range=0.3)
    monkeypatch.chdir(tmp_path)  # which is no repository: the harness would ask git, and git would say so
    capfd.readouterr()
    text = RECIPE.replace("TASKS", "data: tasks, device: cpu")
    recipe = parse_recipe(text, path=tmp_path / "recipe.yaml")
    found = run(recipe, tmp_path / "out").evaluations
    assert set(found[0].score["per_group"]) == {"first", "second"}
    assert capfd.readouterr() == ("", "")  # the library is silent
    write_rows(tasks / "second.jsonl", questions(5))
    again = run(recipe, tmp_path / "out").evaluations  # the rows are part of what a score is known by
    assert again[0].score["per_group"]["second"]["n"] == 5
    without = parse_recipe(RECIPE.replace("TASKS", "tasks: [arc_easy]"), path=tmp_path / "recipe.yaml")
    assert make_plan(without).steps[0].data is None  # type: ignore[union-attr]
    (tmp_path / "recipe.yaml").write_text(text)
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "--out", "cli"])
    assert result.exit_code == 0, result.output
    (kept,) = json.loads((tmp_path / "cli" / "scores.json").read_text())
    assert kept["score"]["value"] == pytest.approx(lm_eval(model, tasks, device="cpu").value)


def broken(text: str) -> Callable[[Path], object]:
    return lambda tasks: (tasks / "zz.yaml").write_text(text)


def column(tasks: Path) -> None:
    path = tasks / "first.yaml"
    path.write_text(path.read_text().replace("{{question}}", "{{qestion}}"))


def later(tasks: Path) -> None:
    """The harness looks at the first row of a task when it loads it, and at the others when it asks."""
    rows = questions()
    rows[3]["choices"] = []
    write_rows(tasks / "first.jsonl", rows)


@needs_harness
@pytest.mark.parametrize(
    ("spoil", "options", "code", "message"),
    [
        (lambda tasks: None, {"tasks": ["frst"]}, "RG601", r"no task 'frst'.*did you mean 'first'"),
        (lambda tasks: None, {"tasks": ["first"], "measure": "f1"}, "RG303", r"task first has no measure 'f1'"),
        (lambda tasks: None, {"chat": True}, "RG602", r"tokenizer has no chat template"),
        (broken("task: [\n"), {}, "RG601", r"task file cannot be read: .*zz.yaml"),
        (broken("task: first\n"), {}, "RG601", r"two tasks are called 'first'.*first.yaml.*zz.yaml"),
        (broken("task: third\ninclude: none.yaml\n"), {}, "RG601", r"cannot load the task: .*none.yaml"),
        (broken("task: third\noutput_type: guess\n"), {}, "RG601", r"cannot load the task: .*third"),
        (broken("task: third\ndataset_path: nobody/nothing\n"), {}, "RG501", r"cannot be fetched: .*nobody/nothing"),
        (lambda tasks: (tasks / "second.jsonl").unlink(), {}, "RG601", r"cannot load the task: .*second.jsonl"),
        (column, {}, "RG601", r"cannot load the task: 'qestion' is undefined \(first\)"),
        (later, {}, "RG601", r"cannot run these tasks: not enough values to unpack"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(
    spoil: Callable[[Path], object], options: dict[str, Any], code: str, message: str, tasks: Path, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "gpt2", "gpt2", initializer_range=0.3)
    spoil(tasks)
    with pytest.raises(UserError, match=message) as caught:
        lm_eval(model, tasks, device="cpu", **options)
    assert caught.value.code == code


@needs_harness
@pytest.mark.parametrize(
    ("family", "message"), [("vit", "a vit model cannot do language modelling"), ("bert", "no probability of what")]
)
def test_models_that_do_not_write_are_refused(family: str, message: str, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        lm_eval(save_tiny(tmp_path / family, family), tasks, device="cpu")
    assert caught.value.code == "RG602"


@needs_harness
def test_tasks_of_the_harness_itself(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match=r"no task 'arc_eazy'.*did you mean 'arc_easy'\? list them by: lm-eval ls"):
        lm_eval(model, tasks=["arc_eazy"], device="cpu")
    with pytest.raises(UserError, match=r"data of the task cannot be fetched.*arc_easy") as caught:
        lm_eval(model, tasks=["arc_easy"], device="cpu")  # the suite is offline
    assert caught.value.code == "RG501"


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


def test_what_is_refused_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *more: True if n == "lm_eval" else find(n, *more))
    with pytest.raises(UserError, match=r"there is no task \(lm_eval\): name tasks, or give data"):
        lm_eval.check(None, lm_eval.resolve({}))
    with pytest.raises(UserError, match="group has no meaning for tasks"):
        lm_eval.check(None, lm_eval.resolve({"tasks": ["a"], "group": "g"}))
    (tmp_path / "notes.txt").write_text("nothing")
    for data in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="no task is in the data"):
            lm_eval.check(data, lm_eval.resolve({}))
    assert json.dumps(lm_eval.resolve({"tasks": ["a"]}).model_dump(mode="json"))
