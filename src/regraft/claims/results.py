"""What a claim has found, as JSON: figures per seed, effects, intervals, verdict, environment and commit.

A file is written anew, by one rename, after each seed; a run that was killed goes on with the seeds that are missing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from regraft.checkpoint.json_file import read_json
from regraft.claims.claim import NOT_JUDGED, Check, Claim, Figures
from regraft.claims.find import Found
from regraft.claims.verdict import Finding, judge, overall
from regraft.errors import UserError
from regraft.version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")


@dataclass
class Results:
    """The seeds that a claim has been run with, at one scale and by one state of its code."""

    claim: Claim
    path: Path
    scale: str
    code: str
    seeds: dict[str, dict[str, Any]] = field(default_factory=dict)
    earlier_code: bool = False  # whether the file was of another state of the code, and its figures were left out

    @property
    def figures(self) -> dict[str, Figures]:
        return {seed: record["figures"] for seed, record in self.seeds.items()}

    @property
    def findings(self) -> list[Finding]:
        if not self.seeds or self.scale == "smoke":
            return []
        return [judge(check, list(self.figures.values())) for check in self.claim.checks if self._can_be_judged(check)]

    def _can_be_judged(self, check: Check) -> bool:
        """Whether all seeds have the figures that a check speaks of: at the scale of papers there may be fewer."""
        try:
            for figures in self.figures.values():
                check.effect(figures)
        except KeyError:
            if self.scale != "paper":
                raise
            return False
        return True

    @property
    def verdict(self) -> str:
        return overall(self.findings) if self.findings else NOT_JUDGED

    def add(self, seed: int, record: Mapping[str, Any]) -> None:
        """Take a seed in and write the file."""
        self.seeds = dict(sorted({**self.seeds, str(seed): dict(record)}.items(), key=lambda item: int(item[0])))
        self.write()

    def to_dict(self) -> dict[str, Any]:
        paper = self.claim.paper
        return {
            "claim": paper.number,
            "title": self.claim.title,
            "paper": paper.cite(),
            "sentence": self.claim.sentence,
            "scale": self.scale,
            "verdict": self.verdict,
            "checks": [finding.to_dict() for finding in self.findings],
            "seeds": self.seeds,
            "code": self.code,
        }

    def write(self) -> None:
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            what = f"the results cannot be written: {error.strerror}"
            raise UserError("RG405", what, where=str(self.path), fix="name a folder that can be written") from None


def results_of(found: Found, folder: Path, scale: str, *, any_code: bool = False) -> Results:
    """What is in the file of a claim: nothing if there is none, or if another state of the code wrote it.

    Args:
        any_code: take the figures of another state of the code as well, to show them.

    Raises:
        UserError: RG904 if the file is there and cannot be used.
    """
    suffix = "" if scale == "laptop" else f".{scale}"
    results = Results(found.claim, folder / f"{found.name}{suffix}.json", scale, found.code)
    if not results.path.exists():
        return results
    fix = "remove it; the claim is then run again"
    try:
        stored = read_json(results.path)
    except UserError as error:
        raise UserError("RG904", error.what, where=str(results.path), fix=fix) from None
    seeds = stored.get("seeds")
    sound = isinstance(seeds, dict) and all(
        seed.isdecimal() and isinstance(record, dict) and _are_figures(record.get("figures"))
        for seed, record in seeds.items()
    )
    if not sound:
        raise UserError("RG904", "the file has no figures per seed", where=str(results.path), fix=fix)
    results.earlier_code = stored.get("code") != found.code
    if any_code or not results.earlier_code:
        results.seeds = seeds
    return results


def _are_figures(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, (int, float)) for v in value.values())


def surroundings(folder: Path) -> dict[str, Any]:
    """What a run was made with: versions, the kind of machine, and the commit of the repository."""
    versions = {"regraft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "versions": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        **_commit(folder),
    }


def _commit(folder: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder), ":!*/results/*.json")
        return {"commit": git("rev-parse", "HEAD"), "uncommitted_changes": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None}
