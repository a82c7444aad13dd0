"""A second run of a finished recipe ends at once: what the first one saw and left is noted in the user's cache.

A run that has checked everything leaves a stamp in `~/.cache/regraft/finished` (XDG_CACHE_HOME or REGRAFT_CACHE, if
set): what was asked for, the state of every file that it may have read, the state of every file of its output, and what
it told. If all of that is as it was, the same command has nothing to do and says the same again, without importing
torch or opening a model. In every other case, also if the stamp is gone or damaged, the whole check is made, which
remains the authority: a stamp can only say "nothing has changed".

Decided: a model of the Hub by branch or tag has no stamp, because only the Hub knows whether it has moved; one by
commit has. The sources are looked at before they are opened, so that a change during the run is seen. A run with
--force neither leaves nor takes a stamp: it was allowed more than a run without, and is asked for by those who do not
trust what is there. Options that only change how fast a run is are not part of what was asked for.

Nothing here imports torch, transformers or pydantic.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.paths import cache_folder, exists, located, parse_ref
from regraft.errors import UserError
from regraft.recipe.file_states import (
    UnknownState,
    data_files,
    files_below,
    observe,
    pictures_beside,
    unchanged,
)
from regraft.recipe.settings import Settings
from regraft.version import __version__

if TYPE_CHECKING:
    from regraft.recipe.document import Recipe

FORMAT = 1
MOST_STAMPS = 1000
_SPEED_ONLY = ("workers", "chunk", "max_memory")
_PACKAGES = ("torch", "transformers", "safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Stamp:
    """The stamp of one command into one output.

    Args:
        command: "merge" or "run".
        recipe: path of the recipe file, as the user wrote it.
        text: what is in that file.
        changes: the texts given by `--set`.
        out: the output folder, as the user wrote it.
        settings: switches of the run.
    """

    def __init__(
        self, command: str, recipe: Path, text: str, changes: Sequence[str], out: Path, settings: Settings
    ) -> None:
        self._folder = recipe.parent
        self._asked = {
            "format": FORMAT,
            "command": command,
            "recipe": [str(recipe), str(recipe.absolute()), _hash(text)],
            "changes": list(changes),
            "out": [str(out), str(out.absolute())],
            "settings": {name: value for name, value in asdict(settings).items() if name not in _SPEED_ONLY},
        }
        self._path = cache_folder("finished") / f"{_hash(f'{command} {out.absolute()}')}.json"
        whole = out.absolute()
        self._outputs = [str(whole), str(whole.with_name(f"{whole.name}.steps"))] if whole.name else [str(whole)]
        self._without = [os.path.realpath(path) for path in self._outputs]
        self._sources: dict[str, Any] | None = None
        self._obstacle = "the run was forced" if settings.force else ""
        if not self._path.is_absolute():
            self._obstacle = "there is no home folder to keep it in"

    def result(self) -> dict[str, Any] | None:
        """What the finished run told, if doing it again would do nothing; None if that is not certain."""
        if self._obstacle:
            return None
        try:
            noted = _unsealed(self._path.read_bytes())
            if noted is None or noted.get("asked") != {**self._asked, "software": _software()}:
                return None
            if not (self._still(noted["sources"]) and unchanged(noted["outputs"], self._output_files())):
                return None
        except (OSError, UserError, UnknownState):
            return None
        result: dict[str, Any] = noted["result"]
        return result

    def watch(self, recipe: Recipe) -> None:
        """Note the state of everything that the run may read; to be called before the run opens anything."""
        if self._obstacle:
            return
        try:
            named = _named(recipe)
            places = self._places(named)
            snapshots = {text: _snapshot(*place[1:]) for text, place in _all(places) if place[0] == "hub"}
            states = observe(self._source_files(places, snapshots))
        except (OSError, UserError, UnknownState) as error:
            self._obstacle = str(error)
            return
        self._sources = {"named": named, "places": places, "snapshots": snapshots, "states": states}

    def keep(self, result: Mapping[str, Any]) -> str:
        """Leave the stamp of a run that is done; `result` is JSON-able. Returns why there is none, "" if there is."""
        if self._obstacle or self._sources is None:
            return self._obstacle or "the sources were not watched"
        try:
            if not self._still(self._sources):
                return "a source changed during the run"
            outputs = observe(self._output_files())
            if not outputs:
                return "the output is gone"
            asked = {**self._asked, "software": _software()}
            facts = {"asked": asked, "sources": self._sources, "outputs": outputs, "result": result}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(f".{os.getpid()}.part")
            try:
                part.write_bytes(_sealed(facts))
                part.replace(self._path)
            except OSError:
                with suppress(OSError):
                    part.unlink()
                raise
        except (OSError, UserError, UnknownState) as error:
            return str(error)
        _drop_oldest(self._path.parent)
        return ""

    def _still(self, sources: Mapping[str, Any]) -> bool:
        """Whether every reference leads where it led, and to files that are as they were."""
        places, snapshots = sources["places"], sources["snapshots"]
        if self._places(sources["named"]) != places:
            return False
        return unchanged(sources["states"], self._source_files(places, snapshots))

    def _places(self, named: Sequence[Sequence[str]]) -> dict[str, list[list[str]]]:
        """Where the texts of a recipe lead: text -> ["path", path], ["hub", id, commit] or ["data", path], per part.

        Raises:
            UnknownState: a text names a branch or tag of a model on the Hub.
        """
        places: dict[str, list[list[str]]] = {}
        for kind, text in named:
            if kind == "data":
                path = (self._folder / Path(text).expanduser()).absolute()
                places[f"data {text}"] = [["data", str(path)]]
                continue
            whole = parse_ref(text, relative_to=self._folder)
            for part in (whole, *whole.adapters):
                if exists(part.model, self._folder):
                    place = ["path", str(located(part.model, self._folder).absolute())]
                elif _COMMIT.fullmatch(part.revision):
                    place = ["hub", part.model, part.revision]
                else:
                    raise UnknownState(f"{part.model} is on the Hub, and without a commit it may change there")
                places.setdefault(text, []).append(place)
        return places

    def _source_files(self, places: Mapping[str, list[list[str]]], snapshots: Mapping[str, str]) -> list[str]:
        found: set[str] = set()
        for text, (kind, *rest) in _all(places):
            if kind == "data":
                path = Path(rest[0])
                found.update(map(str, data_files(path) + (pictures_beside(path) if path.is_file() else [])))
                continue
            root = snapshots[text] if kind == "hub" else rest[0]
            # A single file of weights is read with the files beside it.
            found.update(files_below(root if Path(root).is_dir() else str(Path(root).parent), self._without))
        return sorted(found)

    def _output_files(self) -> list[str]:
        return sorted(path for root in self._outputs for path in files_below(root))


def _named(recipe: Recipe) -> list[list[str]]:
    """[kind, text] for each model and each data file that a recipe names, wherever in it."""
    from regraft.methods import method
    from regraft.recipe.document import EvaluateStep, MakeStep

    models: list[str] = []
    data: list[str] = []
    for step in recipe.steps:
        if isinstance(step, EvaluateStep):
            models += step.models
            further = (step.options.get(name) for name in method("evaluate", step.metric).files)
            data += [*([step.data] if step.data else []), *(str(text) for text in further if text is not None)]
            continue
        if isinstance(step, MakeStep):
            models += step.models.values()
            data += [text for text in (step.data, *step.sources.values()) if text]
            continue
        models += step.references
    made = {step.name for step in recipe.steps}
    references = (recipe.models.get(name, name) for name in models if name not in made)
    return [*(["model", text] for text in dict.fromkeys(references)), *(["data", text] for text in dict.fromkeys(data))]


def _all(places: Mapping[str, list[list[str]]]) -> list[tuple[str, list[str]]]:
    """(a name for the place, the place) for every part of every text."""
    return [(" ".join(place[1:]), place) for parts in places.values() for place in parts]


def _snapshot(repo_id: str, commit: str) -> str:
    """The folder of a commit in the Hub's cache; UserError if it is not there."""
    from regraft.checkpoint.hub import fetch

    return str(fetch(repo_id, commit, offline=True)[0])


