"""The zoo: entries are made once per content, must be better than their baseline, and load as ordinary checkpoints."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from safetensors.torch import load_file

from regraft.claims.zoo import NotGoodEnoughError, Quality, models_used

ROOT = Path(__file__).parents[2]
ENTRY = """
import torch
from safetensors.torch import save_file
from regraft.claims.zoo import Quality, entry

@entry(data="numbers")
def little(folder, *, seed, scale, value=0.9):
    save_file({"weight": torch.full((2, 3), float(seed))}, folder / "model.safetensors")
    with open(LOG, "a") as log:
        log.write("made\\n")
    return Quality("accuracy", value, 0.5, "guessing", 0.1)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    return loaded(tmp_path, ENTRY)


def loaded(folder: Path, code: str) -> ModuleType:
    path = folder / "entries.py"
    path.write_text(code.replace("LOG", repr(str(folder / "log"))))
    spec = importlib.util.spec_from_file_location("entries", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["entries"] = made
    spec.loader.exec_module(made)
    return made


def count(folder: Path) -> int:
    return (folder / "log").read_text().count("made")


def test_an_entry_is_made_once_and_says_what_it_is(module: ModuleType, tmp_path: Path) -> None:
    first = module.little(seed=1, scale="laptop")
    assert first == module.little(seed=1, scale="laptop")
    assert count(tmp_path) == 1
    assert first.is_relative_to(tmp_path / "cache" / "zoo")
    record = json.loads((first / "zoo.json").read_text())
    assert record["name"] == "little"
    assert record["data"] == "numbers"
    assert record["options"] == {"seed": 1, "scale": "laptop", "value": 0.9}
    assert record["parameters"] == 6
    assert record["seconds"] >= 0
    assert record["quality"]["baseline"] == 0.5
    assert module.little(seed=2, scale="laptop") != first
    assert count(tmp_path) == 2


def test_the_cache_is_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from regraft.checkpoint.paths import cache_folder

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REGRAFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("zoo") == tmp_path / "home" / ".cache" / "regraft" / "zoo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("zoo") == tmp_path / "xdg" / "regraft" / "zoo"
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "own"))
    assert cache_folder("zoo") == tmp_path / "own" / "zoo"
    monkeypatch.setenv("REGRAFT_CACHE", "relative")
    assert cache_folder("zoo") == tmp_path / "xdg" / "regraft" / "zoo"


def test_another_state_of_the_code_makes_another_model(module: ModuleType, tmp_path: Path) -> None:
    first = module.little(seed=1, scale="laptop")
    assert loaded(tmp_path, ENTRY + "# changed\n").little(seed=1, scale="laptop") != first


def test_a_model_below_its_baseline_is_refused_and_not_kept(module: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(NotGoodEnoughError, match=r"guessing has 0\.5"):
        module.little(seed=1, scale="laptop", value=0.55)
    assert list((tmp_path / "cache" / "zoo").iterdir()) == []
    assert module.little(seed=1, scale="smoke", value=0.55).exists()  # nothing is trained there


def test_less_is_better_for_losses() -> None:
    assert Quality("loss", 1.0, 1.2, "trigrams", 0.1, higher_is_better=False).enough
    assert not Quality("loss", 1.15, 1.2, "trigrams", 0.1, higher_is_better=False).enough
    assert not Quality("accuracy", 0.5, 0.5, "chance", 0.1).enough


def test_models_used_are_collected(module: ModuleType) -> None:
    module.little(seed=1, scale="laptop")
    with models_used() as models:
        module.little(seed=2, scale="laptop")
        module.little(seed=2, scale="laptop")
    assert [model["options"]["seed"] for model in models] == [2]


def entries() -> dict:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from claims.zoo import ENTRIES

    return ENTRIES


@pytest.mark.parametrize("name", sorted(entries()))
def test_every_entry_loads_with_from_pretrained(name: str) -> None:
    make, kind, arguments = entries()[name]
    path = make(seed=0, scale="smoke", **arguments)
    model = getattr(transformers, kind).from_pretrained(path)
    stored = load_file(path / "model.safetensors")
    state = model.state_dict()
    assert all(state[key].equal(value) for key, value in stored.items() if key in state)
    record = json.loads((path / "zoo.json").read_text())
    assert record["parameters"] > 0
    assert record["quality"]["metric"]


def test_the_zoo_has_no_entry_that_is_not_listed() -> None:
    from claims import languages, text, vision, zoo

    made = {
        name
        for module in (languages, text, vision, zoo)
        for name, value in vars(module).items()
        if hasattr(value, "__wrapped__")
        and getattr(value, "__module__", "") == module.__name__
        and "folder" in value.__wrapped__.__annotations__
        and "scale" in value.__wrapped__.__annotations__
        and value.__wrapped__.__annotations__["return"] == "Quality"
    }
    assert made == set(entries())
