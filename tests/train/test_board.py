"""What TensorBoard reads of a run: each figure of the log, once, whatever has interrupted the run."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import regraft
from regraft.cli.main import app
from regraft.objectives.own_loss import OwnLoss
from regraft.train.batches import batches_for
from regraft.train.loop import train
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions
from tiny import pictures, save_tiny, texts, write_rows

accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)

Curves = dict[str, list[tuple[int, float]]]


def read(folder: Path) -> Curves:
    """Tag -> (step, value) of each point, as TensorBoard reads a folder of event files."""
    found = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def curves(history: Iterable[Mapping[str, float]]) -> Curves:
    """The same of the log that a run returns."""
    found: Curves = {}
    for entry in history:
        for name in entry.keys() - {"step"}:
            found.setdefault(f"train/{name}", []).append((int(entry["step"]), entry[name]))
    return found


def check(found: Curves, expected: Curves) -> None:
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        assert [v for _, v in found[tag]] == pytest.approx([v for _, v in points], rel=1e-6), tag


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "bert", "bert")


class Killed(Exception):
    pass


def run(folder: Path, bert: Path, kill_at: int | None = None, **changes: Any) -> Any:
    def tell(done: int, steps: int, figures: Mapping[str, float]) -> None:
        if done == kill_at:
            raise Killed

    model = regraft.load(bert)
    values: dict[str, Any] = {
        "max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 3,
        "warmup_ratio": 0.2, "tensorboard": True,
    }  # fmt: skip
    objective = Sum(batches_for(model, bert, texts()[0]).collate, [(1.0, OwnLoss())])
    return train(
        model, objective, texts(), TrainOptions(**values | changes), folder=folder, device="cpu", tell=tell
    ).history


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_is_the_log_it_returns(every: int, bert: Path, tmp_path: Path) -> None:
    history = run(tmp_path, bert, logging_steps=every)
    found = read(tmp_path / "runs")
    check(found, curves(history))
    assert [step for step, _ in found["train/loss"]] == ([1, 2, 3, 4, 5, 6, 7] if every == 1 else [1, 3, 6])
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/own"} == found.keys()


@pytest.mark.parametrize(("kill_at", "files"), [(6, 2), (2, 1)], ids=["behind a checkpoint", "before the first"])
def test_a_run_that_was_killed_is_one_curve_without_steps_twice(
    kill_at: int, files: int, bert: Path, tmp_path: Path
) -> None:
    whole = run(tmp_path / "a", bert)
    with pytest.raises(Killed):
        run(tmp_path / "b", bert, kill_at=kill_at)
    assert [step for step, _ in read(tmp_path / "b" / "runs")["train/loss"]] == list(range(1, kill_at))
    run(tmp_path / "b", bert)
    assert len(list((tmp_path / "b" / "runs").iterdir())) == files
    check(read(tmp_path / "b" / "runs"), curves(whole))


def test_another_run_into_the_folder_begins_anew(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, bert, kill_at=6)
    other = run(tmp_path, bert, learning_rate=2e-3, max_steps=2)
    check(read(tmp_path / "runs"), curves(other))


def test_without_the_option_nothing_is_written(bert: Path, tmp_path: Path) -> None:
    run(tmp_path, bert, tensorboard=False, max_steps=1)
    assert not (tmp_path / "runs").exists()


def test_each_term_of_a_recipe_s_training_is_a_curve_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("t", 0), ("s", 1)):
        save_tiny(tmp_path / name, "vit", seed)
    write_rows(tmp_path / "data.jsonl", pictures(16))
    (tmp_path / "recipe.yaml").write_text(
        "models: {t: ./t, s: ./s}\n"
        "steps:\n"
        "  taught: {train: distil, model: s, teacher: t, data: data.jsonl, logit_weight: 1.0, feature_weight: 0.1,\n"
        "           task_weight: 1.0, max_steps: 3, logging_steps: 1, per_device_train_batch_size: 4,\n"
        "           tensorboard: true}\n"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "--out", "out"])
    assert result.exit_code == 0, result.output
    model = tmp_path / "out" / "taught"
    history = json.loads((model / "regraft.json").read_text())["diagnostics"]["training"]["history"]
    found = read(model / "runs")
    check(found, curves(history))
    assert {"train/logits", "train/features", "train/own"} <= found.keys()
    (file,) = (model / "runs").iterdir()
    assert socket.gethostname() not in file.name  # which is published with the model
    assert regraft.load(model).config.model_type == "vit"


def test_each_of_several_trainings_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("t", 0), ("s", 1)):
        save_tiny(tmp_path / name, "vit", seed)
    write_rows(tmp_path / "data.jsonl", pictures(16))
    write_rows(tmp_path / "pool.jsonl", pictures(32)[16:])
    (tmp_path / "recipe.yaml").write_text(
        "models: {t: ./t, s: ./s}\n"
        "steps:\n"
        "  taught: {train: ssld, model: s, teacher: t, data: data.jsonl, unlabelled: pool.jsonl, per_class: 16,\n"
        "           max_steps: 3, finish_num_train_epochs: 1, logging_steps: 1, per_device_train_batch_size: 8,\n"
        "           tensorboard: true}\n"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", "recipe.yaml", "--out", "out"])
    assert result.exit_code == 0, result.output
    runs = tmp_path / "out" / "taught" / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["long", "short"]
    assert [[step for step, _ in read(runs / name)["train/logits"]] for name in ("long", "short")] == [
        [1, 2, 3],
        [1, 2],
    ]
