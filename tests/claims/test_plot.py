"""A claim's plot: every figure where its value is, well-formed, with colours for light and dark."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from regraft.claims.claim import Plot, Row
from regraft.claims.plot import draw

SVG = "{http://www.w3.org/2000/svg}"
PLOT = Plot("Accuracy & more, %", (Row("a <b>", "a", "first"), Row("b", "b", "second"), Row("none", "c", "second")))
SEEDS = {"0": {"a": 0.5, "b": 0.8}, "1": {"a": 0.6, "b": 0.7}, "2": {"a": 0.7, "b": 0.9}}


def test_means_and_seeds_stand_at_their_values() -> None:
    root = ElementTree.fromstring(draw(PLOT, SEEDS))
    ticks = {
        float(node.text): float(node.attrib["x"])
        for node in root.iter(f"{SVG}text")
        if node.attrib["class"] == "soft axis middle" and node.text
    }
    low, high = min(ticks), max(ticks)

    def value(x: float) -> float:
        return low + (x - ticks[low]) / (ticks[high] - ticks[low]) * (high - low)

    dots = list(root.iter(f"{SVG}circle"))
    means = [value(float(dot.attrib["cx"])) for dot in dots if dot.attrib["class"] == "mean"]
    assert means == pytest.approx([60, 80], abs=0.1)
    seeds = [value(float(dot.attrib["cx"])) for dot in dots if dot.attrib["class"] == "seed"]
    assert seeds == pytest.approx([50, 60, 70, 80, 70, 90], abs=0.1)
    whiskers = [node for node in root.iter(f"{SVG}line") if node.attrib["class"] == "whisker"]
    ends = [(value(float(w.attrib["x1"])), value(float(w.attrib["x2"]))) for w in whiskers]
    assert all(low <= a < mean < b <= high for (a, b), mean in zip(ends, means, strict=True))
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert {"a <b>", "b", "first", "second", "60", "80"} <= set(texts)
    assert "none" not in texts


def test_it_is_drawn_for_light_and_dark_and_needs_nothing_else() -> None:
    text = draw(PLOT, SEEDS)
    assert "prefers-color-scheme:dark" in text
    assert "href" not in text
    assert text.count("http") == 1  # the name space


def test_one_seed_and_equal_values_can_be_drawn() -> None:
    root = ElementTree.fromstring(draw(PLOT, {"0": {"a": 0.5, "b": 0.5}}))
    assert not [node for node in root.iter(f"{SVG}line") if node.attrib["class"] == "whisker"]
    assert len([node for node in root.iter(f"{SVG}circle") if node.attrib["class"] == "mean"]) == 2
