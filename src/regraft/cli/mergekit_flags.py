"""The switches of `mergekit-yaml`, so that its users' commands work as they are: some are ours under other names, most
are needless here, and each that is given is answered.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from regraft.cli.terminal import Terminal
from regraft.errors import UserError
from regraft.recipe.settings import Settings

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmb]?)", re.IGNORECASE)
_TENSORS = {"tensor-intersection": "common", "tensor-union": "any"}
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Flag:
    """One switch: `takes` is the type of its value; `needless` says why nothing has to be done."""

    name: str
    takes: type = bool
    needless: str = ""
    short: str = ""

    @property
    def attribute(self) -> str:
        return "mergekit_" + self.name.replace("-", "_")

    @property
    def parameter(self) -> inspect.Parameter:
        flag = f"--{self.name}/--no-{self.name}" if self.takes is bool else f"--{self.name}"
        names = (flag, self.short) if self.short else (flag,)
        kind: Any = Annotated[self.takes | None, typer.Option(*names, hidden=True)]  # type: ignore[name-defined]
        return inspect.Parameter(self.attribute, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


FLAGS = (
    Flag("cuda"),
    Flag("gpu-rich"),
    Flag("random-seed", int),
    Flag("num-threads", int),
    Flag("out-shard-size", str),
    Flag("transformers-cache", str),
    Flag("unsafe-truncate-embeddings"),
    Flag("safe-serialization"),
    Flag("tensor-intersection", short="-i"),
    Flag("tensor-union", short="-u"),
    Flag("allow-crimes", needless="whether models can be merged is read from their tensors"),
    Flag("trust-remote-code", needless="no code of a model's folder is run"),
    Flag("lora-merge-cache", str, "adapters are applied tensor by tensor, and no merged copy is made"),
    Flag("lora-merge-dtype", str, "adapters are applied in float32, or in float64 if an input is"),
    Flag("lazy-unpickle", needless="weights are always read in slices"),
    Flag("low-cpu-memory", needless="memory does not grow with the model"),
    Flag("read-to-gpu", needless="chunks go to the device as they are read"),
    Flag("multi-gpu", needless="one device computes faster than disks deliver"),
    Flag("clone-tensors", needless="tensors may be used as often as a recipe likes"),
    Flag("copy-tokenizer", needless="the tokenizer always goes with the model"),
    Flag("write-model-card", needless="every model gets its card"),
    Flag("async-write", needless="writing and computing always overlap"),
    Flag("write-threads", int, "writing and computing always overlap"),
    Flag("intermediate-dir", str, "what is made on the way is kept beside the output, in OUT.steps", "-I"),
    Flag("lazy", needless="what is made on the way is made again where something changed, and only there"),
)


def with_mergekit_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Add the switches to a command that has `settings`; see `answered`."""
    own = inspect.signature(function, eval_str=True)

    @functools.wraps(function)
    def command(terminal: Terminal, *arguments: Any, settings: Settings, **given: Any) -> None:
        flags = {flag.name: given.pop(flag.attribute) for flag in FLAGS}
        function(terminal, *arguments, settings=answered(flags, settings, terminal.line), **given)

    shown = [p for name, p in own.parameters.items() if name != "settings"]
    parameters = [*shown, *(flag.parameter for flag in FLAGS), own.parameters["settings"]]
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def answered(given: dict[str, Any], settings: Settings, tell: Callable[[str], None]) -> Settings:
    """The settings that mergekit's switches ask for; `tell` gets a line for each that is needless.

    Args:
        given: by name, as in `FLAGS`; None for what was not given.

    Raises:
        UserError: RG309 for what regraft does not do, RG303 for a value that cannot be.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("unsafe-truncate-embeddings"):
        what = "--unsafe-truncate-embeddings would cut vocabularies without looking at their tokens"
        raise UserError("RG309", what, fix="choose a tokenizer in the recipe")
    if chosen.get("safe-serialization") is False:
        raise UserError("RG309", "--no-safe-serialization would write pickles", fix="leave it out")
    for flag in FLAGS:
        if flag.needless and flag.name in chosen:
            tell(f"--{flag.name} is needless here: {flag.needless}")
    if (chosen.get("cuda") or chosen.get("gpu-rich")) and settings.device == "cpu":
        settings = replace(settings, device="cuda")
    if "random-seed" in chosen and settings.seed is None:
        if chosen["random-seed"] < 0:
            raise UserError("RG303", f"--random-seed is {chosen['random-seed']}", fix="give a number from 0")
        settings = replace(settings, seed=chosen["random-seed"])
    if "num-threads" in chosen and settings.workers is None:
        if chosen["num-threads"] < 1:
            raise UserError("RG303", f"--num-threads is {chosen['num-threads']}", fix="give a number from 1")
        settings = replace(settings, workers=chosen["num-threads"])
    if "out-shard-size" in chosen:
        settings = replace(settings, shard_bytes=_shard_bytes(chosen["out-shard-size"]))
    ways = [way for name, way in _TENSORS.items() if chosen.get(name)]
    if len(ways) > 1:
        what = "--tensor-intersection and --tensor-union say two things of the same tensors"
        raise UserError("RG303", what, fix="give one of them")
    if ways and settings.tensors is None:
        settings = replace(settings, tensors=ways[0])
    if "transformers-cache" in chosen:
        os.environ["HF_HUB_CACHE"] = chosen["transformers-cache"]  # read when the Hub's library is imported
    return settings


def _shard_bytes(text: str) -> int:
    """mergekit's help speaks of parameters (5B), its code counts bytes: so many bytes."""
    match = _COUNT.fullmatch(text.strip())
    number = int(float(match[1]) * _FACTORS[match[2].lower()]) if match else 0
    if number < 1:
        raise UserError("RG303", f"--out-shard-size is {text!r}", fix="give a number such as 5B")
    return number
