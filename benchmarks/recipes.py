"""One recipe per rule, with the values that users give; regraft and mergekit read the same file.

The models lie in the folder `models` beside the recipe. `linear` averages all of them, the base too; `slerp` takes two
fine-tunes; all others merge the fine-tunes on the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
RULES = (
    "linear",
    "task_arithmetic",
    "slerp",
    "model_stock",
    "sce",
    "breadcrumbs",
    "dare_ties",
    "della",
    "ties",
    "pcb",
)


@dataclass(frozen=True)
class Case:
    """How a rule is used in the benchmark.

    `values` are the options for all models, `each` those given per model. `at_least` is how many fine-tunes it needs.
    `peer` is the rule of regraft that it is compared with where mergekit does not have it.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    takes: str = "base and fine-tunes"  # or "all alike", or "two fine-tunes"
    at_least: int = 1
    peer: str = ""


# Weights that add up to less than 1.5 are usual for three task vectors; the speed depends on none of these numbers.
CASES: dict[str, Case] = {
    "linear": Case(each={"weight": 1.0}, takes="all alike"),
    "task_arithmetic": Case(each={"weight": 0.4}, values={"lambda": 1.0}),
    "slerp": Case(values={"t": 0.5}, takes="two fine-tunes", at_least=2),
    "model_stock": Case(at_least=2),
    "sce": Case(values={"select_topk": 0.5}, at_least=2),
    "breadcrumbs": Case(each={"weight": 0.4, "density": 0.5, "gamma": 0.01}, values={"lambda": 1.0}),
    "dare_ties": Case(each={"weight": 0.4, "density": 0.5}, values={"lambda": 1.0, "normalize": True}),
    "della": Case(each={"weight": 0.4, "density": 0.5, "epsilon": 0.15}, values={"lambda": 1.0, "normalize": True}),
    "ties": Case(each={"weight": 0.4, "density": 0.5}, values={"lambda": 1.0, "normalize": True}),
    "pcb": Case(values={"lambda": 1.0}, peer="ties"),
}


@dataclass(frozen=True)
class Written:
    """A recipe's text, and the models that it reads."""

    text: str
    reads: tuple[str, ...]


def recipe_for(rule: str, names: Sequence[str], dtype: str) -> Written:
    """The recipe of a rule for the models `names`, of which the first is the base."""
    case = CASES[rule]
    base, tuned = names[0], tuple(names[1:])
    merged = {"all alike": tuple(names), "two fine-tunes": tuned[:2]}.get(case.takes, tuned)
    on = {"all alike": None, "two fine-tunes": merged[0]}.get(case.takes, base)
    reads = tuple(dict.fromkeys([*([on] if on else []), *merged]))
    if case.peer:
        step: dict[str, Any] = {"merge": rule, **({"base": on} if on else {}), "models": list(merged), **case.values}
        models = {name: _path(name) for name in reads}
        data: dict[str, Any] = {"models": models, "steps": {"merged": {**step, "dtype": DTYPE_NAMES[dtype]}}}
    else:
        of_each = {"parameters": dict(case.each)} if case.each else {}
        data = {
            "merge_method": rule,
            **({"base_model": _path(on)} if on else {}),
            "models": [{"model": _path(name), **of_each} for name in merged],
            **({"parameters": dict(case.values)} if case.values else {}),
            "dtype": DTYPE_NAMES[dtype],
        }
    return Written(yaml.safe_dump(data, sort_keys=False), reads)


def _path(name: str) -> str:
    return f"./models/{name}"  # two slashes: what mergekit takes for no model of the Hub, which it would look for
