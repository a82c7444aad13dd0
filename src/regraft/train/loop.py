"""`train`: any model, any objective, any data, one loop; it goes on where a former run into its folder ended."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from regraft.errors import UserError
from regraft.train import heads, processes
from regraft.train.lora import apart
from regraft.train.objective import Objective
from regraft.train.options import TrainOptions

RUN_FILE = "run.json"
Tell = Callable[[int, int, Mapping[str, float]], None]


@dataclass
class TrainResult:
    """What a run did.

    Attributes:
        steps: optimiser steps that the model has had, those of former runs included.
        history: the log, one entry per `logging_steps`: step, loss, its parts, learning_rate, grad_norm.
        seconds: of this run.
        resumed_from: the step that it went on from, 0 for a new run.
    """

    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed_from: int = 0

    def facts(self) -> dict[str, Any]:
        """What a method tells of its training."""
        return {"steps": self.steps, "seconds": self.seconds, "history": self.history}


def steps_of(options: TrainOptions, data: Any) -> int:
    """Optimiser steps of a run, in as many processes as this one has.

    Raises:
        UserError: RG303 for a stream without max_steps.
    """
    if options.max_steps is not None:
        return options.max_steps
    if not isinstance(data, Sized):
        raise UserError("RG303", "a stream has no length", fix="give max_steps")
    batch = options.per_device_train_batch_size
    batches = len(data) // batch if options.drop_last else math.ceil(len(data) / batch)
    passes = options.gradient_accumulation_steps * processes.count()
    return max(1, math.ceil(options.num_train_epochs * batches / passes))


def train(
    model: Any,
    objective: Objective,
    data: Sequence[Mapping[str, Any]] | Iterable[Mapping[str, Any]],
    options: TrainOptions | None = None,
    *,
    folder: Path | str,
    key: str = "",
    device: str = "auto",
    tell: Tell | None = None,
) -> TrainResult:
    """Train a model in place; of a PEFT model, its adapter.

    The folder holds checkpoints while the run lasts. If a former run with the same options and key left one there, this
    run goes on from it, and ends with the same weights, to the bit on the same hardware, as a run that was not stopped.
    Ctrl-C ends the run after the step it is in, with a checkpoint that `regraft.load` opens; a second one at once.

    Args:
        model: a transformers model, or one with an adapter of PEFT, whose checkpoints hold the adapter alone.
        objective: what to minimise.
        data: anything with a length and numbered entries, such as a list or a `datasets.Dataset`, else a stream: an
            iterable that gives the same each time.
        options: how to train.
        folder: for checkpoints and logs; made if it does not exist.
        key: names model, objective and data, where they may differ between runs into the same folder.
        device: "auto" for the GPU if there is one, or "cpu".
        tell: called after each step with (step, steps, figures); figures hold loss, seconds_left and more.

    Raises:
        UserError: for models, data and options that do not go together, before the first step; RG604 for a loss that is
            not finite.
        KeyboardInterrupt: with a sentence, after Ctrl-C.
    """
    options = options or TrainOptions()
    _need_accelerate(options)
    model, adapter = apart(model)
    _check_model(model)
    _check_sharding(options, adapter)
    folder = Path(folder)
    if isinstance(data, Sized) and not len(data):
        raise UserError("RG601", "the data is empty", fix="give data with at least one example")
    steps = steps_of(options, data)
    try:
        objective.prepare(model)
        _check_objective(objective, model, options, adapter)
        return _run(model, adapter, objective, data, options, steps, folder, key, device, tell)
    finally:
        heads.remove(model)


def _run(
    model: Any,
    adapter: Any | None,
    objective: Objective,
    data: Any,
    options: TrainOptions,
    steps: int,
    folder: Path,
    key: str,
    device: str,
    tell: Tell | None,
) -> TrainResult:
    """`train`, of a model and an objective that are ready."""
    from regraft.train.engine import Engine, checkpoints

    if options.gradient_checkpointing:
        _keep_activations(model, False)
    _claim_together(folder, options, len(data) if isinstance(data, Sized) else None, key, device)
    use_cache = getattr(model.config, "use_cache", None)
    begun = time.monotonic()
    with _stopping() as stop:
        engine = Engine(
            model, objective, data, options, steps, folder,
            adapter=adapter, device=device, tell=tell or (lambda step, steps, figures: None), stop=lambda: bool(stop),
        )  # fmt: skip
        former = checkpoints(folder)
        resumed = int(former[-1].name.rpartition("-")[2]) if former else 0
        engine.resume(former[-1] if former else None)
    done = engine.state.global_step
    if use_cache is not None:
        model.config.use_cache = use_cache
    if options.gradient_checkpointing:
        _keep_activations(model, True)
    if done < steps:
        kept = f"step {done:,} of {steps:,} is kept in {folder}, and the same run goes on from there"
        raise KeyboardInterrupt(kept)
    engine.finish()
    model.eval()
    history = [{k: float(v) for k, v in entry.items()} for entry in engine.state.log_history if "loss" in entry]
    return TrainResult(done, history, time.monotonic() - begun, resumed)


def _keep_activations(model: Any, keep: bool) -> None:
    """Have a model keep its activations for the way back, or compute them again; transformers 5 renamed the switch."""
    switch = "disable" if keep else "enable"
    for name in (f"activation_checkpointing_{switch}", f"gradient_checkpointing_{switch}"):
        if hasattr(model, name):
            getattr(model, name)()
            return


def _check_model(model: Any) -> None:
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        what = f"a {type(model).__name__} is no model of transformers"
        fix = "give the model itself, or a PEFT model of it"
        raise UserError("RG309", what, fix=fix)


def _check_sharding(options: TrainOptions, adapter: Any | None) -> None:
    """Raise RG303 or RG309 for weights that cannot be divided among processes."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":  # which accelerate ignores on processors
        what = "the run was launched with weights that accelerate is to divide among processes"
        raise UserError("RG309", what, fix="launch it without FSDP and DeepSpeed, and set fsdp to true")
    if options.fsdp and processes.count() == 1:
        what = "fsdp divides the weights among processes, and there is one"
        raise UserError("RG303", what, fix="launch several with accelerate or torchrun, or set fsdp to false")
    if options.fsdp and adapter is not None:
        what = "an adapter with weights that are divided among processes"
        raise UserError("RG309", what, fix="set fsdp to false, or train without an adapter")


