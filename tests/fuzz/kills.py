"""Kills commands at random moments and checks what is left: `python tests/fuzz/kills.py --kills 200`.

Each case makes a small model, delta or adapter by `regraft merge` (of models, or of adapters into one), `delta
extract`, `delta apply` or `extract-lora`, kills it one to three times, and lets the same command end. After each kill
the output must be absent, the whole old one or the whole new one; at the end every file must be that of a run that was
never killed, except for the date, time and memory that a run measures, and nothing may be left beside it.

Half of the kills come after a random time, half before, after or within a random call that changes the disk, so that
short phases (staging, publishing, swapping with an old model) are hit as often as long ones. Runs are forks of one
process that has imported everything, because starting Python takes longer than merging such a model.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RULES = {
    "ties-model": "merge: ties, base: base, models: [a, b], density: 0.3",
    "ties-tensor": "merge: ties, base: base, models: [a, b], density: 0.3, trim_scope: tensor",
    "linear": "merge: linear, models: {a: {weight: 0.7}, b: {weight: 0.3}}",
    "dare": "merge: dare_ties, base: base, models: [a, b], density: 0.5, seed: 7",
}
# Other commands than merges; `apply` works on what `dense` makes, so that it stands after it.
COMMANDS = {
    "dense": "delta extract {folder}/a {out} --base {folder}/base",
    "sparse": "delta extract {folder}/a {out} --base {folder}/base --kind sparse",
    "bits": "delta extract {folder}/a {out} --base {folder}/base --kind bits",
    "apply": "delta apply {folder}/whole-dense {out} --base {folder}/base --scale 0.5",
    "lora": "extract-lora {folder}/a {out} --base {folder}/base --rank 8 --save-modules all --embeddings",
    "adapters": "merge {folder}/adapters.yaml {out}",
}
SWITCHES = ("--shard-size", "300KB", "--workers", "2", "--chunk", "16384")
MEASURED = ("started", "finished", "wall_seconds", "peak_memory_bytes")
# Calls that change the disk, or make a change last; the last two are also cut short.
CALLS = ("mkdir", "open", "posix_fallocate", "fsync", "fdatasync", "ftruncate", "unlink", "rmdir", "rename", "replace")
WRITES = ("write", "pwrite")
SLOW = 120  # seconds after which a run hangs


@dataclass
class Kill:
    """When to kill: after `seconds`, or at the `count`-th call of `name` ("before", "after", "within")."""

    seconds: float = 0.0
    name: str = ""
    count: int = 0
    side: str = "before"

    def __str__(self) -> str:
        return f"{self.side} {self.name} {self.count}" if self.name else f"after {self.seconds:.3f} s"


@dataclass
class Summary:
    """What came of it; `faults` are sentences, none if all is well."""

    cases: int = 0
    kills: int = 0
    invalid: int = 0
    identical: int = 0
    resumed: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = ", ".join(f"{name} {count}" for name, count in self.phases.most_common())
        return (
            f"{self.kills} kills in {self.cases} cases: {self.invalid} invalid outputs, "
            f"{self.identical} of {self.cases} identical, {self.resumed} went on from finished tensors ({where})"
        )


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run `work` in a fork of this process; the exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.dump_traceback_later(SLOW, exit=True)
            work()
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch_calls(kill: Kill, tally: Path | None) -> Callable[[], None]:
    """Wrap the calls of `os` in this process, to die at one of them; the result writes how many there were."""
    counts: Counter[str] = Counter()
    mutex = threading.Lock()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            with mutex:
                counts[name] += 1
                now = kill.name == name and counts[name] == kill.count
            if now and kill.side == "within":
                data = memoryview(arguments[1]).cast("B")
                call(arguments[0], data[: len(data) // 2], *arguments[2:])
            if now and kill.side != "after":
                die()
            result = call(*arguments, **named)
            if now:
                die()
            return result

        return run

    for name in (*CALLS, *WRITES):
        if hasattr(os, name):
            setattr(os, name, wrapped(name, getattr(os, name)))
    if sys.version_info < (3, 11):  # pathlib keeps the calls that it found when it was imported
        for method in ("mkdir", "unlink", "rmdir", "rename", "replace"):
            setattr(Path, method, wrapped(method, getattr(Path, method)))

    def tell() -> None:
        if tally is not None:
            found = dict(counts)
            tally.write_text(json.dumps(found))

    return tell


class Bench:
    """A folder with models, recipes and the outputs of runs that were not killed."""

    def __init__(self, folder: Path, cases: Sequence[str]) -> None:
        self.cases = cases
        self.folder, self.out, self.log = folder, folder / "work" / "out", folder / "log"
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, dict[str, int]] = {}
        if forked(lambda: make_models(folder)):
            raise RuntimeError("the models could not be made")
        for rule, body in RULES.items():
            text = f"models: {{base: ./base, a: ./a, b: ./b}}\nsteps:\n  x: {{{body}}}\n"
            (folder / f"{rule}.yaml").write_text(text)
        self.warm()
        for rule in cases:
            self.fresh()
            self.reference(rule, Kill())
            shutil.copytree(self.out, folder / f"whole-{rule}")

    def warm(self) -> None:
        """Merge once in this process, so that its forks find everything imported and compiled."""
        from transformers.models.auto import modeling_auto  # noqa: F401

        from regraft.recipe import load_recipe
        from regraft.recipe.run import merge
        from regraft.recipe.settings import Settings

        for rule in set(RULES) & set(self.cases):
            merge(load_recipe(self.folder / f"{rule}.yaml"), self.folder / "warm", Settings(force=True, workers=2))
        if set(COMMANDS) & set(self.cases):
            warm_commands(self.folder)
        threads = threading.active_count()
        if threads > 1:
            raise RuntimeError(f"{threads} threads are running, and a fork would have one of them")

    def reference(self, rule: str, kill: Kill) -> None:
        begun = time.monotonic()
        tally = self.folder / "tally"
        if self.run(rule, kill, tally=tally):
            raise RuntimeError(f"{rule} failed:\n{self.log.read_text()}")
        self.seconds[rule] = time.monotonic() - begun
        self.calls[rule] = json.loads(tally.read_text())

    def fresh(self, old: str = "") -> None:
        """Nothing under the output's name, or the finished model of another recipe."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        if old:
            shutil.copytree(self.folder / f"whole-{old}", self.out)

    def run(self, rule: str, kill: Kill, *, force: bool = False, tally: Path | None = None) -> int:
        def work() -> None:
            from regraft.cli.main import main

            with self.log.open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            words = ["merge", f"{self.folder}/{rule}.yaml", str(self.out), *SWITCHES]
            if rule in COMMANDS:
                words = COMMANDS[rule].format(folder=self.folder, out=self.out).split()
            sys.argv = ["regraft", *words, *(["--force"] if force else [])]
            tell = watch_calls(kill, tally)
            try:
                main()
            finally:
                tell()

        return forked(work, None if kill.name or not kill.seconds else kill.seconds)

    def state(self, rule: str, old: str) -> str:
        """What is under the output's name: "nothing", "old", "new", else a sentence."""
        if not self.out.exists():
            return "nothing"
        for name, model in (("new", rule), ("old", old)):
            if model and not differences(self.out, self.folder / f"whole-{model}"):
                return name
        return "; ".join(differences(self.out, self.folder / f"whole-{rule}"))