def _software() -> dict[str, str]:
    """What computes: versions, and the state of this package's files, which in a checkout change without a version."""
    versions = {"regraft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    # Not what Python and numba compile and leave beside the sources, at a first run and at any later one.
    files = sorted(path for path in files_below(str(Path(__file__).parents[1])) if "__pycache__" not in path)
    states = [(path, status.st_size, status.st_mtime_ns) for path in files for status in [Path(path).stat()]]
    return versions | {"files": _hash(str(states))}


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _sealed(facts: Mapping[str, Any]) -> bytes:
    """JSON behind its own hash, so that a damaged stamp is never believed."""
    text = json.dumps(facts)
    return f"{_hash(text)}\n{text}\n".encode()


def _unsealed(content: bytes) -> dict[str, Any] | None:
    seal, _, text = content.decode("utf-8", "replace").removesuffix("\n").partition("\n")
    if seal != _hash(text):
        return None
    facts: dict[str, Any] = json.loads(text)
    return facts


def _drop_oldest(folder: Path) -> None:
    """Keep the newest stamps only. Others may do the same at this moment."""
    with suppress(OSError):
        stamps = [(path.stat().st_mtime_ns, path) for path in folder.iterdir()]
        for _, path in sorted(stamps)[:-MOST_STAMPS]:
            path.unlink(missing_ok=True)
