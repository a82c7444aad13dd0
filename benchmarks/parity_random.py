"""Rules that draw at random, by both tools: their draws differ, so distributions are compared, on a million entries.

Both merge the same task vectors of normal noise. Of one matrix of 1024 x 1024 entries the share that moved, the mean
change in the direction of the task vectors, and the norms are compared, over all entries and over those of like size,
in units of the standard error that the entries themselves show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file

from regraft.recipe import load_recipe
from regraft.recipe.run import merge
from regraft.recipe.settings import Settings

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import models as tiny
from distribution import likeness, shared_error

WIDTH = 1024
NAME = "model.layers.0.self_attn.q_proj.weight"
DENSITY = (0.3, 0.6)
EACH = {"weight": (0.6, 0.3), "density": DENSITY}
DELLA = {**EACH, "epsilon": (0.15, 0.2)}
RULES = {"dare_linear": EACH, "dare_ties": EACH, "della": DELLA, "della_linear": DELLA}


def compare(folder: Path, ask: Callable[[Path, Path], str], rules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each rule, with and without its norm restored.

    Args:
        ask: (recipe, output) -> what keeps mergekit from making it, "" if it did.
    """
    shape = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    tiny.save_model(folder / "base", "llama", **shape)
    for seed, name in enumerate("ab", start=1):
        tiny.save_fine_tune(folder / name, folder / "base", seed, scale=0.05)
    base, *models = (load_file(folder / name / "model.safetensors")[NAME] for name in ("base", "a", "b"))
    deltas = torch.stack([(model - base).flatten() for model in models])
    cases = [(rule, rescale) for rule in rules for rescale in (True, False)]
    for rule, rescale in track(cases, "draws", console=Console(stderr=True)):
        recipe = folder / f"{rule}-{rescale}.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(rule, rescale, folder)), encoding="utf-8")
        ours, theirs = (folder / f"{rule}-{rescale}-{tool}" for tool in ("regraft", "mergekit"))
        refused = ask(recipe, theirs)
        row: dict[str, Any] = {"rule": rule, "rescale": rescale, "entries": base.numel(), "refused": refused}
        if not refused:
            merge(load_recipe(recipe), ours, Settings(force=True))
            changes = [(load_file(out / "model.safetensors")[NAME] - base).flatten() for out in (ours, theirs)]
            error = max(shared_error(d, p) for d, p in zip(deltas, DENSITY, strict=True)) if rescale else 0.0
            row["found"] = [vars(one) for one in likeness(changes[0], changes[1], deltas, error)]
        yield row


def _recipe(rule: str, rescale: bool, folder: Path) -> dict[str, Any]:
    each = [{option: values[i] for option, values in RULES[rule].items()} for i in range(2)]
    models = [{"model": str(folder / m), "parameters": e} for m, e in zip("ab", each, strict=True)]
    return {
        "merge_method": rule,
        "base_model": str(folder / "base"),
        "models": models,
        "parameters": {"rescale": rescale},
        "dtype": "float32",
    }