def _check_objective(objective: Objective, model: Any, options: TrainOptions, adapter: Any | None) -> None:
    """Raise RG309 for an objective that needs whole weights, or has modules of its own, where that cannot be."""
    if options.fsdp and objective.reads_weights:
        what = "an objective that computes with weights, which are divided among processes"
        raise UserError("RG309", what, fix="set fsdp to false, or for pela perturbation_weight to 0")
    if heads.present(model) and (options.fsdp or adapter is not None):
        kind = "weights that are divided among processes" if options.fsdp else "an adapter"
        what = f"an objective that trains modules of its own beside {kind}"
        raise UserError("RG309", what, fix="set fsdp to false, and train the model itself")


def clear(folder: Path) -> None:
    """Remove the checkpoints of a run that is done."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    (folder / RUN_FILE).unlink(missing_ok=True)


def _claim(folder: Path, options: TrainOptions, examples: int | None, key: str) -> None:
    """Make the folder this run's: checkpoints and logs of another one in it are removed."""
    from regraft.train import board

    indifferent = {"logging_steps", "save_steps", "save_total_limit", "tensorboard", "dataloader_num_workers"}
    chosen = options.model_dump(mode="json", exclude=indifferent)
    asked = {"options": chosen, "examples": examples, "key": key, "processes": processes.count()}
    digest = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = folder / RUN_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")).get("run") if path.is_file() else None
        if known != digest:
            clear(folder)
            board.clear(folder)
            path.write_text(json.dumps({"run": digest, **asked}, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, AttributeError) as error:
        what = f"the folder for checkpoints cannot be used: {error}"
        raise UserError("RG405", what, where=str(folder), fix="name another folder") from None


def _claim_together(folder: Path, options: TrainOptions, examples: int | None, key: str, device: str) -> None:
    """`_claim`, by the first of several processes; the others wait for it."""
    everyone = processes.team(device)
    if everyone.first:
        _claim(folder, options, examples, key)
    everyone.meet()


def _need_accelerate(options: TrainOptions) -> None:
    for package, extra in [("accelerate", "train"), *([("tensorboard", "")] if options.tensorboard else [])]:
        if importlib.util.find_spec(package) is None:
            fix = f'pip install "regraft[{extra}]"' if extra else f"pip install {package}"
            raise UserError("RG602", f"training needs the package {package}", fix=fix)


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Within the context the first Ctrl-C (or SIGTERM) is noted, and the second one is handled as before."""
    arrived: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        for which, handler in before.items():
            signal.signal(which, handler)

    if threading.current_thread() is threading.main_thread():
        for which in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(which) not in (signal.SIG_IGN, None):
                before[which] = signal.signal(which, note)
    try:
        yield arrived
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
