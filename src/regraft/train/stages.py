"""Methods that are several trainings in a row: each with its own objective, data, schedule and checkpoints.

What a stage has made is kept beside its checkpoints until the whole is done, so that a run that was stopped in the
third stage does not train the first two again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regraft.train.loop import clear, steps_of, train
from regraft.train.making import Work
from regraft.train.objective import Objective
from regraft.train.options import TrainOptions

DONE = "done-"  # begins the names of files that a stage leaves for a run that goes on


@dataclass
class Stages:
    """The trainings of one run of a method.

    Attributes:
        work: what the method was given.
        steps: of all stages together, for the progress.
    """

    work: Work[Any]
    steps: int
    _done: int = field(default=0, init=False)
    _history: list[dict[str, float]] = field(default_factory=list, init=False)
    _each: list[dict[str, Any]] = field(default_factory=list, init=False)

    def fit(self, name: str, model: Any, objective: Objective, data: Any, options: TrainOptions) -> None:
        """Train a model in place; if this stage was done before, give it the weights that came out."""
        folder = self.work.folder / name
        kept = folder / f"{DONE}{self._digest(name, options)}.pt"
        if kept.is_file():
            found = torch.load(kept, map_location="cpu", weights_only=True)
            model.load_state_dict(found["weights"])
            model.eval()
        else:
            found = self._trained(name, model, objective, data, options, folder)
            _write(kept, {**found, "weights": {key: value.cpu() for key, value in model.state_dict().items()}})
            clear(folder)
        self._history += [{**entry, "step": entry["step"] + self._done} for entry in found["history"]]
        self._each.append(
            {"name": name, "steps": found["steps"], "seconds": found["seconds"], "rows": _rows(data), **_ends(found)}
        )
        self._done += found["steps"]

    def facts(self) -> dict[str, Any]:
        """What a method tells of its training: all stages as one, and each."""
        seconds = sum(one["seconds"] for one in self._each)
        return {"steps": self._done, "seconds": seconds, "history": self._history, "stages": self._each}

    def _trained(
        self, name: str, model: Any, objective: Objective, data: Any, options: TrainOptions, folder: Path
    ) -> dict[str, Any]:
        before = self._done

        def tell(step: int, steps: int, figures: Mapping[str, float]) -> None:
            self.work.tell(before + step, self.steps, figures)

        rows = _rows(data)
        self.work.message(f"{name}: {steps_of(options, rows):,} steps" + (f" on {rows:,} rows" if rows else ""))
        result = train(
            model, objective, data, options,
            folder=folder, key=f"{self.work.key} {name}", device=self.work.device, tell=tell,
        )  # fmt: skip
        return {"steps": result.steps, "seconds": result.seconds, "history": result.history}

    def _digest(self, name: str, options: TrainOptions) -> str:
        facts = [self.work.key, name, options.model_dump(mode="json")]
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _rows(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


def _ends(found: Mapping[str, Any]) -> dict[str, float]:
    history = found["history"]
    return {"first_loss": history[0]["loss"], "last_loss": history[-1]["loss"]} if history else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(content, part)
    part.replace(path)
