"""Merges that compiled loops serve from end to end: the command line does them without torch, to the same bits."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

from models import save_fine_tune, save_model
from regraft.cli.lean import import_later
from regraft.merge.rule import Rule
from regraft.methods import methods
from regraft.recipe import load_recipe
from regraft.recipe.run import merge
from regraft.recipe.settings import Settings

RULES = {rule.name: rule for rule in methods("merge") if isinstance(rule, Rule)}


def count(rule: Rule) -> int:
    return min(2, rule.max_models or 2)


COMPILED = [rule for rule in RULES.values() if rule.compiled(rule.resolve(count(rule), {}))]
# Rules by name with options, one recipe each: all that do without torch by their defaults, and by branches of them.
CASES = [
    *({"merge": rule.name} for rule in COMPILED),
    {"merge": "linear", "weight": [0.3, 0.3], "normalize": False},
    {"merge": "linear", "weight": [1, 0]},
    {"merge": "task_arithmetic", "weight": [1.0, 0.5]},
    {"merge": "task_arithmetic", "weight": 0.4, "normalize": True},
    {"merge": "slerp", "t": 0.3, "exclude": [".*norm.*"]},
    {"merge": "ties", "trim_scope": "tensor", "rescale": True},
    {"merge": "dare_linear", "rescale": "l1"},
    {"merge": "della", "rescale": "l1"},
    {"merge": "breadcrumbs", "rescale": True},
    {"merge": "sce", "select_topk": 0.3},
    {"merge": "sce", "select_topk": 0.0},
    {"merge": "nuslerp", "nuslerp_flatten": True},
    {"merge": "ties", "out_dtype": "float32"},
]

CHILD = """
import sys
from pathlib import Path
from regraft.cli.lean import import_later
import_later("torch")
from regraft.cli.main import main
for recipe in sys.argv[1:]:
    sys.argv = ["regraft", "run", recipe, "--out", recipe.removesuffix(".yaml")]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (recipe, end.code)
    if "torch._C" in sys.modules:
        print("torch was imported for", Path(recipe).read_text())
        break
"""


def test_no_rule_that_does_without_torch_needs_it(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    tuned = [save_fine_tune(tmp_path / f"tuned-{seed}", base, seed) for seed in (1, 2)]
    assert {rule.name for rule in COMPILED} >= {
        "linear",
        "task_arithmetic",
        "slerp",
        "ties",
        "dare_ties",
        "della",
        "sce",
    }
    recipes = []
    for number, case in enumerate(CASES):
        rule = RULES[case["merge"]]
        step = {"models": ["tuned-1", "tuned-2"][: count(rule)], **case} | ({"base": "base"} if rule.reads_base else {})
        models = {"base": str(base), **{f"tuned-{i}": str(path) for i, path in enumerate(tuned, 1)}}
        used = {name: path for name, path in models.items() if name in (step.get("base"), *step["models"])}
        recipes.append(tmp_path / f"{number}.yaml")
        recipes[-1].write_text(yaml.safe_dump({"models": used, "steps": {"merged": step}}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, recipes)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch was imported" not in done.stdout
    for recipe in recipes:
        again = merge(load_recipe(recipe), recipe.with_suffix(".again"), Settings())
        bits = [(folder / "model.safetensors").read_bytes() for folder in (recipe.with_suffix("") / "merged", again)]
        assert bits[0] == bits[1], recipe.read_text(encoding="utf-8")


def test_a_module_is_imported_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text(
        "import time\nfirst = 1\ntime.sleep(0.3)\nruns = globals().get('runs', 0) + 1\nlast = first + 1\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import_later("slow_to_import")
    module = sys.modules["slow_to_import"]
    import slow_to_import  # type: ignore[import-not-found]

    assert slow_to_import is module
    assert module.__spec__ is not None
    assert module.__file__ == str(tmp_path / "slow_to_import.py")
    assert "first" not in vars(module)
    seen: list[tuple[int, int]] = []
    threads = [threading.Thread(target=lambda: seen.append((module.first, module.last))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(1, 2)] * 4
    assert module.runs == 1
    module.first = 5
    assert module.first == 5
    del sys.modules["slow_to_import"]


def test_a_module_that_fails_says_so_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("raise ImportError('not today')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_later("broken_module")
    import_later("no_module_of_this_name")
    assert "no_module_of_this_name" not in sys.modules
    for _ in range(2):
        with pytest.raises(ImportError, match="not today"):
            sys.modules["broken_module"].anything  # noqa: B018
    del sys.modules["broken_module"]
