"""What TensorBoard shows of a run: a folder of event files, without what a killed run wrote behind its checkpoint.

The logs of a run that goes on are one curve: the steps behind the checkpoint are taken back by the event that begins
the new file, which TensorBoard and its readers know, and a run that begins anew removes what is there. (The callback of
transformers begins another folder each time, named after the hour and the machine, so that these steps are there twice,
in two curves.) The files that go into a model's folder are numbered, since their names hold that of the machine.

The figures are those of the log: loss, its parts, learning_rate, grad_norm.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

FOLDER = "runs"  # as the Trainer of transformers calls it
_EVENTS = "events.out.tfevents"


class Board(transformers.TrainerCallback):
    """Writes the log of a run into `folder`/runs; only in the first of several processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._writer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not state.is_world_process_zero:
            return
        if state.global_step == 0:
            clear(self._folder.parent)
        self._writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self._writer is None or not logs or "loss" not in logs:  # what the Trainer sums up is no point of a curve
            return
        for name, value in logs.items():
            self._writer.add_scalar(f"train/{name}", float(value), state.global_step)
        self._writer.flush()  # a process that dies has written what it has logged

    def close(self) -> None:
        """Called however the run ends."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def clear(folder: Path) -> None:
    """Remove the logs of another run into this folder."""
    if (folder / FOLDER).exists():
        shutil.rmtree(folder / FOLDER)


def publish(work: Path, model: Path) -> None:
    """Copy the logs of the trainings in and below `work` into a model's folder, each under the name of its training."""
    kept: dict[Path, list[Path]] = {}
    for path in work.rglob(f"{_EVENTS}.*"):
        if path.parent.name == FOLDER:
            kept.setdefault(path.parent.parent.relative_to(work), []).append(path)
    for name, paths in kept.items():
        target = model / FOLDER / name
        target.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(sorted(paths, key=_written)):
            seconds = path.name.removeprefix(f"{_EVENTS}.").partition(".")[0]
            shutil.copyfile(path, target / f"{_EVENTS}.{seconds}.{number:04}")


def _written(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name
