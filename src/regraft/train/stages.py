"""Several trainings in a row: told as one, and of methods with stages, each with its own objective, data and schedule.

What a stage has made is kept beside its checkpoints until the whole is done, so that a run that was stopped in the
third stage does not train the first two again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regraft.train import processes
from regraft.train.loop import Tell, TrainResult, clear, steps_of, train
from regraft.train.making import Work
from regraft.train.objective import Objective
from regraft.train.options import TrainOptions

DONE = "done-"  # begins the names of files that a stage leaves for a run that goes on


@dataclass
class Progress:
    """The progress of several trainings: steps of all of them, and the time that is left for all.

    Attributes:
        tell: told of each step.
        steps: of all trainings.
    """

    tell: Tell
    steps: int
    _begun: tuple[float, int] | None = field(default=None, init=False)  # a time, and the steps that were done by then

    def behind(self, before: int) -> Tell:
        """What a training that begins now, behind so many steps, tells of its own steps."""
        now = time.monotonic()

        def tell(step: int, steps: int, figures: Mapping[str, float]) -> None:
            done = before + step
            self._begun = self._begun or (now, done - 1)
            begun, first = self._begun
            left = (time.monotonic() - begun) / (done - first) * (self.steps - done)
            self.tell(done, self.steps, {**figures, "seconds_left": left})

        return tell


def joined(results: Sequence[TrainResult]) -> TrainResult:
    """Trainings one behind the other as one, whose log goes on counting steps."""
    history: list[dict[str, float]] = []
    before = 0
    for result in results:
        history += [{**entry, "step": before + entry["step"]} for entry in result.history]
        before += result.steps
    return TrainResult(before, history, sum(result.seconds for result in results))


class Stages:
    """The trainings of one run of a method.

    Args:
        work: what the method was given.
        steps: of all stages together, for the progress.
    """

    def __init__(self, work: Work[Any], steps: int) -> None:
        self.work = work
        self._progress = Progress(work.tell, steps)
        self._results: list[TrainResult] = []
        self._each: list[dict[str, Any]] = []

    def fit(self, name: str, model: Any, objective: Objective, data: Any, options: TrainOptions) -> None:
        """Train a model in place; if this stage was done before, give it the weights that came out."""
        folder = self.work.folder / name
        kept = folder / f"{DONE}{self._digest(name, options)}.pt"
        everyone = processes.team(self.work.device)
        if everyone.agreed(kept.is_file()):
            found = torch.load(kept, map_location="cpu", weights_only=True)
            model.load_state_dict(found["weights"])
            model.eval()
            result = TrainResult(found["steps"], found["history"], found["seconds"])
        else:
            result = self._trained(name, model, objective, data, options, folder)
            if everyone.first:
                weights = {key: value.cpu() for key, value in model.state_dict().items()}
                _write(kept, {**result.facts(), "weights": weights})
                clear(folder)
            everyone.meet()
        self._results.append(result)
        rows = len(data) if isinstance(data, Sized) else None
        facts = {"name": name, "steps": result.steps, "seconds": result.seconds, "rows": rows}
        if result.history:
            facts |= {"first_loss": result.history[0]["loss"], "last_loss": result.history[-1]["loss"]}
        self._each.append(facts)

    def facts(self) -> dict[str, Any]:
        """What a method tells of its training: all stages as one, and each."""
        return {**joined(self._results).facts(), "stages": self._each}

    def _trained(
        self, name: str, model: Any, objective: Objective, data: Any, options: TrainOptions, folder: Path
    ) -> TrainResult:
        rows = f" on {len(data):,} rows" if isinstance(data, Sized) else ""
        self.work.message(f"{name}: {steps_of(options, data):,} steps{rows}")
        before = sum(result.steps for result in self._results)
        return train(
            model, objective, data, options,
            folder=folder, key=f"{self.work.key} {name}", device=self.work.device, tell=self._progress.behind(before),
        )  # fmt: skip

    def _digest(self, name: str, options: TrainOptions) -> str:
        facts = [self.work.key, name, options.model_dump(mode="json")]
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(content, part)
    part.replace(path)
