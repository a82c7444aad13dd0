"""regraft.json: where a model came from, complete enough to make it again and to check that it is the same.

Facts only, each measured or taken from the run: nothing is guessed and nothing identifies the machine's owner. Inputs
are named as the user wrote them; no host name, user name or resolved path is stored. Options that hold for many tensors
are written once, with the layers folded into ranges, so that the file stays readable for models with many tensors.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from regraft.checkpoint.json_file import malformed_field, read_json
from regraft.errors import UserError
from regraft.version import __version__

if TYPE_CHECKING:
    from regraft.checkpoint.model import Checkpoint

FILE_NAME = "regraft.json"
SCHEMA = 1


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Record(BaseModel):
    # Unknown keys are dropped on reading: a later version may add facts without a new schema number.
    model_config = ConfigDict(populate_by_name=True, extra="ignore", ser_json_inf_nan="strings")


class Software(_Record):
    """Versions of what computed the model."""

    regraft: str = __version__
    python: str = Field(default_factory=platform.python_version)
    torch: str = Field(default_factory=lambda: _version("torch"))
    transformers: str = Field(default_factory=lambda: _version("transformers"))
    safetensors: str = Field(default_factory=lambda: _version("safetensors"))
    system: str = Field(default_factory=lambda: f"{platform.system()} {platform.machine()}")


class Hardware(_Record):
    """The kind of machine, by what may matter to the numbers: never its name."""

    cpu: str = Field(default_factory=lambda: _cpu())
    cores: int = Field(default_factory=lambda: os.cpu_count() or 0)
    memory_bytes: int = Field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


class InputRecord(_Record):
    """One input: `name` in the recipe, `ref` as the user wrote it, `role` "base" or "model".

    `digest` tells whether the same bytes are there today; `digest_kind` is "content" (every byte) or "sampled".
    `deltas` are the digests of the records of deltas that it includes, which tell base and fine-tune.
    """

    name: str
    ref: str
    role: str = "model"
    repo_id: str = ""
    revision: str = ""
    adapters: list[str] = []
    deltas: list[str] = []
    digest: str = ""
    digest_kind: str = ""
    licence: str | None = None
    model_type: str = ""
    parameters: int | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str, **facts: Any) -> InputRecord:
        """The record of an opened checkpoint; `facts` are further fields."""
        return cls(
            name=name,
            ref=checkpoint.ref,
            repo_id=checkpoint.repo_id,
            revision=checkpoint.revision,
            adapters=list(checkpoint.adapters),
            deltas=[delta.digest for delta in checkpoint.deltas],
            model_type=checkpoint.model_type,
            parameters=checkpoint.parameters,
            **facts,
        )

    @classmethod
    def sampled(cls, checkpoint: Checkpoint, name: str, role: str) -> InputRecord:
        """The record with the digest of a sample of the content, and the licence that the card states."""
        from regraft.checkpoint.licences import read_licence

        licence = ", ".join(read_licence(checkpoint).ids) or None
        return cls.of(checkpoint, name, role=role, digest=checkpoint.digest(), digest_kind="sampled", licence=licence)


class OptionGroup(_Record):
    """Options shared by `count` tensors, whose names are `tensors` (see `fold_names`)."""

    options: dict[str, Any]
    tensors: list[str]
    count: int


class Score(_Record):
    """A measured value before and after: `before` by input name, `after` for the result."""

    metric: str
    data: str
    before: dict[str, float] = {}
    after: float
    higher_is_better: bool = True
    task: str = ""


class Output(_Record):
    """Size of the result."""

    tensors: int
    parameters: int
    bytes: int
    dtype: str


class Lineage(_Record):
    """Everything that regraft.json holds. `started` is set on construction, `finish` sets the rest of the times."""

    schema_: Literal[1] = Field(1, alias="schema")
    kind: str = "merge"
    step: str = ""
    method: str = ""
    recipe: str = Field("", description="text of the recipe as the user wrote it")
    recipe_language: str = "regraft"
    key: str = Field("", description="content key: equal keys mean equal results")
    inputs: list[InputRecord] = []
    settings: dict[str, Any] = Field({}, description="the step's settings after defaults")
    options: list[OptionGroup] = Field([], description="the method's options per tensor, largest group first")
    copied: list[str] = Field([], description="tensors taken bit for bit, folded")
    seeds: dict[str, int] = {}
    sources: dict[str, str] = Field({}, description="which input gave config, tokenizer, generation config")
    vocabulary: dict[str, Any] = Field({}, description="what became of each model's tokens, where vocabularies differ")
    output: Output | None = None
    licence: str | None = None
    software: Software = Field(default_factory=Software)
    hardware: Hardware = Field(default_factory=Hardware)
    started: str = Field(default_factory=_now)
    finished: str = ""
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = Field(None, description="most memory the process has had since it began")
    notes: dict[str, Any] = {}
    warnings: list[str] = []
    diagnostics: dict[str, Any] = {}
    scores: list[Score] = []
    surgeries: list[dict[str, Any]] = Field([], description="modules that stock architectures do not have")

    _begun: float = PrivateAttr(default_factory=time.monotonic)

    def finish(self) -> None:
        """Set `finished`, `wall_seconds` and `peak_memory_bytes` to now."""
        self.finished = _now()
        self.wall_seconds = round(time.monotonic() - self._begun, 3)
        self.peak_memory_bytes = peak_memory()

    def write(self, staging: Path) -> Path:
        """Write regraft.json into a folder."""
        path = staging / FILE_NAME
        text = json.dumps(json.loads(self.model_dump_json(by_alias=True)), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: Path) -> Lineage:
        """The lineage of a model that regraft made.

        Raises:
            UserError: RG105 if there is none, it is malformed, or of a later version of the file.
        """
        path = folder / FILE_NAME
        data = read_json(path)
        schema = data.get("schema")
        if schema != SCHEMA:
            what = f"the lineage has schema {schema!r}, and this version of regraft reads {SCHEMA}"
            raise UserError("RG105", what, where=FILE_NAME, fix="read it with the version that software.regraft names")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            fix = "the file was edited; make the model again"
            raise UserError("RG105", malformed_field(error), where=str(path), fix=fix) from None


def peak_memory() -> int:
    """Most resident memory that this process has had since it began, in bytes.

    Linux counts what a process had before it became this program into its resource usage, but not into VmHWM.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(errors="replace"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def group_options(per_tensor: Mapping[str, Mapping[str, Any]]) -> list[OptionGroup]:
    """Tensors with equal options together, largest group first, in the order given otherwise."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, options in per_tensor.items():
        key = json.dumps(options, sort_keys=True, default=str)
        groups.setdefault(key, (dict(options), []))[1].append(name)
    records = [OptionGroup(options=o, tensors=fold_names(names), count=len(names)) for o, names in groups.values()]
    return sorted(records, key=lambda group: -group.count)


_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d*)(?=\.)")
_FOLDED = re.compile(r"\{([\d,-]+)\}")


def fold_names(names: Iterable[str]) -> list[str]:
    """Names with their first number folded: `h.0.w, h.1.w, h.2.w, h.5.w` is `h.{0-2,5}.w`. `unfold_names` undoes it."""
    folded: dict[tuple[str, str], list[int]] = {}
    plain: dict[tuple[str, str], str] = {}
    for name in names:
        found = None if "{" in name else _NUMBER.search(name)
        if found:
            folded.setdefault((name[: found.start()], name[found.end() :]), []).append(int(found[0]))
        else:
            folded.setdefault((name, ""), [])
            plain[name, ""] = name
    return [plain.get(key) or key[0] + _ranges(numbers) + key[1] for key, numbers in folded.items()]


def unfold_names(folded: Iterable[str]) -> list[str]:
    """The names that `fold_names` was given; those of one pattern stand together, by number."""
    names: list[str] = []
    for text in folded:
        found = _FOLDED.search(text)
        if not found:
            names.append(text)
            continue
        for part in found[1].split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            names += [f"{text[: found.start()]}{number}{text[found.end() :]}" for number in span]
    return names


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return str(runs[0][0])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The processor's name as the system tells it; "" where it does not."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor()
