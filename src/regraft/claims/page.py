"""The page of claims in the documentation: what was claimed, what was found, by which rule, with a plot each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.claims.find import Found
from regraft.claims.plot import draw
from regraft.claims.results import Results, results_of
from regraft.claims.verdict import Finding
from regraft.errors import UserError

_ASSETS = Path("assets", "claims")
_HEAD = """\
# Claims

Each paper that regraft implements claims something. Here is the smallest experiment that can refute it, made on a
laptop with models that are trained for it, and what came out. A claim that does not hold is listed as such.

```sh
regraft claims run 65 60   # from a clone of the repository; without numbers there is `regraft claims list`
regraft claims table       # writes this page from claims/results
```

**How a claim is judged.** The rule stands in the claim's file and is fixed before the claim is run on the seeds that
are shown. An experiment is run once per seed; seeds vary initialisation, order and split of the data. Each check has an
effect per seed, formed from models that share base and data. It is *held* if the 95 % bootstrap interval of the mean
effect lies above zero (or above the loss that is allowed) and the mean reaches the smallest effect that counts; *not
held* if the interval lies below that smallest effect; *inconclusive* otherwise. A claim is held if all checks are that
decide. With five seeds such an interval is narrower than its name: it covers about 85 %. What is chosen, is chosen on
validation data, with as many tries for each method; test data is looked at once.

**Run again,** the same code gives the same figures on the same machine. Other versions or another kind of processor
round differently, training amplifies that, and a verdict that is near its limit can change.

"""


def write_page(found: Sequence[Found], results: Path, docs: Path) -> Path:
    """Write `claims.md` and the plots into the folder of the documentation.

    Raises:
        UserError: RG405 if that cannot be done, RG904 for results that cannot be used.
    """
    every = [results_of(one, results, "laptop", any_code=True) for one in found]
    path = docs / "claims.md"
    try:
        (docs / _ASSETS).mkdir(parents=True, exist_ok=True)
        for one, kept in zip(found, every, strict=True):
            if kept.seeds:
                _replace(docs / _ASSETS / f"{one.name}.svg", draw(one.claim.plot, kept.figures) + "\n")
        _replace(path, page(found, every))
    except OSError as error:
        what = f"the page cannot be written: {error.strerror}"
        raise UserError("RG405", what, where=str(docs), fix="name a folder that can be written") from None
    return path


def page(found: Sequence[Found], results: Sequence[Results]) -> str:
    """The page as Markdown."""
    pairs = list(zip(found, results, strict=True))
    rows = ["| Paper | Claim | Verdict | Seeds |", "|---|---|---|---|"]
    rows += [
        f"| [{one.name}](#{_anchor(one)}) | {one.claim.sentence} | {_verdict(kept)} | {len(kept.seeds)} |"
        for one, kept in pairs
    ]
    return _HEAD + "\n".join(rows) + "\n\n" + "\n".join(_section(one, kept) for one, kept in pairs) + _models(results)


def _verdict(results: Results) -> str:
    return f"**{results.verdict}**" if results.seeds else "not run"


def _anchor(one: Found) -> str:
    words = "".join(c if c.isalnum() or c in " -" else "" for c in f"{one.name} {one.claim.title}".lower())
    return "-".join(words.split())


def _section(one: Found, results: Results) -> str:
    claim = one.claim
    cited = f"[{claim.paper.cite()}]({claim.paper.url})" if claim.paper.url else claim.paper.cite()
    parts = [f"## {one.name} {claim.title}", cited, f"**Claim.** {claim.sentence}", one.doc]
    parts.append(f"Compared with: {', '.join(claim.baselines)}.")
    if not results.seeds:
        return "\n\n".join([*parts, "Not run yet.", ""])
    parts.append(f"**Verdict: {results.verdict}** ({len(results.seeds)} seeds).")
    parts.append(_checks(results.findings))
    parts.append(f"![{claim.plot.title}]({_ASSETS.as_posix()}/{one.name}.svg)")
    parts.append(_made(results))
    return "\n\n".join([*parts, ""])


def _checks(findings: Sequence[Finding]) -> str:
    rows = ["| Check | Mean effect | 95 % interval | Smallest that counts | Found |", "|---|---|---|---|---|"]
    for one in findings:
        ends = " to ".join(_number(end, one.percent) for end in one.interval) if one.interval else "—"
        says = one.says if one.decides else f"{one.says} (does not decide)"
        mean, least = _number(one.mean, one.percent), _number(one.least, one.percent, signed=False)
        rows.append(f"| {says} | {mean} | {ends} | {least} | {one.verdict} |")
    return "\n".join(rows)


def _number(value: float, percent: bool, *, signed: bool = True) -> str:
    """A share in points of a hundred, anything else as it is."""
    text = f"{100 * value:{'+' if signed else ''}.1f} pt" if percent else f"{value:{'+' if signed else ''}.3g}"
    return text.replace("-", "−")


def _made(results: Results) -> str:
    records = list(results.seeds.values())
    seconds = [float(record.get("seconds", 0)) for record in records]
    commits = {str(record.get("commit") or "unknown")[:10] for record in records}
    versions = ", ".join(f"{name} {v}" for name, v in (records[-1].get("versions") or {}).items())
    seeds = ", ".join(results.seeds)
    each = f"{sum(seconds) / len(seconds):.0f} s of processor time per seed"
    parts = [f"Seeds {seeds}; {each}; commit {', '.join(sorted(commits))}"]
    if any(record.get("uncommitted_changes") for record in records):
        parts.append("with changes that were not committed")
    if results.earlier_code:
        parts.append("the experiment's code has changed since")
    return "; ".join([*parts, versions]) + "."


def _models(results: Sequence[Results]) -> str:
    """The models that the claims were made with, of the first seed of each claim."""
    found: dict[str, Mapping[str, Any]] = {}
    for kept in results:
        for record in list(kept.seeds.values())[:1]:
            for model in record.get("models", ()):
                found.setdefault(f"{model['name']} {_options(model)}", model)
    if not found:
        return ""
    head = [
        "## The models",
        "What the experiments start from: real architectures, trained from scratch on data that comes with Python or a "
        "package. Each must be better than a simple baseline, or its claim is not run. Sizes, times (of the processor) "
        "and qualities are those of one seed.",
        "| Model | Data | Parameters | Trained in | Quality |\n|---|---|---|---|---|",
    ]
    rows = []
    for name, model in sorted(found.items()):
        quality = model["quality"]
        chance = f", chance {quality['chance']:.3g}" if quality["chance"] is not None else ""
        says = f"{quality['metric']} {quality['value']:.3g} ({quality['against']} {quality['baseline']:.3g}{chance})"
        rows.append(
            f"| {name.strip()} | {model['data']} | {model['parameters']:,} | {model['seconds']:.0f} s | {says} |"
        )
    return "\n\n".join(head) + "\n" + "\n".join(rows) + "\n"


def _options(model: Mapping[str, Any]) -> str:
    return ", ".join(str(value) for key, value in model["options"].items() if key not in ("seed", "scale"))


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
