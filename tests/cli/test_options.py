"""Sizes as people write them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
import typer

from regraft.cli import options
from regraft.cli.merge import merge
from regraft.cli.options import device, on_this_machine, settings, size
from regraft.cli.plan import plan
from regraft.cli.progress import count, duration
from regraft.cli.run import run
from regraft.cli.words import options_in_words, size_in_words
from regraft.recipe.settings import Settings


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1.5g", 15 * 10**8), (" 7 kB ", 7000), ("12", 12), ("2TiB", 2**41)],
)
def test_sizes(text: str, wanted: int) -> None:
    assert size(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "-1GB", "4XB", "GB", "1e9", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        size(text)


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(text: str) -> None:
    assert device(text) == text


@pytest.mark.parametrize("text", ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", " cuda", "meta"])
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        device(text)


@pytest.mark.parametrize(
    ("gpu", "wanted", "found"),
    [(False, "auto", "cpu"), (True, "auto", "cuda"), (True, "cpu", "cpu"), (False, "cuda:1", "cuda:1")],
)
def test_auto_is_the_gpu_if_there_is_one(gpu: bool, wanted: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert on_this_machine(settings(device=wanted, seed=3)) == settings(device=found, seed=3)


def test_merge_run_and_plan_have_the_same_switches_each_handed_on() -> None:
    """The signature of `settings` is the one list; a switch that were not handed on would be without effect."""
    switches = inspect.signature(options.settings).parameters
    for command in (merge, run, plan):
        assert set(switches) < set(inspect.signature(command).parameters)
        assert "settings" not in inspect.signature(command).parameters
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert {"shard_bytes" if name == "shard_size" else name for name in switches} == fields
    given: dict[str, Any] = {name: f"value of {name}" for name in switches}
    made = dataclasses.asdict(settings(**given))
    assert made == {name: given["shard_size" if name == "shard_bytes" else name] for name in fields}


def test_settings_take_the_names_of_the_options() -> None:
    made = settings(force=True, shard_size=5, seed=3)
    assert (made.force, made.shard_bytes, made.seed, made.workers) == (True, 5, 3, None)


def test_numbers_in_words() -> None:
    assert [count(n) for n in (7, 1234, 7.24e9)] == ["7", "1.23 k", "7.24 G"]
    assert [duration(s) for s in (3.21, 245, 7800)] == ["3.2 s", "4 min 05 s", "2 h 10 min"]
    assert [size_in_words(s) for s in (12, 1500, 14.5e9)] == ["12 bytes", "1.5 kB", "14.5 GB"]


def test_options_in_words_say_once_what_models_share() -> None:
    options = {"weight": [0.3, 0.7], "density": [0.2, 0.2], "normalize": True, "lambda": 1.0, "zone": [1, 2]}
    words = options_in_words(options, ["a", "b"], {"weight", "density"})
    assert words == "weight a=0.3 b=0.7, density 0.2, normalize yes, lambda 1, zone [1, 2]"
    assert options_in_words({"scale": [1.0, 0.5]}, ["a", "b", "c"], {"scale"}) == "scale 1 0.5"
