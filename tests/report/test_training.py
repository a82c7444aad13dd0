"""Training curves: what is a log and what is not, thinning, what is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.report.curves import Point, curves, thinned
from regraft.report.sections import Figure, Table
from regraft.report.training import Log, read_logs, recorded_logs, training_sections


def lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join(f"{json.dumps(e) if not isinstance(e, str) else e}\n" for e in entries), encoding="utf-8")
    return path


def test_a_trainer_state_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    import transformers as hf

    state = hf.TrainerState(
        log_history=[
            {"loss": 2.0, "learning_rate": 1e-3, "epoch": 0.5, "step": 10},
            {"eval_loss": 1.9, "eval_runtime": 3.0, "eval_samples_per_second": 9.0, "epoch": 1.0, "step": 20},
            {"loss": 1.5, "learning_rate": 5e-4, "epoch": 1.0, "step": 20},
            {"train_loss": 1.75, "train_runtime": 12.0, "total_flos": 1e9, "epoch": 1.0, "step": 20},
        ]
    )
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    (log,) = read_logs({"mine": tmp_path})
    assert log.metrics == {
        "loss": [Point(10, 2.0), Point(20, 1.5)],
        "learning_rate": [Point(10, 1e-3), Point(20, 5e-4)],
        "eval_loss": [Point(20, 1.9)],
    }


def test_of_several_checkpoints_the_last_counts(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"loss": 1.0, "step": step}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert read_logs({"run": tmp_path})[0].metrics["loss"] == [Point(100, 1.0)]


def test_lines_of_json_are_a_log_if_they_have_steps(tmp_path: Path) -> None:
    lines(tmp_path / "log.jsonl", {"step": 1, "loss": 3.0}, "", "{broken", {"step": 2, "loss": 2.0, "note": "x"})
    lines(tmp_path / "data.jsonl", {"text": "no log", "label": 1}, {"step": 1, "loss": 1.0})
    (log,) = read_logs({"mine": tmp_path})
    assert log.metrics == {"loss": [Point(1, 3.0), Point(2, 2.0)]}
    assert log.remarks == ["mine: 1 lines of log.jsonl are no entries of a log and were left out"]


def test_a_damaged_state_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text('{"log_history": [')
    (log,) = read_logs({"mine": tmp_path})
    assert log.metrics == {}
    assert log.remarks[0].startswith("mine: trainer_state.json cannot be used: line 1, column 18")


def test_the_record_of_a_trained_model_has_its_curve() -> None:
    history = [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": 1.0}]
    (log,) = recorded_logs({"a": {"training": {"history": history}}, "b": {}, "c": {"training": 3}})
    assert log == Log("a", {"loss": [Point(1, 2.0), Point(2, 1.0)]})


def test_training_and_evaluation_share_a_drawing_and_losses_come_first() -> None:
    two = [Point(1, 2.0), Point(2, 1.0)]
    log = Log("run", {"grad_norm": two, "loss": two, "eval_loss": two, "eval_accuracy": [Point(2, 0.5)]})
    parts = training_sections([log])
    assert [part.title for part in parts] == ["Training", "Training: loss", "Training: grad_norm"]
    assert isinstance(parts[0], Table)
    assert parts[0].rows == [["run", 2, 1.0, 1.0, 1.0, 0.5]]  # one point is no curve, and stands in the table
    loss = parts[1]
    assert isinstance(loss, Figure)
    assert "run, evaluation" in loss.drawing
    assert loss.values is not None
    assert len(loss.values.rows) == 4
    assert training_sections([Log("empty")]) == []


def test_many_trainings_are_drawn_in_groups_that_can_be_told_apart() -> None:
    logs = [Log(f"run {i}", {"loss": [Point(1, 2.0), Point(2, 1.0)]}) for i in range(10)]
    assert [part.title for part in training_sections(logs)[1:]] == ["Training: loss (1)", "Training: loss (2)"]
    with pytest.raises(ValueError, match="cannot be told apart"):
        curves({str(i): [] for i in range(9)}, title="t", x_title="x", y_title="y")


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    log = Log("run", {"loss": [Point(1, 2.0), Point(2, math.nan), Point(3, math.inf), Point(4, 1.0)]})
    figure = training_sections([log])[1]
    assert isinstance(figure, Figure)
    assert "2 values that are not finite are left out" in figure.caption
    assert "nan" not in figure.html().lower()
    assert "inf" not in figure.drawing.replace("infer", "")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000), st.integers(10, 300))
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    points = [Point(i, value) for i, value in enumerate(values)]
    kept = thinned(points, most)
    assert len(kept) <= most
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert min(p.y for p in kept) == min(values)
    assert max(p.y for p in kept) == max(values)
    assert [p.x for p in kept] == sorted(p.x for p in kept)
