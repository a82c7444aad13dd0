"""The experts of claim 65: fine-tunes of one vision transformer on eight distortions of digits, trained by gradient
descent with momentum. The first two, four and all eight are merged. PCB has 3 ratios times 4 values of lambda to choose
from on validation images, TIES 3 densities times the same 4, task arithmetic 12 values of lambda; averaging has nothing
to choose.

Why it does not hold: as claim 65 says, merges of eight of these experts keep little of what they gained over the base,
and PCB keeps least: 49 % are right, after averaging 54 % (mean of seeds 0 to 4).
"""

from __future__ import annotations

from claims.shared import grid
from claims.skills import Experts
from claims.vision import SKILLS
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.claims.paper_scale import Inputs, tuned_merges
from regraft.merge.rules.linear import linear
from regraft.merge.rules.pcb import pcb
from regraft.merge.rules.task_arithmetic import task_arithmetic
from regraft.merge.rules.ties import ties

COUNTS = (2, 4, 8)
LAMBDAS = [0.6, 1.0, 1.5, 2.0]
ARMS = {
    "arithmetic": (task_arithmetic, grid(lambda_=[0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])),
    "ties": (ties, grid(density=[0.1, 0.2, 0.5], lambda_=LAMBDAS)),
    "pcb": (pcb, grid(ratio=[0.05, 0.1, 0.2], lambda_=LAMBDAS)),
}


def run(seed: int, scale: str) -> Figures:
    experts = Experts(seed, scale, list(SKILLS), optimizer="sgd")
    figures = {
        "base": experts.score(experts.base, "test"),
        "experts": experts.own(experts.states, "test"),
        "pcb untuned/8": experts.score(pcb(experts.states, base=experts.base), "test"),
    }
    for n in COUNTS:
        figures[f"averaging/{n}"] = experts.score(linear(experts.states[:n]), "test", n)
        for name, (rule, tries) in ARMS.items():
            figures[f"{name}/{n}"], _ = experts.tuned(rule, tries, n)
    return figures


def at_paper_scale(seed: int, inputs: Inputs) -> Figures:
    n, lambdas = len(inputs.experts), [options["lambda_"] for options in ARMS["arithmetic"][1]]
    found = tuned_merges(
        seed,
        inputs,
        {
            "averaging": {"merge": "linear"},
            "arithmetic": {
                "merge": "task_arithmetic",
                "sweep": {"lambda": lambdas},
            },
            "ties": {"merge": "ties", "sweep": {"density": [0.1, 0.2, 0.5], "lambda": LAMBDAS}},
            "pcb": {"merge": "pcb", "sweep": {"ratio": [0.05, 0.1, 0.2], "lambda": LAMBDAS}},
        },
    )
    return {"base": found.pop("base"), "experts": found.pop("expert"), **{f"{k}/{n}": v for k, v in found.items()}}


CLAIM = Claim(
    title="PCB-Merging",
    paper=pcb.papers[0],
    sentence="Balancing the competition between parameters merges many experts better than TIES does.",
    baselines=("averaging", "task arithmetic", "TIES"),
    run=run,
    at_paper_scale=at_paper_scale,
    checks=(
        Check("with 8 experts PCB is better than TIES", lambda f: f["pcb/8"] - f["ties/8"], 0.005),
        Check(
            "from 2 to 8 experts PCB loses less than TIES",
            lambda f: (f["ties/2"] - f["ties/8"]) - (f["pcb/2"] - f["pcb/8"]),
            0.005,
            decides=False,
        ),
        Check(
            "with 8 experts PCB is better than averaging", lambda f: f["pcb/8"] - f["averaging/8"], 0.005, decides=False
        ),
    ),
    plot=Plot(
        "Mean accuracy over the merged skills, %",
        (
            Row("base", "base", "one model"),
            Row("experts, own skill", "experts", "one model"),
            *(
                Row(label, f"{arm}/{n}", f"{n} experts")
                for n in COUNTS
                for label, arm in (
                    ("averaging", "averaging"),
                    ("task arithmetic", "arithmetic"),
                    ("TIES", "ties"),
                    ("PCB", "pcb"),
                )
            ),
            Row("PCB, its defaults", "pcb untuned/8", "8 experts"),
        ),
    ),
)
