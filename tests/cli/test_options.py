"""Sizes as people write them."""

from __future__ import annotations

import pytest
import typer

from regraft.cli.options import settings, size
from regraft.cli.progress import count, duration
from regraft.cli.words import options_in_words, size_in_words


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
