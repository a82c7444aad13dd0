"""Entries of an expert's task vector are dropped at random at three rates, and the rest is scaled up (DARE), or not; or
all but the largest are dropped. Experts are fine-tunes by AdamW of a vision transformer on four distortions of digits,
of two widths; random masks are drawn three times. What is kept is the share of the expert's gain over its base that is
left. (With experts trained by gradient descent with momentum, whose changes are few and large, dropping 90 % at random
left less than the base in a pilot; claim 65 uses those.)

Continued pre-training: the same at rate 0.9 on a text decoder, for its instruction tuning and for its continued
pre-training on a domain, by the share of the gain in loss that is left.

What is inconclusive is a fraction of a point: at rate 0.9 DARE loses 1.3 of the 40 points that fine-tuning gained
(mean of seeds 0 to 4), where 1 is allowed. Larger models, which the paper finds to stand more, and lighter fine-tuning
have not been tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from claims import text
from claims.examination import Examination
from claims.shared import State, flat
from claims.skills import Experts
from claims.vision import SIZES
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.claims.paper_scale import Inputs, tuned_merges
from regraft.merge.rules.dare_linear import dare_linear
from regraft.merge.rules.ties import ties

SKILLS = ["rotated", "thickened", "occluded", "framed"]
RATES = (0.5, 0.9, 0.99)
MASKS = 3
NARROW = {"laptop": 32, "smoke": 8}


def dropped(state: State, base: State, rate: float, seed: int, **options: Any) -> State:
    return dare_linear([state], base=base, density=round(1 - rate, 6), seed=seed, **options)


def of_experts(experts: Experts, kind: str, rate: float) -> float:
    """Mean accuracy of the experts on their own skills, after their task vectors have been thinned."""
    if kind == "magnitude":
        thinned = [ties([s], base=experts.base, density=round(1 - rate, 6)) for s in experts.states]
        return experts.own(thinned, "test")
    rescale = {"dare": "density", "drop": "none"}[kind]
    return statistics.fmean(
        experts.own([dropped(s, experts.base, rate, mask, rescale=rescale) for s in experts.states], "test")
        for mask in range(MASKS)
    )


def share_left(before: float, after: float, thinned: float) -> float:
    """The part of what fine-tuning gained that is left; 0 if it gained nothing, as at scale "smoke"."""
    return (thinned - before) / (after - before) if abs(after - before) > 1e-6 else 0.0


def of_decoder(seed: int, scale: str) -> dict[str, float]:
    """The share of the gain in loss that is left at rate 0.9, and the mean size of the changes."""
    base = text.state_of(text.decoder(seed=seed, scale=scale))
    tuned = text.state_of(text.decoder_instruct(seed=seed, scale=scale))
    continued = text.state_of(text.decoder_domain(seed=seed, scale=scale))
    examine = Examination(seed, scale)

    def left(state: State, loss: Callable[[State], float]) -> float:
        before, after = loss(base), loss(state)
        thinned = statistics.fmean(loss(dropped(state, base, 0.9, mask)) for mask in range(MASKS))
        return share_left(before, after, thinned)

    return {
        "left/instruct": left(tuned, examine.answer_loss),
        "left/continued": left(continued, examine.domain_loss),
        "size of change/instruct": float(flat(tuned, base).abs().mean()),
        "size of change/continued": float(flat(continued, base).abs().mean()),
    }


def run(seed: int, scale: str) -> Figures:
    wide = Experts(seed, scale, SKILLS)
    narrow = Experts(seed, scale, SKILLS, width=NARROW[scale])
    figures = {"base": wide.own([wide.base] * len(SKILLS), "test"), "experts": wide.own(wide.states, "test")}
    for rate in RATES:
        for kind in ("dare", "drop", "magnitude"):
            figures[f"{kind}/{rate}"] = of_experts(wide, kind, rate)
    before, after = narrow.own([narrow.base] * len(SKILLS), "test"), narrow.own(narrow.states, "test")
    figures["left/wide"] = share_left(figures["base"], figures["experts"], figures["dare/0.99"])
    figures["left/narrow"] = share_left(before, after, of_experts(narrow, "dare", 0.99))
    return {**figures, **of_decoder(seed, scale)}


def at_paper_scale(seed: int, inputs: Inputs) -> Figures:
    """Name one expert; DARE and dropping alone, at a rate of 0.9."""
    arms = {
        "dare/0.9": {"merge": "dare_linear", "density": 0.1},
        "drop/0.9": {"merge": "dare_linear", "density": 0.1, "rescale": "none"},
    }
    found = tuned_merges(seed, inputs, arms)
    found["experts"] = found.pop("expert")
    return found


CLAIM = Claim(
    title="DARE",
    paper=dare_linear.papers[0],
    sentence="Nine tenths of what fine-tuning changed can be dropped at random if the rest is scaled up, not otherwise;"
    " larger models tolerate more, and continued pre-training tolerates less.",
    baselines=("dropping without rescaling", "keeping the largest changes"),
    run=run,
    at_paper_scale=at_paper_scale,
    checks=(
        Check(
            "at rate 0.9 DARE loses at most one point",
            lambda f: f["dare/0.9"] - f["experts"],
            -0.01,
            beyond=-0.01,
        ),
        Check("at rate 0.9 rescaling is better than not", lambda f: f["dare/0.9"] - f["drop/0.9"], 0.02),
        Check(
            f"at rate 0.99 width {SIZES['laptop'][0]} keeps more of its gain than width {NARROW['laptop']}",
            lambda f: f["left/wide"] - f["left/narrow"],
            0.05,
        ),
        Check(
            "at rate 0.9 instruction tuning keeps more of its gain than continued pre-training",
            lambda f: f["left/instruct"] - f["left/continued"],
            0.1,
        ),
        Check(
            "at rate 0.9 random entries are better than the largest",
            lambda f: f["dare/0.9"] - f["magnitude/0.9"],
            0.01,
            decides=False,
        ),
    ),
    plot=Plot(
        "Accuracy of experts on their own skills, %",
        (
            Row("base", "base", "untouched"),
            Row("experts", "experts", "untouched"),
            *(
                Row(label, f"{kind}/{rate}", f"dropped: {rate:.0%}")
                for rate in RATES
                for label, kind in (("DARE", "dare"), ("without rescaling", "drop"), ("largest kept", "magnitude"))
            ),
            *(
                Row(label, f"left/{kind}", "share of the gain that is left, %")
                for label, kind in (
                    ("wide, 99 % dropped", "wide"),
                    ("narrow, 99 % dropped", "narrow"),
                    ("instructions, 90 %", "instruct"),
                    ("continued, 90 %", "continued"),
                )
            ),
        ),
    ),
)
