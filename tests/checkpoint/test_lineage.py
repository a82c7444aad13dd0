"""regraft.json: it comes back as it was written, names no machine, and damage is one sentence."""

from __future__ import annotations

import getpass
import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from regraft.checkpoint.lineage import (
    InputRecord,
    Lineage,
    Output,
    Score,
    fold_names,
    group_options,
    peak_memory,
    unfold_names,
)
from regraft.checkpoint.model import open_checkpoint
from regraft.errors import UserError


def full(tmp_path: Path) -> Lineage:
    model = open_checkpoint(str(models.save_model(tmp_path / "base", "llama")))
    lineage = Lineage(
        step="merged",
        method="ties",
        recipe="merge: ties\n",
        key="abc",
        inputs=[InputRecord.of(model, "base", role="base", digest=model.full_digest(), digest_kind="content")],
        settings={"density": 0.2},
        options=group_options({name: {"density": 0.2} for name in model.tensors}),
        copied=["x"],
        seeds={"merged": 0},
        sources={"tokenizer": "base"},
        output=Output(tensors=1, parameters=2, bytes=8, dtype="float32"),
        warnings=["a remark"],
        diagnostics={"sign_conflict_rate": 0.25, "bad": math.nan},
        scores=[Score(metric="accuracy", data="test.parquet", before={"base": 0.5}, after=0.75)],
    )
    lineage.finish()
    return lineage


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lineage = full(tmp_path)
    path = lineage.write(tmp_path)
    text = path.read_text()
    assert path.name == "regraft.json"
    assert json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))["schema"] == 1
    read = Lineage.read(tmp_path)
    read.write(tmp_path)
    assert path.read_text() == text
    assert read.inputs[0].parameters == sum(p.numel() for p in models.model("llama").parameters())
    assert read.scores == lineage.scores
    assert read.surgeries == []


def test_times_and_memory_are_measured(tmp_path: Path) -> None:
    lineage = full(tmp_path)
    assert lineage.wall_seconds is not None
    assert lineage.wall_seconds >= 0
    assert lineage.started <= lineage.finished
    assert lineage.started.endswith("+00:00")
    assert lineage.peak_memory_bytes == peak_memory()
    assert 10**7 < peak_memory() < 10**12
    assert lineage.hardware.memory_bytes > 10**8
    assert lineage.software.torch[0].isdigit()


def test_neither_host_nor_user_nor_resolved_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save_model(tmp_path / "base", "llama")
    monkeypatch.chdir(tmp_path)
    text = Lineage(inputs=[InputRecord.of(open_checkpoint("./base"), "base")]).model_dump_json()
    assert '"./base"' in text
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    values = str(json.loads(text))
    for word in (platform.node(), getpass.getuser()):
        assert f"'{word}'" not in values


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": None}, "schema None"),
        ({"inputs": [{"name": 3, "ref": "x"}]}, "inputs.0.name is malformed"),
        ({"options": {}}, "options is malformed"),
    ],
)
def test_malformed_lineage(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = full(tmp_path).write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=says) as caught:
        Lineage.read(tmp_path)
    assert caught.value.code == "RG105"


@pytest.mark.parametrize("text", [None, "", "[]", '{"schema": 1'])
def test_unreadable_lineage(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "regraft.json").write_text(text)
    with pytest.raises(UserError) as caught:
        Lineage.read(tmp_path)
    assert caught.value.code == "RG105"


def test_facts_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    path = full(tmp_path).write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"carbon": 1}))
    assert Lineage.read(tmp_path).method == "ties"


def test_options_are_grouped_and_folded() -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("q", "k")]
    per_tensor: dict[str, dict[str, Any]] = {name: {"weight": [0.5, 0.5]} for name in names}
    per_tensor["model.layers.2.q.weight"] = {"weight": [1.0, 0.0]}
    per_tensor["norm"] = {"weight": [1.0, 0.0]}
    large, small = group_options(per_tensor)
    assert (large.count, large.tensors) == (7, ["model.layers.{0-1,3}.q.weight", "model.layers.{0-3}.k.weight"])
    assert (small.count, small.tensors) == (2, ["model.layers.2.q.weight", "norm"])
    assert small.options == {"weight": [1.0, 0.0]}


_PART = st.text("abq_", min_size=1, max_size=2) | st.integers(0, 12).map(str) | st.just("01")


@given(st.lists(st.lists(_PART, min_size=1, max_size=5).map(".".join), unique=True, max_size=40))
def test_folding_loses_no_name(names: list[str]) -> None:
    folded = fold_names(names)
    assert sorted(unfold_names(folded)) == sorted(names)
    assert len(folded) <= len(names)