def differences(out: Path, whole: Path) -> list[str]:
    """Files that differ in what is not measured."""
    names = {p.relative_to(out) for p in out.rglob("*")} | {p.relative_to(whole) for p in whole.rglob("*")}
    return [f"{name} differs" for name in sorted(names) if content(out / name) != content(whole / name)]


def content(path: Path) -> Any:
    """What is in a file, without what a run measures."""
    if not path.is_file():
        return path.is_dir()
    if path.name == "regraft.json":
        facts = json.loads(path.read_text())
        return {key: value for key, value in facts.items() if key not in MEASURED}
    if path.name == "README.md":
        return re.sub(r"(?m)^- (finished \S+ after \S+ s|peak memory \d+ MiB)$", "", path.read_text())
    return path.read_bytes()


def warm_commands(folder: Path) -> None:
    """As `Bench.warm`, for what merges do not import."""
    from regraft.adapters.extract import Wanted
    from regraft.adapters.publish import extract_lora
    from regraft.checkpoint import open_checkpoint
    from regraft.deltas.apply import apply, open_delta
    from regraft.deltas.extract import extract
    from regraft.recipe import load_recipe
    from regraft.recipe.run import merge
    from regraft.recipe.settings import Settings

    merge(load_recipe(folder / "adapters.yaml"), folder / "warm-adapter", Settings(force=True))
    base, model = (open_checkpoint(str(folder / name)) for name in ("base", "a"))
    extract(model, base, folder / "warm-delta", "sparse")
    apply(open_delta(folder / "warm-delta"), base, folder / "warm", force=True)
    extract_lora(model, base, folder / "warm", Wanted(save=["all"], embeddings=True), force=True)


