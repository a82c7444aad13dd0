"""Claims at the size of their papers: the user's own models and data, merged by a recipe and scored by a metric.

A file of inputs names a base, its fine-tunes, and for each task data for choosing and data for the result:

    base: org/base
    experts: {maths: org/maths, code: org/code}
    metric: accuracy
    validation: {maths: data/maths-valid.jsonl, code: data/code-valid.jsonl}
    test: {maths: data/maths-test.jsonl, code: data/code-test.jsonl}

Each arm of a claim is a rule with a sweep. The recipe merges every member of every sweep, scores it on the validation
data of all tasks, and the best member of each arm, and it alone, is scored on the test data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regraft.checkpoint.json_file import malformed_field
from regraft.checkpoint.paths import cache_folder
from regraft.errors import UserError
from regraft.methods import method
from regraft.recipe.load import load_recipe
from regraft.recipe.run import Evaluation, run

_FIX = "regraft claims run --help says what is in the file of inputs"


class Inputs(BaseModel):
    """What a user gives for claims at paper scale. Paths are relative to the folder of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(description="the checkpoint that the experts come from")
    experts: dict[str, str] = Field(min_length=1, description="name of each task -> its fine-tune")
    metric: str = Field(description="a metric of recipes, of which more is better, such as accuracy")
    validation: dict[str, str] = Field(description="task -> data that options are chosen on")
    test: dict[str, str] = Field(description="task -> data that is looked at once")
    folder: Path = Field(Path(), exclude=True, description="where the file of inputs is")

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def key(self, arms: Mapping[str, Any]) -> str:
        """A name for what is computed from these inputs."""
        content = json.dumps([self.model_dump(mode="json"), str(self.folder), arms], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def read_inputs(path: Path) -> Inputs:
    """Read a file of inputs, YAML or JSON.

    Raises:
        UserError: RG903 if it is missing, malformed, or has an expert without data.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        inputs = Inputs(**{**content, "folder": path.parent.resolve()})
    except ValidationError as error:
        raise UserError("RG903", malformed_field(error), where=str(path), fix=_FIX) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError("RG903", f"the inputs cannot be read: {reason}", where=str(path), fix=_FIX) from None
    for kind in ("validation", "test"):
        if missing := set(inputs.experts) - set(getattr(inputs, kind)):
            raise UserError("RG903", f"{min(missing)!r} has no {kind} data", where=str(path), fix=_FIX)
    return inputs


def tuned_merges(seed: int, inputs: Inputs, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The mean test score over the tasks of each arm's best merge, of the base, and of each expert on its own task.

    Args:
        seed: for rules that draw.
        inputs: models and data.
        arms: name -> a merge step without `base` and `models`, with a sweep of equally many members for every arm.
    """
    folder = cache_folder("paper-scale") / f"{inputs.key(arms)}-{seed}"
    chosen = {}
    for name, arm in arms.items():
        scores = _scores(folder / name, inputs, {"merged": arm}, inputs.validation, seed)
        means = {model: _mean(found) for model, found in scores.items() if model.startswith("merged")}
        best = max(means, key=lambda model: means[model])
        options = best.partition("@")[2]
        picked = {key: value for key, value in arm.items() if key != "sweep"}
        for part in filter(None, options.split(",")):
            picked.update(yaml.safe_load(part.replace("=", ": ", 1)))
        chosen[name] = picked
    tested = _scores(folder / "test", inputs, chosen, inputs.test, seed)
    figures = {name: _mean(tested[name]) for name in [*chosen, "base"]}
    figures["expert"] = sum(tested[task][task] for task in inputs.experts) / len(inputs.experts)
    return figures


def _scores(
    folder: Path, inputs: Inputs, merges: Mapping[str, Mapping[str, Any]], data: Mapping[str, str], seed: int
) -> dict[str, dict[str, float]]:
    """Merge and score by a recipe: model -> task -> score."""
    models = {"base": inputs.base, **inputs.experts}
    absolute = {
        name: str(inputs.folder / ref) if (inputs.folder / ref).exists() else ref for name, ref in models.items()
    }
    steps: dict[str, Any] = {}
    for name, merge in merges.items():
        steps[name] = {**merge, "models": list(inputs.experts)}
        if method("merge", merge["merge"]).reads_base:
            steps[name]["base"] = "base"
    for task in inputs.experts:
        score = {"evaluate": inputs.metric, "models": [*merges, *models], "data": str(inputs.folder / data[task])}
        steps[f"score-{task}"] = score
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"seed": seed, "models": absolute, "steps": steps}, sort_keys=False), "utf-8")
    found: dict[str, dict[str, float]] = {}
    for one in run(load_recipe(recipe), folder / "run").evaluations:
        found.setdefault(one.model, {})[one.step.removeprefix("score-")] = _value(one)
    return found


def _value(one: Evaluation) -> float:
    return float(one.score["value"])


def _mean(scores: Mapping[str, float]) -> float:
    values: Sequence[float] = list(scores.values())
    return sum(values) / len(values)
