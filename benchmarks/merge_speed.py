"""How fast regraft merges, and in how much memory: against mergekit, by size of the model, or under a limit.

    python benchmarks/merge_speed.py --params 1.1b --models 3 --mergekit VENV/bin/mergekit-yaml --out results.json

makes a synthetic base and fine-tunes of it, runs both tools alternately on the same recipes, as whole processes, and
prints a table. `--scaling 0.1b,0.5b,1.1b` measures regraft alone at several sizes, `--limit-memory 1GB` under a limit
on its private memory; `--predict` sets what `regraft plan` says beside what is measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tables
import typer
from machine import describe
from recipes import CASES, RULES, recipe_for
from rich.console import Console
from runs import Runner
from screen import Screen
from synthetic import DTYPES, Checkpoints, make_checkpoints, parse_parameters, shape_of

from regraft.cli.options import size
from regraft.errors import UserError
from regraft.methods import methods

SCALING_RULES = ("linear", "ties", "dare_ties")
REHEARSAL = 50e6  # parameters: enough for more than one chunk per tensor


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    screen = Screen(tables.MODES[mode_of(options)], title=(__doc__ or "").splitlines()[0])
    try:
        with working_folder(options.work, keep=options.keep) as work:
            results = Benchmark(options, work, screen).run()
    except (UserError, ValueError) as error:
        Console(stderr=True).print(str(error), markup=False, style="red")
        return 2
    if options.markdown:
        print(tables.markdown(results))
    failed = [run for row in results["rows"] for run in row.get("regraft", ()) if run["status"]]
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--params", type=parameters, default="1.1b", help="size of a model, such as 0.1b or 4b")
    made.add_argument("--models", type=int, default=3, help="fine-tunes beside the base")
    made.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    made.add_argument("--rules", type=rule_names, help=f"of {','.join(RULES)}; all of them, or {SCALING_RULES} by size")
    made.add_argument("--pairs", type=int, default=3, help="runs of each tool for each rule")
    made.add_argument("--mergekit", type=Path, metavar="FILE", help="mergekit-yaml of an environment; without: no peer")
    mode = made.add_mutually_exclusive_group()
    mode.add_argument("--scaling", type=sizes, metavar="SIZES", help="regraft alone at these sizes: 0.1b,0.5b,1.1b")
    mode.add_argument("--limit-memory", type=memory, metavar="SIZE", help="regraft alone under this limit (Linux)")
    made.add_argument("--predict", action="store_true", help="compare with the memory and time that the plan predicts")
    made.add_argument("--regraft-args", type=shlex.split, default=[], help="options for regraft, as one word")
    made.add_argument("--mergekit-args", type=shlex.split, default=[], help="options for mergekit, as one word")
    made.add_argument("--timeout", type=float, default=3600, help="seconds after which a run is killed, and has failed")
    made.add_argument("--work", type=Path, help="folder for models and outputs; a temporary one if not given")
    made.add_argument("--keep", action="store_true", help="keep the models in --work, for the next call")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON, after every row")
    made.add_argument("--markdown", action="store_true", help="print the results as the documentation shows them")
    return made


def parameters(text: str) -> float:
    try:
        return parse_parameters(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sizes(text: str) -> list[float]:
    return [parameters(one) for one in text.split(",")]


def memory(text: str) -> int:
    try:
        return size(text)
    except typer.BadParameter as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def rule_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in CASES]:
        raise argparse.ArgumentTypeError(f"no recipe for {', '.join(unknown)}; there are {', '.join(CASES)}")
    return names


def mode_of(options: argparse.Namespace) -> str:
    return "scaling" if options.scaling else "limit" if options.limit_memory else "compare"


@contextmanager
def working_folder(given: Path | None, *, keep: bool) -> Iterator[Path]:
    """The folder for everything that is made; a temporary one goes in the end, unless it is kept."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
    elif keep:
        yield Path(tempfile.mkdtemp(prefix="merge-speed-"))
    else:
        with tempfile.TemporaryDirectory(prefix="merge-speed-") as folder:
            yield Path(folder)