def make_models(folder: Path) -> None:
    """A base of some megabytes and two fine-tunes of it."""
    from models import save_adapter, save_fine_tune, save_model

    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "vocab_size": 512}
    save_model(folder / "base", "llama", **sizes)
    for seed, name in enumerate("ab", start=1):
        save_fine_tune(folder / name, folder / "base", seed)
        save_adapter(folder / f"adapter-{name}", folder / "base", seed, r=8, target_modules=["q_proj", "down_proj"])
    named = ", ".join(f"{name}: ./base+./adapter-{name}" for name in "ab")
    step = "merge: task_arithmetic, base: base, models: [a, b], weight: 0.5, output: lora"
    (folder / "adapters.yaml").write_text(f"models: {{base: ./base, {named}}}\nsteps:\n  x: {{{step}}}\n")


def chosen_kill(rng: random.Random, seconds: float, calls: Mapping[str, int]) -> Kill:
    if rng.random() < 0.5:
        return Kill(seconds=rng.uniform(0, 1.05) * seconds)
    writes = [name for name in WRITES if name in calls]  # between writes there is most to lose
    name = rng.choice([*sorted(calls), *(name for name in writes for _ in range(3))])
    sides = ["before", "after", *(["within"] if name in WRITES else [])]
    return Kill(name=name, count=rng.randint(1, calls[name]), side=rng.choice(sides))


def kill_often(bench: Bench, kills: int, seed: int, say: Callable[[str], None] = print) -> Summary:
    """At least `kills` kills that hit, and what came of them."""
    rng = random.Random(seed)
    summary = Summary()
    while summary.kills < kills:
        rule = rng.choice(bench.cases)
        old = rng.choice([r for r in bench.cases if r != rule]) if rng.random() < 0.4 else ""
        bench.fresh(old)
        story = [f"{rule}{f' over {old}' if old else ''}"]
        for _ in range(rng.randint(1, 3)):
            kill = chosen_kill(rng, bench.seconds[rule], bench.calls[rule])
            if bench.run(rule, kill, force=bool(old)) != -signal.SIGKILL:
                continue  # it had ended before, or never made so many calls
            summary.kills += 1
            summary.phases[kill.name or "time"] += 1
            story.append(str(kill))
            state = bench.state(rule, old)
            shown = [p.name for p in bench.out.parent.iterdir() if not p.name.startswith(".")]
            if state not in ("nothing", "old", "new") or set(shown) - {"out"}:
                summary.invalid += 1
                summary.faults.append(f"{', '.join(story)}: {state} {shown}")
        status = bench.run(rule, Kill(), force=bool(old))
        summary.cases += 1
        log = bench.log.read_text()
        summary.resumed += "are there from a run that did not end" in log
        state, left = bench.state(rule, ""), sorted(p.name for p in bench.out.parent.iterdir())
        if state == "new":
            summary.identical += 1
        if status or state != "new" or left != ["out"]:
            summary.faults.append(f"{', '.join(story)}: status {status}, {state}, {left}: {log.strip()[-300:]}")
            say(summary.faults[-1])
    return summary


@contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """Everything imported, in one thread, and a cache of our own."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    import torch

    import regraft.cli.main
    import regraft.recipe.run
    import regraft.report.page  # noqa: F401

    torch.set_num_threads(1)
    yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", default=",".join([*RULES, *COMMANDS]))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="regraft-kills-") as name, prepared(Path(name)):
        summary = kill_often(Bench(Path(name), given.cases.split(",")), given.kills, given.seed)
    for fault in summary.faults:
        print(f"fault: {fault}")
    print(summary)
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
