"""Small pre-trained models that experiments share: made once, kept in the cache under the content of what made them.

    @entry(data="scikit-learn's digits, upright")
    def digits_base(folder: Path, *, seed: int, scale: str) -> Quality:
        ...  # trains, saves an ordinary checkpoint into `folder`, and says how good it is

    path = digits_base(seed=0, scale="laptop")

The record beside it has the data, the options, the size, the processor time, and how good the model is. The key is made
of the entry's name and arguments, the code that makes it and the versions of what computes. A model that is no better
than its baseline is an error, except at scale "smoke", where nothing is trained long enough.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from regraft.checkpoint.model import open_checkpoint
from regraft.checkpoint.paths import cache_folder
from regraft.claims.find import state_of
from regraft.errors import UserError

RECORD = "zoo.json"
FAR = 0.25  # a model must have come at least this share of the way from guessing to perfection
_spent = [0.0]  # processor time of all entries that this process has made
_used: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Quality:
    """How good a model is, and what it must beat.

    Attributes:
        metric: what was measured, on what.
        value, baseline: the model's, and the baseline's, which `against` names (an n-gram model, a linear model, the
            model before fine-tuning).
        margin: by how much the model must be better than the baseline.
        chance: what guessing gives, where that has a meaning.
        higher_is_better: True for shares, of which 1 is perfect; False for losses, of which 0 is.
    """

    metric: str
    value: float
    baseline: float
    against: str
    margin: float
    chance: float | None = None
    higher_is_better: bool = True

    @property
    def enough(self) -> bool:
        gain = self.value - self.baseline
        return (gain if self.higher_is_better else -gain) >= self.margin and self.far_from_chance

    @property
    def far_from_chance(self) -> bool:
        if self.chance is None:
            return True
        way = (1.0 if self.higher_is_better else 0.0) - self.chance
        return (self.value - self.chance) / way >= FAR


class NotGoodEnoughError(UserError):
    """A model of the zoo that is not far enough above its baseline to be called trained (RG906)."""

    def __init__(self, what: str) -> None:
        super().__init__("RG906", what, fix="give it more steps or data, or leave the seed out")

    def __reduce__(self) -> tuple[type[NotGoodEnoughError], tuple[str]]:
        return type(self), (self.what,)  # on its way from another process


Maker = Callable[..., Quality]


def entry(*, data: str) -> Callable[[Maker], Callable[..., Path]]:
    """Make a cached entry of a function that saves a checkpoint; `data` says in words what it learns from."""

    def decorate(make: Maker) -> Callable[..., Path]:
        signature = inspect.signature(make)
        source = inspect.getsourcefile(make)
        assert source is not None
        code = state_of(Path(source))  # as it was imported, whatever becomes of the file meanwhile

        @functools.wraps(make)
        def made(**arguments: Any) -> Path:
            bound = signature.bind(Path(), **arguments)
            bound.apply_defaults()
            options = {name: value for name, value in bound.arguments.items() if name != "folder"}
            target = cache_folder("zoo") / f"{make.__name__}-{_key(make, options, code)}"
            if not (target / RECORD).is_file():
                _make(make, target, options, data)
            record = json.loads((target / RECORD).read_text(encoding="utf-8"))
            if record not in _used:
                _used.append(record)
            return target

        return made

    return decorate


@contextmanager
def models_used() -> Iterator[list[dict[str, Any]]]:
    """Collects the records of the entries that are asked for within the context."""
    _used.clear()
    collected: list[dict[str, Any]] = []
    yield collected
    collected += _used


def _key(make: Maker, options: dict[str, Any], code: str) -> str:
    with_what = [platform.python_version(), *(metadata.version(name) for name in ("torch", "transformers"))]
    content = json.dumps([make.__name__, options, code, with_what], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=10).hexdigest()


def _make(make: Maker, target: Path, options: dict[str, Any], data: str) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        started, before = time.process_time(), _spent[0]
        quality = make(part, **options)
        # What it is made from may have been made meanwhile; that has a record of its own.
        seconds = time.process_time() - started - (_spent[0] - before)
        _spent[0] += seconds
        record = {
            "name": make.__name__,
            "options": options,
            "data": data,
            "parameters": open_checkpoint(str(part)).parameters,
            "seconds": round(seconds, 1),
            "quality": asdict(quality),
        }
        if not quality.enough and options.get("scale") != "smoke":
            asked = ", ".join(f"{key} {value}" for key, value in options.items())
            raise NotGoodEnoughError(
                f"{make.__name__} ({asked}): {quality.metric} is {quality.value:.4g}, {quality.against} has "
                f"{quality.baseline:.4g}, and it must be better by {quality.margin:.4g}"
                + ("" if quality.far_from_chance else f"; guessing gives {quality.chance:.4g}")
            )
        (part / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with suppress(OSError):  # another process has made the same meanwhile
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
