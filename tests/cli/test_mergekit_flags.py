"""mergekit-yaml's switches: each is taken, and answered."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from regraft.cli.mergekit_flags import FLAGS, answered
from regraft.errors import UserError
from regraft.recipe.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "mergekit.md").read_text(encoding="utf-8")
NEEDLESS = [flag for flag in FLAGS if flag.needless]


def answer(settings: Settings | None = None, **given: Any) -> tuple[Settings, list[str]]:
    told: list[str] = []
    flags = {flag.name: given.pop(flag.name.replace("-", "_"), None) for flag in FLAGS}
    assert not given
    return answered(flags, settings or Settings(), told.append), told


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Settings()),
        ({"cuda": True}, Settings(device="cuda")),
        ({"cuda": False}, Settings()),
        ({"gpu_rich": True}, Settings(device="cuda")),
        ({"random_seed": 7}, Settings(seed=7)),
        ({"num_threads": 3}, Settings(workers=3)),
        ({"out_shard_size": "1.5B"}, Settings(shard_bytes=1_500_000_000)),
        ({"tensor_intersection": True}, Settings(tensors="common")),
        ({"tensor_union": True, "tensor_intersection": False}, Settings(tensors="any")),
        ({"out_shard_size": "200m"}, Settings(shard_bytes=200_000_000)),
    ],
)
def test_what_has_another_name_here(given: dict[str, Any], expected: Settings) -> None:
    assert answer(**given) == (expected, [])


def test_our_own_switches_win() -> None:
    own = Settings(device="cuda:1", seed=3, workers=2, tensors="any")
    assert answer(own, cuda=True, random_seed=7, num_threads=9, tensor_intersection=True) == (own, [])


def test_the_cache_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "before")
    answer(transformers_cache="/some/where")
    assert os.environ["HF_HUB_CACHE"] == "/some/where"


@pytest.mark.parametrize("flag", NEEDLESS, ids=[flag.name for flag in NEEDLESS])
def test_what_is_needless_is_said_to_be(flag: Any) -> None:
    value = {bool: True, str: "x", int: 1}[flag.takes]
    settings, told = answer(**{flag.name.replace("-", "_"): value})
    assert settings == Settings()
    assert told == [f"--{flag.name} is needless here: {flag.needless}"]


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ({"unsafe_truncate_embeddings": True}, "RG309", "without looking at their tokens"),
        ({"safe_serialization": False}, "RG309", "pickles"),
        ({"random_seed": -1}, "RG303", "--random-seed is -1"),
        ({"num_threads": 0}, "RG303", "--num-threads is 0"),
        ({"tensor_union": True, "tensor_intersection": True}, "RG303", "say two things"),
        ({"out_shard_size": "many"}, "RG303", "'many'"),
        ({"out_shard_size": "0"}, "RG303", "'0'"),
    ],
)
def test_mistakes(given: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        answer(**given)
    assert caught.value.code == code
    assert says in str(caught.value)


def test_the_page_names_each_switch() -> None:
    table = PAGE.partition("## Switches")[2].partition("\n## ")[0]
    assert set(re.findall(r"`--([a-z-]+)", table)) >= {flag.name for flag in FLAGS}


def test_they_are_taken_on_the_command_line(cli: Any, tmp_path: Path) -> None:
    done = cli(
        "merge", "/no/such.yaml", tmp_path / "out", "--lazy-unpickle", "--no-clone-tensors", "--write-threads", 4
    )
    assert done.exit_code == 2
    assert "--lazy-unpickle is needless here: weights are always read in slices" in done.stderr
    assert "RG306" in done.stderr
