"""The bundle of a run: what somebody else needs to understand it and to make it again, and nothing private.

No weights and no data go in. Every text is freed of paths of this machine (a local model appears by the name of its
folder) and of what looks like an access token; nothing else is changed. The files are in a fixed order with a fixed
date, so that the same run gives the same bytes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from regraft.checkpoint.lineage import Lineage
from regraft.checkpoint.private_paths import PrivatePaths
from regraft.errors import UserError
from regraft.report.folder import Measured, RunFolder
from regraft.report.lineage import read_lineages
from regraft.report.run import write_report

REMOVED = "[removed]"
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that the format knows
# Access tokens of the Hub, of code hosts and clouds, user and password in addresses, and values called so.
_SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}\b|\bgh[pousr]_[A-Za-z0-9]{20,}\b|\bgithub_pat_\w{20,}\b|\bsk-[A-Za-z0-9_-]{20,}\b"
    r"|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?<=token=)[^\s&\"']{8,}|(?<=api_key=)[^\s&\"']{8,}|(?<=password=)[^\s&\"']+",
)


def write_bundle(run: RunFolder, path: Path) -> list[str]:
    """Pack a run into a zip file.

    Returns:
        The names of the files in it.

    Raises:
        UserError: RG105 if a record cannot be read, RG405 if the file cannot be written.
    """
    lineages = read_lineages(run.artefacts)
    known = {str(p) for folder in (run.path, *run.artefacts.values()) for p in (folder, folder.resolve())}
    known |= {record.ref for one in lineages.values() for record in one.inputs}
    known |= {one.data for one in run.evaluations}
    hide = PrivatePaths(known | {str(Path.home())})
    # Cards were freed of paths when they were written, which then knew only those of the model's own parents: of
    # another path with spaces, its part behind the first space is still there.
    loose = PrivatePaths()
    rests = {loose(path): Path(path).name for path in known if " " in path and path.startswith(("/", "~/"))}

    def clean(text: str) -> str:
        text = hide(text)
        for rest in sorted(rests, key=len, reverse=True):
            text = text.replace(rest, rests[rest])
        return _SECRETS.sub(REMOVED, text)

    part = path.with_name(f".{path.name}.part")
    try:
        with TemporaryDirectory() as folder:
            files = _files(run, lineages, clean, Path(folder))
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}", _DATE), text, zipfile.ZIP_DEFLATED)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        what = f"the bundle cannot be written: {error.strerror}"
        raise UserError("RG405", what, where=str(path), fix="name a folder that exists and can be written") from None
    return list(files)


def lock(lineages: Mapping[str, Lineage]) -> dict[str, Any]:
    """What the run read and what computed it: inputs by digest, content keys, versions. JSON-able."""
    inputs: dict[str, dict[str, Any]] = {}
    for one in lineages.values():
        for record in one.inputs:
            if record.name not in lineages:
                inputs[record.name] = record.model_dump(mode="json", exclude={"name"})
    return {
        "inputs": inputs,
        "steps": {
            name: {"method": one.method, "key": one.key, "seeds": one.seeds, "inputs": [r.name for r in one.inputs]}
            for name, one in lineages.items()
        },
        "software": _distinct([one.software.model_dump(mode="json") for one in lineages.values()]),
        "hardware": _distinct([one.hardware.model_dump(mode="json") for one in lineages.values()]),
    }


def _files(
    run: RunFolder, lineages: Mapping[str, Lineage], clean: Callable[[str], str], folder: Path
) -> dict[str, str]:
    """Name -> text of everything that goes in."""
    tidy = {name: Lineage.model_validate(_walk(_plain(one), clean)) for name, one in lineages.items()}
    evaluations = [Measured(**_walk(asdict(one), clean)) for one in run.evaluations]
    cleaned = replace(run, artefacts=_written(tidy, run.artefacts, folder), evaluations=evaluations)
    page = write_report(
        replace(cleaned, remarks=[clean(r) for r in run.remarks]),
        folder / "report.html",
        title=clean(run.path.resolve().name),
    )
    files = {"README.md": _read_me(tidy, run), "report.html": page.read_text(encoding="utf-8")}
    recipes = list(dict.fromkeys(one.recipe for one in tidy.values() if one.recipe))
    for i, text in enumerate(recipes):
        files["recipe.yaml" if len(recipes) == 1 else f"recipe-{i + 1}.yaml"] = text
    if tidy:
        files["lock.json"] = _json(lock(tidy))
    if evaluations:
        files["scores.json"] = _json([asdict(one) for one in evaluations])
    for name, one in tidy.items():
        files[f"models/{_safe(name)}/regraft.json"] = _json(_plain(one))
        card = run.artefacts[name] / "README.md"
        if card.is_file():
            files[f"models/{_safe(name)}/README.md"] = clean(card.read_text(encoding="utf-8", errors="replace"))
    for log in run.logs:
        points = {key: [[p.x, p.y] for p in points] for key, points in log.metrics.items()}
        files[f"logs/{_safe(log.name)}.json"] = _json(_walk(points, clean))
    return files


def _written(lineages: Mapping[str, Lineage], artefacts: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Folders with the cleaned records; files as large as the originals stand for the weights, and hold nothing."""
    made: dict[str, Path] = {}
    for name, lineage in lineages.items():
        place = folder / f"model-{len(made)}"
        place.mkdir()
        lineage.write(place)
        size = sum(f.stat().st_size for f in artefacts[name].rglob("*") if f.is_file())
        with (place / "weights").open("wb") as file:
            file.truncate(max(0, size - (place / "regraft.json").stat().st_size))
        made[name] = place
    return made


def _read_me(lineages: Mapping[str, Lineage], run: RunFolder) -> str:
    refs = sorted({r.ref for one in lineages.values() for r in one.inputs if r.name not in lineages})
    recipe = any(one.recipe for one in lineages.values())
    steps = "Put the models and data that the recipe names in place, then: `regraft run recipe.yaml`." if recipe else ""
    digests = "`lock.json` has the digest of every input and the versions of what computed the results." if refs else ""
    models = "".join(f"- `{ref}`\n" for ref in refs)
    lines = [
        "# A run of regraft",
        "`report.html` shows what was done and found. No weights, no data and no paths of the machine are in here.",
        steps,
        digests,
        f"Models that it read:\n\n{models}" if models else "",
        f"Left out of the report: {'; '.join(run.remarks)}" if run.remarks else "",
    ]
    return "\n\n".join(line.strip() for line in lines if line) + "\n"


def _walk(value: Any, clean: Callable[[str], str]) -> Any:
    """Plain data with every text in it cleaned, keys too."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {_walk(k, clean): _walk(v, clean) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(v, clean) for v in value]
    return value


def _plain(lineage: Lineage) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lineage.model_dump_json(by_alias=True))
    return found


def _distinct(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for i, one in enumerate(records) if one not in records[:i]]


def _safe(name: str) -> str:
    """A name as part of a path within the archive."""
    return re.sub(r"[^A-Za-z0-9._=,@-]+", "_", name).lstrip(".") or "model"


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
