"""What is damaged and how: one function per target, from a random generator to an input in a `World`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TypeAlias

from fuzz.world import Input, World

Target: TypeAlias = Callable[[Random, World], Input]
TARGETS: dict[str, Target] = {}


def target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


def linked(world: World, *without: str, seed: str = "a", name: str = "model") -> Path:
    """A model in the case's folder, made of links to a good one's files except those named."""
    folder = world.case / name
    folder.mkdir()
    for entry in os.scandir(world.seed(seed)):
        if entry.name not in without:
            os.link(entry.path, folder / entry.name)
    return folder


def given(rng: Random, world: World, model: str) -> Input:
    """The model opened and looked at; for a share of them also planned, merged, compared."""
    base, b = world.seed("base"), world.seed("b")
    recipe = ""
    if rng.random() < 0.25:
        recipe = rng.choice(
            (
                "steps: {m: {merge: linear, models: [M, B]}}",
                "steps: {m: {merge: ties, base: BASE, models: [M, B], density: 0.5}}",
                "steps: {m: {merge: dare_ties, base: M, models: [B], density: 0.5, out_dtype: float16}}",
                "steps: {m: {merge: passthrough, models: [M], dtype: bfloat16}}",
                "steps: {m: {merge: slerp, base: BASE, models: [M], t: 0.3, config_from: M, tokenizer_from: M}}",
                "steps: {m: {merge: passthrough, slices: [{models: [{model: M, layers: [0, 1]}]}]}}",
            )
        )
        for word, place in (("BASE", base), ("M", model), ("B", b)):
            recipe = recipe.replace(f" {word}", f" '{place}'").replace(f"[{word}", f"['{place}'")
    return Input([model], recipe, run=rng.random() < 0.2, deep=rng.random() < 0.1)


from fuzz import texts, weights  # noqa: E402, F401 - importing them enters their targets
