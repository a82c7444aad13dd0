"""A small decoder is pre-trained on the standard library's source without its part about the internet. From it come an
instruct model (questions about general functions in a chat format) and a domain model (continued on the raw source of
modules about the internet). Both vectors are added to the base with weight 1, and nothing is tuned.

Measured: the format kept (greedy answers to general questions that are one line and end as instructed), the loss on
held-out raw text of the domain, and questions about the domain in the chat format, which nobody was tuned to: is an
answer more likely after the right function's name than after three others? Baselines: the parents, their average, SLERP
at 0.5, and continuing the instruct model itself on the domain for as many steps.

Why it does not hold: not because the vectors interfere. On the domain's text, continuing lowers the loss by 0.25 nats
(mean of seeds 0 to 4), instruction tuning alone raises it by 0.21, and the sum changes it by what these two add up to,
to 0.02 nats with every seed. What is lost is what the instruct model, which sees no raw text while it is tuned, has
forgotten. And continuing alone adds 0.8 points on the domain's questions, so that there is little to carry over. An
instruct model that is tuned with raw text in between, and longer continuing, have not been tried.
"""

from __future__ import annotations

from claims import text
from claims.examination import Examination
from claims.shared import cosine, flat
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.claims.paper_scale import Inputs, tuned_merges
from regraft.merge.rules.linear import linear
from regraft.merge.rules.slerp import slerp
from regraft.merge.rules.task_arithmetic import task_arithmetic

ARMS = ("base", "domain", "instruct", "average", "slerp", "continued", "sum")


def run(seed: int, scale: str) -> Figures:
    base = text.state_of(text.decoder(seed=seed, scale=scale))
    domain = text.state_of(text.decoder_domain(seed=seed, scale=scale))
    instruct = text.state_of(text.decoder_instruct(seed=seed, scale=scale))
    continued = text.state_of(text.decoder_domain(seed=seed, scale=scale, start="instruct"))
    models = {
        "base": base,
        "domain": domain,
        "instruct": instruct,
        "average": linear([domain, instruct]),
        "slerp": slerp([domain, instruct], t=0.5),
        "continued": continued,
        "sum": task_arithmetic([domain, instruct], base=base, weight=1.0),
    }
    examine = Examination(seed, scale)
    figures = {f"{measure}/{name}": value for name in ARMS for measure, value in examine(models[name]).items()}
    figures["cosine"] = cosine(flat(domain, base), flat(instruct, base))
    figures["cosine of two domain vectors"] = cosine(flat(domain, base), flat(continued, instruct))
    return figures


def at_paper_scale(seed: int, inputs: Inputs) -> Figures:
    """The experts are the domain model and the instruct model; the score is over the data of both."""
    return tuned_merges(
        seed,
        inputs,
        {"average": {"merge": "linear"}, "slerp": {"merge": "slerp", "t": 0.5}, "sum": {"merge": "task_arithmetic"}},
    )


def above(figures: Figures, measure: str, *others: str) -> float:
    return figures[f"{measure}/sum"] - max(figures[f"{measure}/{other}"] for other in others)


CLAIM = Claim(
    title="Instruction vector + domain vector",
    paper=next(paper for paper in task_arithmetic.papers if paper.number == 18),
    sentence="Added to one base, an instruction vector and a domain vector give a domain model that follows"
    " instructions, without instruction data of the domain; the two vectors are nearly orthogonal.",
    baselines=("base", "domain model", "instruct model", "average", "SLERP", "instruct model continued on the domain"),
    run=run,
    at_paper_scale=at_paper_scale,
    checks=(
        Check(
            "nine tenths of the instruct model's format are kept",
            lambda f: f["format/sum"] - 0.9 * f["format/instruct"],
            0.0,
            beyond=-0.02,
        ),
        Check(
            "half of what continuing gained on the domain's text is kept",
            lambda f: (
                (f["domain loss/base"] - f["domain loss/sum"])
                / max(f["domain loss/base"] - f["domain loss/domain"], 1e-6)
                - 0.5
            ),
            0.0,
        ),
        Check(
            "the domain's questions: the sum is better than both parents",
            lambda f: above(f, "domain questions", "domain", "instruct"),
            0.02,
        ),
        Check("the two vectors have a cosine below 0.2", lambda f: 0.2 - abs(f["cosine"]), 0.0, percent=False),
        Check(
            "the domain's questions: the sum is better than average and SLERP",
            lambda f: above(f, "domain questions", "average", "slerp"),
            0.0,
            decides=False,
        ),
        Check(
            "the format: the sum keeps more than the instruct model continued on the domain",
            lambda f: above(f, "format", "continued"),
            0.02,
            decides=False,
        ),
    ),
    plot=Plot(
        "Shares, %",
        tuple(
            Row(label, f"{measure}/{name}", group)
            for measure, group in (("domain questions", "the domain's questions"), ("format", "format kept"))
            for label, name in (
                ("base", "base"),
                ("domain model", "domain"),
                ("instruct model", "instruct"),
                ("average", "average"),
                ("SLERP", "slerp"),
                ("instruct, continued", "continued"),
                ("sum of vectors", "sum"),
            )
        ),
    ),
)
