"""Tasks of EleutherAI's lm-evaluation-harness, on a causal or encoder-decoder language model.

    score:
      evaluate: lm_eval
      models: [base, merged]
      tasks: [arc_easy, hellaswag]

The harness is an optional package (`pip install "regraft[lm-eval]"`), which brings the tasks; their data sets come from
the Hub. With `data`, a task file of the harness (.yaml) or a folder of such files, the tasks are one's own: those that
`tasks` names, or all of them, where a group stands for its members. A task file can hold Python, which the harness
runs, so it is to be trusted as a program is. Paths in it, such as those of `data_files`, are absolute or begin where
the command runs, as in the harness. A run knows a score that it has by the bytes of `data`: keep the rows of a task in
the folder that `data` names, and rows that change are asked again.

The score is the mean over tasks of each task's first measure, or of `measure`; each task is a group of the score, with
all of its measures in the notes. A name that stands for several tasks (a tag, or a group without a measure of its own)
counts as these tasks. Intervals are 1.96 standard errors as the harness estimates them, those of several tasks added as
if the tasks were independent. What the harness warns of, such as questions that it cut because they are longer than the
model reads, is in the notes as well. Any model that regraft loads is taken, compressed ones included.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from regraft.errors import UserError, nearest
from regraft.inspect.intervals import Z
from regraft.inspect.loading import Loaded, load_config, load_model, load_tokenizer, quiet, refuse_masked
from regraft.inspect.metric import MetricOptions, Score, metric
from regraft.inspect.rows import home_of, need


class LmEvalOptions(MetricOptions):
    """Options of lm_eval."""

    tasks: tuple[str, ...] = Field((), description="names of tasks or groups of tasks; by default all that are in data")
    num_fewshot: int | None = Field(
        None, ge=0, description="solved examples before each question; the task's own if not"
    )
    measure: str | None = Field(
        None, description="which measure of the tasks counts, such as acc_norm, or with its filter exact_match,none"
    )
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
    if data is not None:
        _own_tasks(data)


@metric(
    summary="tasks of the lm-evaluation-harness, on a language model",
    options=LmEvalOptions,
    check=_check,
    data="optional",
)
def lm_eval(model: Path, data: Path | None, options: LmEvalOptions) -> Score:
    """Raises RG602 for models that cannot be used, RG601 and RG501 for tasks, RG303 for measures that a task lacks."""
    _check(data, options)
    config = load_config(model)
    refuse_masked(config, model, "no probability of what comes next, which tasks of the harness ask for")
    two = bool(config.is_encoder_decoder)
    kind = "AutoModelForSeq2SeqLM" if two else "AutoModelForCausalLM"
    loaded = load_model(model, kind, "language modelling", device=options.device)
    found, names, warnings = _answers(loaded, two, data, options)
    score = _mean({name: _score(found, name, options.measure) for name in names})
    return score.model_copy(update={"notes": {**score.notes, "warnings": warnings}}) if warnings else score


def _answers(loaded: Loaded, two: bool, data: Path | None, options: LmEvalOptions) -> tuple[Any, list[str], list[str]]:
    """What the harness found, the tasks that count, and what it warns of."""
    import torch
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = load_tokenizer(loaded)
    if options.chat and tokenizer.chat_template is None:
        what = "the model's tokenizer has no chat template"
        raise UserError("RG602", what, where=str(loaded.folder), fix="leave out chat, or take a model for chats")
    folder = str(home_of(data)) if data is not None else None
    with _silence():  # it warns that it was given a model instead of a name
        manager = TaskManager(include_path=folder, include_defaults=data is None)
        asked = HFLM(
            pretrained=loaded.model, tokenizer=tokenizer, backend="seq2seq" if two else "causal",
            batch_size=options.batch_size,
        )  # fmt: skip
    with _silence() as warnings:
        _seed()
        names = _names(manager, data, options)
        tasks = [task for name in names for task in _opened(manager, name)]
        try:
            opened = manager.load(tasks)
            remarks = [one for task in opened["tasks"].values() if (one := _show_solved(task, options.num_fewshot))]
            found: Any = evaluate(
                lm=asked, task_dict=opened, limit=options.limit, apply_chat_template=options.chat,
                fewshot_as_multiturn=options.chat, log_samples=False,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            what = f"the harness cannot run these tasks: {_line(error)}"
            raise UserError("RG601", what, where=", ".join(names), fix="check the task and its data") from error
    counted = list(dict.fromkeys(one for name in names for one in _counted(manager, found, name)))
    return found, counted, [*remarks, *warnings.values()]


def _seed() -> None:
    """What is drawn is what the harness's own command draws, which begins in the same way."""
    import random

    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _show_solved(task: Any, wanted: int | None) -> str | None:
    """Set how many solved examples a task shows, by the harness's rules; a remark if the task does not allow that."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own = task.get_config("num_fewshot")
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if own == 0 and wanted:
        return f"{task.task_name} is asked without solved examples, as its file says, whatever num_fewshot is"
    task.set_config(key="num_fewshot", value=wanted if wanted is not None else own or 0)
    return None


def _own_tasks(data: Path) -> dict[str, Path]:
    """The names of the tasks in a task file, or in the files of a folder that can be tasks, with where each is.

    The harness passes over files that it cannot read, and over a second task of one name; here both are errors.

    Raises:
        UserError: RG601 for such files, and if there is no task at all.
    """
    names: dict[str, Path] = {}
    for path in [data] if data.is_file() else sorted(data.rglob("*.yaml")):
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)  # runs no tags: !function
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            what = f"the task file cannot be read: {_line(error)}"
            raise UserError("RG601", what, where=str(path), fix="mend it, or take it out of the folder") from None
        for name in _written_in(root):
            if name in names:
                what = f"two tasks are called {name!r}, the other one in {names[name]}"
                raise UserError("RG601", what, where=str(path), fix="rename one of them")
            names[name] = path
    if not names or (data.is_file() and data.suffix != ".yaml"):
        fix = "give a task file of the harness, whose name ends in .yaml, or a folder of such files"
        raise UserError("RG601", "no task is in the data", where=str(data), fix=fix)
    return names


def _written_in(root: Any) -> list[str]:
    """The group or task that a file defines; one without is there to be included by others."""
    if not isinstance(root, yaml.MappingNode):
        return []
    values = {key.value: value for key, value in root.value if isinstance(key, yaml.ScalarNode)}
    found = [values[key].value for key in ("group", "task") if isinstance(values.get(key), yaml.ScalarNode)]
    return found[:1]


def _names(manager: Any, data: Path | None, options: LmEvalOptions) -> list[str]:
    """The names of the tasks to run.

    Raises:
        UserError: RG601 for tasks that are not there, or that the harness cannot read.
    """
    own = _own_tasks(data) if data is not None else {}
    for name, path in own.items():
        if name not in manager.task_index:
            _opened(manager, str(path))  # which says why
            what = f"the harness does not find the task {name!r}"
            raise UserError("RG601", what, where=str(path), fix="check the names in the file")
    tags = [tag for tag in manager.all_tags if set(own).intersection(manager.task_index[tag].tags)]
    known = [*own, *tags] if data is not None else list(manager.all_tasks)
    for name in options.tasks:
        if name not in known:
            hint = nearest(name, known)
            if data is None:  # the harness has thousands
                hint = hint.partition("(known: ")[0] + "list them by: lm-eval ls tasks"
            raise UserError("RG601", f"there is no task {name!r}", where=str(data or "lm_eval"), fix=hint)
    if options.tasks:
        return list(options.tasks)
    inside = {member for name in own for member in _members(manager, name)}
    return [name for name in own if name not in inside]


def _members(manager: Any, group: str) -> Iterator[str]:
    """The tasks and groups that a group names, those that a tag stands for included."""
    listed = (manager.task_index[group].cfg or {}).get("task")
    for item in listed if isinstance(listed, list) else []:
        name = item if isinstance(item, str) else item.get("task") or item.get("group")
        yield from sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]


def _opened(manager: Any, name: str) -> list[Any]:
    """The tasks and groups of the harness that a name stands for, with their data.

    Raises:
        UserError: RG501 for data that the Hub would have to give and does not, RG601 for anything else.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HTTPError

    try:
        found = manager.load([name])
    except Exception as error:
        if isinstance(error, (ConnectionError, DatasetNotFoundError, HTTPError)):
            what = f"the data of the task cannot be fetched: {_line(error)}"
            fix = "check the connection and HF_HUB_OFFLINE, or give tasks whose data is on this disk with data"
            raise UserError("RG501", what, where=name, fix=fix) from error
        what = f"the harness cannot load the task: {_line(error)}"
        raise UserError("RG601", what, where=name, fix="check the task and its data") from error
    inside = {child for children in found.get("group_map", {}).values() for child in children}
    groups = [group for one, group in found.get("groups", {}).items() if one not in inside]
    within = {task.task_name for group in groups for task in group.get_all_tasks()}
    return [*groups, *(task for one, task in found["tasks"].items() if one not in within)]


