"""All models of the zoo: where they are listed, how good each was, and the table that shows it.

A module of `claims/` lists its models as `ENTRIES`: name -> (the entry, the class of transformers that loads it, its
arguments beside seed and scale). What was measured when a model was made is kept in `claims/results/zoo.json`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from regraft.checkpoint.json_file import read_json
from regraft.claims.find import module_of
from regraft.claims.results import surroundings
from regraft.claims.zoo import RECORD, NotGoodEnoughError
from regraft.errors import UserError, nearest
from regraft.merge.torch_threads import one_thread_each

_LISTS = re.compile(r"^ENTRIES\b", re.MULTILINE)
FILE = "zoo.json"

Records: TypeAlias = "dict[str, dict[str, dict[str, Any]]]"  # model -> seed -> what its record says


@dataclass(frozen=True)
class Listed:
    """A model of the zoo: the module that lists it, its name, what makes it, the class that loads it, its arguments."""

    path: Path
    name: str
    entry: Callable[..., Path]
    kind: str
    arguments: Mapping[str, Any]

    def make(self, seed: int, scale: str) -> dict[str, Any]:
        """The record of the model, which is trained if the cache does not have it.

        Raises:
            NotGoodEnoughError: if it is no better than its baseline.
        """
        with one_thread_each():
            folder = self.entry(seed=seed, scale=scale, **self.arguments)
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record


def catalogue(folder: Path, names: Sequence[str] | None = None) -> list[Listed]:
    """The models that the modules of a folder list, by name: those asked for, or all.

    Raises:
        UserError: RG905 for a name that no module lists, or that two do, RG602 if a package is missing.
    """
    found: dict[str, Listed] = {}
    for path in sorted(folder.glob("*.py")):
        if _LISTS.search(path.read_text(encoding="utf-8")):
            for name, (entry, kind, arguments) in _entries(path).items():
                if name in found:
                    what = f"{name!r} is listed twice, by {found[name].path.name} as well"
                    raise UserError("RG905", what, where=str(path), fix="rename one of them")
                found[name] = Listed(path, name, entry, kind, arguments)
    for name in names or ():
        if name not in found:
            what = f"the zoo has no model {name!r}"
            raise UserError("RG905", what, where=str(folder), fix=nearest(name, found))
    return [found[name] for name in (dict.fromkeys(names) if names else sorted(found))]


def _entries(path: Path) -> dict[str, tuple[Callable[..., Path], str, Mapping[str, Any]]]:
    try:
        return dict(module_of(path).ENTRIES)
    except ModuleNotFoundError as error:
        what = f"the zoo needs the package {error.name}, which is not installed"
        raise UserError("RG602", what, where=path.name, fix="pip install 'regraft[dev]'") from None


def read_records(results: Path) -> Records:
    """What is kept in a folder of results; nothing if there is no file.

    Raises:
        UserError: RG904 if the file is there and cannot be used.
    """
    path = results / FILE
    if not path.exists():
        return {}
    fix = "remove it; the models are then asked again"
    try:
        stored = read_json(path)
    except UserError as error:
        raise UserError("RG904", error.what, where=str(path), fix=fix) from None
    models = stored.get("models")
    sound = isinstance(models, dict) and all(
        isinstance(record, dict) and isinstance(record.get("quality"), dict)
        for seeds in models.values()
        for record in (seeds.values() if isinstance(seeds, dict) else [None])
    )
    if not sound:
        raise UserError("RG904", "the file has no records of models", where=str(path), fix=fix)
    return dict(models)


def make_models(
    listed: Sequence[Listed],
    seeds: Sequence[int],
    results: Path,
    *,
    scale: str = "laptop",
    say: Callable[[str], None] = lambda _: None,
) -> Records:
    """Make what the cache lacks of some models, and keep what was measured; at scale "smoke" nothing is kept.

    Raises:
        UserError: RG904, RG405 for results that cannot be read or written.
        NotGoodEnoughError: after all others, if a model was no better than its baseline.
    """
    records = read_records(results) if scale == "laptop" else {}
    refused: list[NotGoodEnoughError] = []
    for one in listed:
        around = surroundings(one.path.parent)
        for seed in seeds:
            try:
                record = one.make(seed, scale)
            except NotGoodEnoughError as error:
                refused.append(error)
                say(f"{one.name}, seed {seed}: refused: {error}")
                continue
            say(f"{one.name}, seed {seed}: {described(record)}")
            if scale == "laptop":  # anew, as another process may have added to them while this model was trained
                records = read_records(results)
            of_model = {**records.get(one.name, {}), str(seed): {**record, **around}}
            records[one.name] = dict(sorted(of_model.items(), key=lambda item: int(item[0])))
            if scale == "laptop":
                _write(results / FILE, records)
    if refused:
        raise refused[0]
    return records


def _write(path: Path, records: Records) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    content = {"models": dict(sorted(records.items()))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        what = f"the records cannot be written: {error.strerror}"
        raise UserError("RG405", what, where=str(path), fix="name a folder that can be written") from None


def described(record: Mapping[str, Any]) -> str:
    """How good a model is, in words."""
    quality = record["quality"]
    chance = f", chance {quality['chance']:.3g}" if quality["chance"] is not None else ""
    return (
        f"{quality['metric']} {quality['value']:.3g} ({quality['against']} {quality['baseline']:.3g}{chance}); "
        f"{record['seconds']:.0f} s"
    )


HEAD = ("Model", "Data", "Parameters", "Seeds", "Trained in", "Measured", "Model", "Baseline", "Chance")


def rows(records: Records) -> list[tuple[str, ...]]:
    """The table of the zoo, one model a row; with several seeds means, and the range of the model's own figure."""
    found: list[tuple[str, ...]] = []
    for name, seeds in sorted(records.items()):
        several = list(seeds.values())
        first, quality = several[0], [record["quality"] for record in several]
        values, chances = [one["value"] for one in quality], [one["chance"] for one in quality]
        spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
        found.append(
            (
                name,
                first["data"],
                f"{first['parameters']:,}",
                ", ".join(seeds),
                f"{_mean([record['seconds'] for record in several]):.0f} s",
                quality[0]["metric"],
                f"{_mean(values):.3g}{spread}",
                f"{quality[0]['against']} {_mean([one['baseline'] for one in quality]):.3g}",
                f"{_mean(chances):.3g}" if None not in chances else "—",
            )
        )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def markdown(records: Records) -> str:
    """The table for the documentation: as wide as a page, so what was measured is one column."""
    lines: list[tuple[str, ...]] = [("Model", "Data", "Parameters", "Trained in", "Quality")]
    lines.append(("---",) * len(lines[0]))
    for name, data, parameters, seeds, seconds, metric, value, baseline, chance in rows(records):
        trained = f"{seconds}, seed{'s' if ',' in seeds else ''} {seeds}"
        guessed = f"; chance {chance}" if chance != "—" else ""
        lines.append((name, data, parameters, trained, f"{metric} **{value}**; {baseline}{guessed}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
