"""The lineage of claim 18, one step longer: a decoder continued on a domain and then tuned to half of the domain's
questions, merged with the general instruct model of the same base. SLERP takes t = 0.5, or the study's gradients over
depth, which differ for attention and feed-forward layers; linear interpolation takes the same t. Nothing is tuned.

The study finds that merges of 7 B models surpass both parents and that a model of 1.7 B shows no such emergence; the
models here have a million parameters. Its preference tuning (DPO, ORPO) before the merge is left out.
"""

from __future__ import annotations

from typing import Any

import torch

from claims import text
from claims.examination import Examination
from claims.shared import State
from regraft.axes import layout
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.claims.paper_scale import Inputs, tuned_merges
from regraft.merge.rules.linear import linear
from regraft.merge.rules.slerp import slerp

ATTENTION, FEED_FORWARD = [0.0, 0.5, 0.3, 0.7, 1.0], [1.0, 0.5, 0.7, 0.3, 0.0]


def by_depth(rule: Any, general: State, domain: State) -> State:
    """The study's interpolation: gradients over depth for attention and feed-forward layers, 0.5 elsewhere."""
    places = layout({"model_type": "llama"}, general)
    merged: State = {}
    for name in general:
        place = places.place(name)
        anchors = {"attention": ATTENTION, "ffn": FEED_FORWARD}.get(place.part)
        t = 0.5
        if anchors is not None and place.layer is not None and place.num_layers is not None:
            x = place.layer / max(place.num_layers - 1, 1) * (len(anchors) - 1)
            low = min(int(x), len(anchors) - 2)
            t = anchors[low] + (x - low) * (anchors[low + 1] - anchors[low])
        pair = [general[name], domain[name]]
        merged[name] = rule(pair, t=t) if rule is slerp else rule(pair, weight=[1 - t, t])
    return merged


def run(seed: int, scale: str) -> Figures:
    base = text.state_of(text.decoder(seed=seed, scale=scale))
    continued = text.state_of(text.decoder_domain(seed=seed, scale=scale))
    general = text.state_of(text.decoder_instruct(seed=seed, scale=scale))
    domain = text.state_of(text.decoder_domain_instruct(seed=seed, scale=scale))
    models = {
        "base": base,
        "continued": continued,
        "general": general,
        "domain": domain,
        "slerp": slerp([general, domain], t=0.5),
        "lerp": linear([general, domain]),
        "slerp by depth": by_depth(slerp, general, domain),
        "lerp by depth": by_depth(linear, general, domain),
    }
    examine = Examination(seed, scale)
    figures = {
        f"{measure}/{name}": value for name, model in models.items() for measure, value in examine(model).items()
    }
    cosines = [
        float(torch.nn.functional.cosine_similarity(general[n].flatten(), domain[n].flatten(), 0)) for n in general
    ]
    figures["share of tensors on the sphere"] = sum(abs(c) <= 0.9995 for c in cosines) / len(cosines)
    return figures


def at_paper_scale(seed: int, inputs: Inputs) -> Figures:
    """The experts are the general instruct model and the domain's model, in this order."""
    found = tuned_merges(
        seed, inputs, {"slerp": {"merge": "slerp", "t": 0.5}, "lerp": {"merge": "linear", "weight": [0.5, 0.5]}}
    )
    return {f"domain questions/{name}": value for name, value in found.items()}


def recovered(figures: Figures) -> float:
    """The part of the loss on general answers that the domain's tuning cost and the merge wins back."""
    lost = figures["answer loss/domain"] - figures["answer loss/general"]
    return (figures["answer loss/domain"] - figures["answer loss/slerp"]) / max(lost, 1e-6)


def emergence(figures: Figures) -> float:
    best = max(figures["domain questions/general"], figures["domain questions/domain"])
    return figures["domain questions/slerp"] - best


def synergy(figures: Figures) -> float:
    mean = (figures["domain questions/general"] + figures["domain questions/domain"]) / 2
    return figures["domain questions/slerp"] - mean


CLAIM = Claim(
    title="Merging a lineage",
    paper=next(paper for paper in slerp.papers if paper.number == 16),
    sentence="SLERP of a domain's model with the general instruct model wins general ability back; very small models"
    " show no emergence above both parents.",
    baselines=("general instruct model", "domain's model", "linear interpolation with the same t"),
    run=run,
    at_paper_scale=at_paper_scale,
    checks=(
        Check("the merge wins back half of the general loss", lambda f: recovered(f) - 0.5, 0.0),
        Check(
            "no emergence: on the domain's questions the merge is at most a point above the better parent",
            lambda f: -emergence(f),
            -0.01,
            beyond=-0.01,
        ),
        Check("the merge is above the mean of its parents", synergy, 0.0, decides=False),
        Check(
            "SLERP and linear interpolation differ by less than a point",
            lambda f: -abs(f["domain questions/slerp"] - f["domain questions/lerp"]),
            -0.01,
            beyond=-0.01,
            decides=False,
        ),
        Check(
            "gradients over depth are better than 0.5 everywhere",
            lambda f: f["domain questions/slerp by depth"] - f["domain questions/slerp"],
            0.01,
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
                ("general instruct", "general"),
                ("continued on the domain", "continued"),
                ("and tuned to it", "domain"),
                ("linear", "lerp"),
                ("SLERP", "slerp"),
                ("SLERP by depth", "slerp by depth"),
            )
        ),
    ),
)