class Benchmark:
    """One call of the program: checkpoints, runs, rows of results."""

    def __init__(self, options: argparse.Namespace, work: Path, screen: Screen) -> None:
        self.options, self.work, self.screen = options, work, screen
        self.mode = mode_of(options)
        self.rules: Sequence[str] = options.rules or (SCALING_RULES if self.mode == "scaling" else RULES)
        if options.pairs < 1 or options.models < 1:
            raise ValueError("--pairs and --models are 1 or more")
        if self.mode == "limit" and sys.platform != "linux":
            raise ValueError("--limit-memory needs Linux, where private memory can be limited")
        if options.mergekit is not None and self.mode != "compare":
            raise ValueError("--mergekit goes with neither --scaling nor --limit-memory")
        if options.mergekit is not None and not options.mergekit.is_file():
            raise ValueError(f"there is no {options.mergekit}: give the path of mergekit-yaml in its environment")
        mergekit = options.mergekit.absolute() if options.mergekit is not None else None
        self.runner = Runner(
            work,
            mergekit,
            regraft=options.regraft_args,
            mergekit_options=options.mergekit_args,
            timeout=options.timeout,
        )
        self.results: dict[str, Any] = {
            "schema": 1,
            "mode": self.mode,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": describe(work, mergekit),
            "settings": {
                "parameters": None if self.mode == "scaling" else shape_of(options.params).parameters,
                "checkpoints": options.models + 1,
                "dtype": options.dtype,
                "pairs": options.pairs,
                "command": command(options),
            },
            "references": [],
            "rows": [],
        }

    def run(self) -> dict[str, Any]:
        """All rows; they are written to `--out` as they come.

        Raises:
            UserError, ValueError: the machine lacks what the benchmark needs, or a tool does not work at all.
        """
        with self.screen:
            self.rehearse()
            for parameters in self.options.scaling or [self.options.params]:
                with self.checkpoints(parameters) as models:
                    if self.mode == "compare":
                        self.refer(models)
                    for rule in self.rules:
                        self.row(rule, models)
        return self.results

    @contextmanager
    def checkpoints(self, parameters: float) -> Iterator[Checkpoints]:
        """The models of a size, as long as they are needed."""
        made = make_checkpoints(
            self.work, shape_of(parameters), self.options.models, self.options.dtype, self.screen.making
        )
        try:
            yield made
        finally:
            if not self.options.keep:
                made.remove()

    def rehearse(self) -> None:
        """Every rule once on small models, untimed: what is compiled or cached on first use is there afterwards.

        A regraft that fails here fails later as well, and is reported there; a mergekit that cannot do even the first
        rule is no peer.
        """
        smallest = min(self.options.scaling or [self.options.params])
        with self.checkpoints(min(smallest, REHEARSAL)) as models:
            peers = [CASES[rule].peer for rule in self.available() if CASES[rule].peer and self.mode == "compare"]
            for rule in dict.fromkeys([*self.available(), *peers]):
                self.screen.doing(f"rehearsing {rule}")
                self.runner.regraft(self.recipe(rule, models), models)
            if self.runner.mergekit_path is not None:
                rule = next((r for r in self.available() if not CASES[r].peer), "")
                self.screen.doing("rehearsing mergekit")
                if rule and self.runner.mergekit(self.recipe(rule, models), models)["status"]:
                    raise ValueError(f"mergekit does not work:\n{self.runner.last_words()}")

    def available(self) -> list[str]:
        return [rule for rule in self.rules if not self.obstacle(rule)]

    def obstacle(self, rule: str) -> str:
        """Why a rule is skipped; "" if it is not."""
        if rule not in {m.name for m in methods("merge")}:
            return "not in this version of regraft"
        least = CASES[rule].at_least
        return f"it needs {least} fine-tunes or more" if self.options.models < least else ""

    def recipe(self, rule: str, models: Checkpoints) -> Any:
        return recipe_for(rule, models.names, self.options.dtype)

    def refer(self, models: Checkpoints) -> None:
        """What reading and copying take by themselves."""
        self.screen.doing("reading and copying, for reference")
        self.results["references"] = self.runner.references(models, self.options.pairs)
        self.save()

    def row(self, rule: str, models: Checkpoints) -> None:
        """All runs of one rule."""
        row: dict[str, Any] = {"rule": rule, "parameters": models.parameters, "checkpoints": len(models.names)}
        row |= {"bytes_each": models.bytes_each}
        if reason := self.obstacle(rule):
            row["skipped"] = reason
        else:
            self.fill(row, rule, models)
        self.results["rows"].append(row)
        self.screen.row(row)
        self.save()

    def fill(self, row: dict[str, Any], rule: str, models: Checkpoints) -> None:
        written = self.recipe(rule, models)
        row |= {"recipe": written.text, "cached": self.runner.fits_cache(models, written), "regraft": [], "peer": []}
        row["against"] = CASES[rule].peer if self.mode == "compare" and CASES[rule].peer else "mergekit"
        if self.mode == "limit":
            row["limit_bytes"] = self.options.limit_memory
        if self.mode == "scaling":
            self.screen.doing(f"{rule}: reading the inputs")
            row["read_seconds"] = self.runner.read(models, written)
        if self.options.predict:
            self.screen.doing(f"{rule}: planning")
            row["predicted"] = self.runner.predict(written, models)
        for pair in range(self.options.pairs):
            note = f"{rule}: run {pair + 1} of {self.options.pairs}"
            self.screen.doing(f"{note}, regraft")
            row["regraft"].append(self.told(self.runner.regraft(written, models, limit=self.options.limit_memory)))
            if self.mode != "compare":
                continue
            if CASES[rule].peer:
                self.screen.doing(f"{note}, regraft's {row['against']}")
                row["peer"].append(self.told(self.runner.regraft(self.recipe(CASES[rule].peer, models), models)))
            elif self.runner.mergekit_path is not None:
                self.screen.doing(f"{note}, mergekit")
                row["peer"].append(self.told(self.runner.mergekit(written, models)))
        row["bytes_read"] = sum(p.stat().st_size for p in models.weights(*written.reads))
        row["bytes_written"] = row["regraft"][-1]["bytes_written"]

    def told(self, run: dict[str, Any]) -> dict[str, Any]:
        """The run; what a failed one said is shown, and not stored, since it may name folders."""
        if run["status"]:
            words = self.runner.last_words() or "It said nothing."
            self.screen.say(f"Failed with status {run['status']} after {run['wall']:.0f} s. {words}")
        return run

    def save(self) -> None:
        if self.options.out is not None:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


def command(options: argparse.Namespace) -> str:
    """The call that makes these results again, without this machine's folders."""
    words = ["python", "benchmarks/merge_speed.py"]
    if options.scaling:
        words += ["--scaling", ",".join(f"{p / 1e9:g}b" for p in options.scaling)]
    else:
        words += ["--params", f"{options.params / 1e9:g}b"]
    words += ["--models", str(options.models), "--dtype", options.dtype, "--pairs", str(options.pairs)]
    if options.rules:
        words += ["--rules", ",".join(options.rules)]
    if options.limit_memory:
        words += ["--limit-memory", str(options.limit_memory)]
    if options.mergekit:
        words += ["--mergekit", "mergekit-yaml"]
    words += ["--predict"] if options.predict else []
    for flag, given in (("--regraft-args", options.regraft_args), ("--mergekit-args", options.mergekit_args)):
        words += [f"{flag}={shlex.join(given)}"] if given else []
    return shlex.join(words)


def end(*_: object) -> None:
    sys.exit(143)  # as an exception: the run in progress and the temporary folder go with it


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    sys.exit(main())
