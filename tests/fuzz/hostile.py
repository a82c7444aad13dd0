"""Feeds damaged models and recipes to regraft: `python tests/fuzz/hostile.py --inputs 20000 [--seed 0] [--only card]`.

Every input is made from its target's name and a seed, so that a failure is had again by
`--only TARGET --first SEED --inputs 1`. It goes through the doors that users' files go through (opening, reading all
values, `inspect`, planning a recipe, for a share also merging), and the answer has to be a result or one sentence: no
other exception, no hang, no program started, nothing touched outside the output, memory bounded.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.targets import TARGETS
from fuzz.world import Failure, World


def attempt(world: World, name: str, seed: int) -> tuple[list[Failure], list[str]]:
    """Judge the input that a target makes of a seed."""
    return world.judge(lambda world: TARGETS[name](Random(f"{name}:{seed}"), world))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="how many, shared among the targets")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other inputs")
    parser.add_argument("--first", type=int, help="the seed of the first input itself, as a failure names it")
    parser.add_argument("--only", default=",".join(TARGETS), help=f"targets, of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="after which an input hangs")
    parser.add_argument("--verbose", action="store_true", help="name each input before it is tried")
    given = parser.parse_args()
    names = given.only.split(",")
    first = given.seed * 10**9 if given.first is None else given.first
    faulthandler.enable()
    told: Counter[str] = Counter()
    done: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    worked: Counter[str] = Counter()
    slowest = dict.fromkeys(names, (0.0, first))
    with tempfile.TemporaryDirectory(prefix="regraft-fuzz-") as root:
        world = World(Path(root), given.seconds)
        with world.entered():
            begun = time.perf_counter()
            for i in range(given.inputs):
                name, seed = names[i % len(names)], first + i // len(names)
                faulthandler.dump_traceback_later(100 * given.seconds, exit=True)
                if given.verbose:
                    print(name, seed, flush=True)
                started = time.perf_counter()
                failures, answers = attempt(world, name, seed)
                slowest[name] = max(slowest[name], (time.perf_counter() - started, seed))
                faulthandler.cancel_dump_traceback_later()
                done[name] += 1
                worked[name] += "worked" in answers
                failed[name] += bool(failures)
                for failure in failures:
                    told[failure.what] += 1
                    if told[failure.what] == 1:
                        print(f"--only {name} --first {seed}: {failure.what}\n{failure.trace}", flush=True)
            seconds = time.perf_counter() - begun
    for name in names:
        slow = "the slowest took {:.1f} s ({})".format(*slowest[name])
        print(f"{name}: {done[name]} inputs, {worked[name]} of some use, {failed[name]} failures; {slow}")
    total = sum(done.values())
    print(f"{total} inputs in {seconds:.0f} s ({total / seconds:.0f} per second): {sum(failed.values())} failures")
    return 1 if failed.total() else 0


if __name__ == "__main__":
    sys.exit(main())
