"""Tasks of EleutherAI's lm-evaluation-harness, on a causal or encoder-decoder language model.

    score:
      evaluate: lm_eval
      models: [base, merged]
      tasks: [arc_easy, hellaswag]

The harness is an optional package (`pip install "regraft[lm-eval]"`), which brings the tasks; their data sets come from
the Hub. With `data`, a task file of the harness or a folder of such files, the tasks are one's own: all of them, or
those that `tasks` names. A task file can hold Python, which the harness runs, so it is to be trusted as a program is.

The score is the mean over tasks of each task's first measure, or of `measure`; each task is a group of the score, with
all of its measures in the notes. Intervals are 1.96 standard errors as the harness estimates them, those of several
tasks added as if the tasks were independent. Any model that regraft loads is taken, compressed ones included.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any

from pydantic import Field

from regraft.errors import UserError, nearest
from regraft.inspect.intervals import Z
from regraft.inspect.loading import load_config, load_model, load_tokenizer, quiet
from regraft.inspect.metric import MetricOptions, Score, metric
from regraft.inspect.rows import home_of, need


class LmEvalOptions(MetricOptions):
    """Options of lm_eval."""

    tasks: tuple[str, ...] = Field((), description="names of tasks or groups of tasks; by default all that are in data")
    num_fewshot: int | None = Field(
        None, ge=0, description="solved examples before each question; the task's own if not"
    )
    measure: str | None = Field(None, description="which measure of the tasks counts, such as acc_norm or exact_match")
    batch_size: int = Field(8, ge=1, description="requests per forward pass")
    limit: int | None = Field(None, ge=1, description="ask only this many questions of each task, to try things out")
    chat: bool = Field(False, description="put questions into the model's chat template")


def _check(data: Path | None, options: LmEvalOptions) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        need("lm_eval", "lm-eval", "the metric lm_eval")
    if data is None and not options.tasks:
        raise UserError("RG303", "there is no task", where="lm_eval", fix="name tasks, or give data with tasks in it")
    for name in ("group", "split"):
        if getattr(options, name) is not None:
            fix = "leave it out: tasks are the groups, and say what they read"
            raise UserError("RG303", f"{name} has no meaning for tasks of the harness", where="lm_eval", fix=fix)


@metric(
    summary="tasks of the lm-evaluation-harness, on a language model",
    options=LmEvalOptions,
    check=_check,
    data="optional",
)
def lm_eval(model: Path, data: Path | None, options: LmEvalOptions) -> Score:
    """Raises RG602 for models that cannot be used, RG601 for tasks, RG303 for measures that a task lacks."""
    _check(data, options)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    two = load_config(model).is_encoder_decoder
    kind = "AutoModelForSeq2SeqLM" if two else "AutoModelForCausalLM"
    loaded = load_model(model, kind, "language modelling", device=options.device)
    tokenizer = load_tokenizer(loaded)
    manager = TaskManager(include_path=str(home_of(data)) if data is not None else None, include_defaults=data is None)
    tasks = _tasks(manager, data, options)
    with quiet():
        asked = HFLM(
            pretrained=loaded.model, tokenizer=tokenizer, backend="seq2seq" if two else "causal",
            batch_size=options.batch_size,
        )  # fmt: skip
        try:
            found: Any = simple_evaluate(
                model=asked, tasks=tasks, num_fewshot=options.num_fewshot, limit=options.limit, task_manager=manager,
                apply_chat_template=options.chat, log_samples=False,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"the harness cannot run these tasks: {first}"
            raise UserError("RG601", what, where=", ".join(tasks), fix="check the task and its data") from None
    scores = {name: _score(found, name, options.measure) for name in tasks}
    return _mean(scores)


def _tasks(manager: Any, data: Path | None, options: LmEvalOptions) -> list[str]:
    """The names of the tasks to run.

    Raises:
        UserError: RG601 for tasks that are not there.
    """
    known = list(manager.all_tasks)
    if data is not None and data.is_file():
        paths = {name: manager.task_index[name].yaml_path for name in known}
        known = [name for name, path in paths.items() if path is not None and Path(path).samefile(data)]
    for name in options.tasks:
        if name not in known:
            what = f"there is no task {name!r}"
            raise UserError("RG601", what, where=str(data or "lm_eval"), fix=nearest(name, known)[:200])
    chosen = list(options.tasks) or known
    if not chosen:
        fix = "give a task file of the harness, or a folder of such files"
        raise UserError("RG601", "no task is in the data", where=str(data), fix=fix)
    return chosen


def _score(found: Any, task: str, measure: str | None) -> Score:
    """One task's score: its first measure, or the one that is wanted."""
    results = found["results"].get(task) or found.get("groups", {}).get(task) or {}
    values = {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr" not in key and isinstance(value, (int, float))
    }
    names = {key.partition(",")[0]: key for key in reversed(values)}
    if not values or (measure is not None and measure not in names):
        what = f"the task {task} has no measure {measure!r}" if values else f"the task {task} gave no number"
        raise UserError("RG303", what, where="lm_eval", fix=nearest(measure or "", names) or "choose another task")
    key = names[measure] if measure is not None else next(iter(values))
    name, _, way = key.partition(",")
    error = results.get(f"{name}_stderr,{way}")
    samples = found.get("n-samples", {}).get(task, {}).get("effective") or results.get("sample_len") or 0
    half = Z * error if isinstance(error, (int, float)) and math.isfinite(error) else None
    return Score(
        value=values[key],
        higher_is_better=found.get("higher_is_better", {}).get(task, {}).get(name) is not False,
        n=int(samples),
        unit="questions",
        interval=(values[key] - half, values[key] + half) if half is not None else None,
        notes={"measure": name, "measures": values},
    )


def _mean(scores: dict[str, Score]) -> Score:
    first = next(iter(scores.values()))
    if len(scores) == 1:
        return first.model_copy(update={"per_group": {}})
    measures = list(dict.fromkeys(one.notes["measure"] for one in scores.values()))
    if len({one.higher_is_better for one in scores.values()}) > 1:
        what = "of some tasks more is better, and of others less, so that they have no mean"
        raise UserError("RG303", what, where="lm_eval", fix="evaluate them in steps of their own, or give measure")
    value = math.fsum(one.value for one in scores.values()) / len(scores)
    halves = [(one.interval[1] - one.interval[0]) / 2 for one in scores.values() if one.interval is not None]
    half = math.hypot(*halves) / len(scores) if len(halves) == len(scores) else None
    return Score(
        value=value,
        higher_is_better=first.higher_is_better,
        n=sum(one.n for one in scores.values()),
        unit="questions",
        interval=(value - half, value + half) if half is not None else None,
        per_group=scores,
        notes={"measure": ", ".join(measures)},
    )