def _counted(manager: Any, found: Any, name: str) -> list[str]:
    """The rows of the results that a name stands for."""
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    children = found.get("group_subtasks", {}).get(name, [])
    if _values(found["results"].get(name, {})) or not children:
        return [name]
    return [one for child in children for one in _counted(manager, found, child)]


@contextmanager
def _silence() -> Iterator[dict[tuple[str, int], str]]:
    """Nothing of the harness's bars, prints and reports is shown; yields its warnings, the first one of each kind."""
    kept: dict[tuple[str, int], str] = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.setdefault((record.pathname, record.lineno), record.getMessage())

    logger, keep = logging.getLogger("lm_eval"), Keep(logging.WARNING)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(keep)
    try:
        with quiet(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield kept
    finally:
        logger.removeHandler(keep)
        logger.setLevel(level)
        logger.propagate = propagate


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _values(results: Any) -> dict[str, float]:
    """The measures of a row: "acc,none" -> number."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr" not in key and isinstance(value, (int, float))
    }


def _score(found: Any, task: str, measure: str | None) -> Score:
    """One task's score: its first measure, or the one that is wanted."""
    results = found["results"].get(task, {})
    values = _values(results)
    names = {key.partition(",")[0]: key for key in reversed(values)} | {key: key for key in values}
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
