"""Options that several commands have, each written once."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.cli.lean import without_blas
from regraft.recipe.document import TENSORS
from regraft.recipe.settings import Settings

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes of a text such as `4GB`, `512MiB` or `1.5g`; decimal units unless there is an i."""
    match = _SIZE.fullmatch(text.strip())
    number = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if number < 1:
        raise typer.BadParameter(f"{text!r} is no size; write 4GB, 512MB or 1.5GiB")
    return number


def device(text: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N`; whether it is there is not asked here."""
    if not _DEVICE.fullmatch(text):
        raise typer.BadParameter(f"{text!r} is no device; write auto, cpu, cuda or cuda:1")
    return text


def tensors(text: str) -> str:
    """One of `TENSORS`."""
    if text not in TENSORS:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(TENSORS)}")
    return text


_RUN = "How to run"
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe of regraft's own, or a mergekit file.")]
Assignments = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe: --set steps.merged.density=0.1 (the value is YAML; may be repeated).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; write nothing.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an output that exists, and merge models that do not look like fine-tunes of the base.",
        rich_help_panel=_RUN,
    ),
]
AllowNan = Annotated[
    bool, typer.Option("--allow-nan", help="Merge NaN and infinity as they are.", rich_help_panel=_RUN)
]
AcceptLicenses = Annotated[
    bool,
    typer.Option(
        "--accept-licenses", help="Go on although the licences of the inputs do not agree.", rich_help_panel=_RUN
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Do not use the network, only the Hub's local cache.", rich_help_panel=_RUN)
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", "-j", min=1, help="Threads; one more than there are cores if not given.", rich_help_panel=_RUN
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--chunk", metavar="ELEMENTS", min=1, help="Elements per piece of work; no result depends on it.",
        rich_help_panel=_RUN,
    ),
]  # fmt: skip
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", parser=device, rich_help_panel=_RUN,
        help="Where to compute: cpu, cuda, cuda:1, or auto (the GPU if there is one). The last bit of a result may "
        "depend on it.",
    ),
]  # fmt: skip
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory", metavar="SIZE", parser=size, help="Stay below this much memory, such as 4GB.",
        rich_help_panel=_RUN,
    ),
]  # fmt: skip
Sync = Annotated[
    bool,
    typer.Option(
        "--sync/--no-sync", rich_help_panel=_RUN,
        help="Wait until the output is on the disk. Without, the system writes it when it likes, and a power failure "
        "within the next minute can damage it.",
    ),
]  # fmt: skip
ShardSize = Annotated[
    int,
    typer.Option(
        "--shard-size", metavar="SIZE", parser=size, help="Size of a file of the output.", rich_help_panel=_RUN
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=2**63 - 1, help="For rules that draw; replaces the recipe's.", rich_help_panel=_RUN
    ),
]
Tensors = Annotated[
    str | None,
    typer.Option(
        "--tensors", metavar="WHICH", parser=tensors, rich_help_panel=_RUN,
        help="Of state dicts that differ: same (an error), common (those that all have), any; replaces the recipe's.",
    ),
]  # fmt: skip
Rank = Annotated[
    int | None, typer.Option("--rank", metavar="N", help="Rank of the factors; 32 if --energy is not given either.")
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy", metavar="SHARE",
        help="The smallest rank that keeps this share of each tensor's squared change, such as 0.95.",
    ),
]  # fmt: skip
MaxRank = Annotated[
    int | None, typer.Option("--max-rank", metavar="N", help="No larger rank than this with --energy; 256.")
]
DEFAULT_SHARD: Any = "5GB"


def settings(
    force: Force = False,
    allow_nan: AllowNan = False,
    accept_licenses: AcceptLicenses = False,
    offline: Offline = False,
    workers: Workers = None,
    chunk: Chunk = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    sync: Sync = True,
    shard_size: ShardSize = DEFAULT_SHARD,
    seed: Seed = None,
    tensors: Tensors = None,
) -> Settings:
    """The switches of a run. This signature is the one list of them; see `with_settings`."""
    return Settings(
        force=force,
        allow_nan=allow_nan,
        accept_licenses=accept_licenses,
        offline=offline,
        workers=workers,
        chunk=chunk,
        device=device,
        max_memory=max_memory,
        sync=sync,
        shard_bytes=shard_size,
        seed=seed,
        tensors=tensors,
    )


def on_this_machine(settings: Settings) -> Settings:
    """The same with the device that `auto` means here, which imports torch; a device by name is left to the plan."""
    without_blas()
    if settings.device != "auto":
        return settings
    import torch

    return replace(settings, device="cuda" if torch.cuda.is_available() else "cpu")


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command's keyword parameter `settings` out of options: those of the function `settings`, in its order."""
    own = inspect.signature(function, eval_str=True)
    shared = inspect.signature(settings, eval_str=True).parameters

    @functools.wraps(function)
    def command(*arguments: Any, **given: Any) -> None:
        switches = {name: given.pop(name) for name in shared}
        function(*arguments, settings=settings(**switches), **given)

    parameters = [p for name, p in own.parameters.items() if name != "settings"]
    parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shared.values()]
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command
