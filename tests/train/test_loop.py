"""The loop: what it computes, that a run that was stopped ends as one that was not, and what it refuses."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

import regraft
from models import model
from regraft.errors import UserError
from regraft.objectives.own_loss import OwnLoss
from regraft.train.batches import batches_for
from regraft.train.loop import steps_of, train
from regraft.train.objective import Objective, Sum
from regraft.train.options import TrainOptions
from regraft.train.order import Order, Stream, example_seed
from regraft.train.schedule import factor, parameter_groups
from tiny import save_tiny, texts


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model with dropout, so that what is drawn in a pass matters."""
    return save_tiny(tmp_path_factory.mktemp("models") / "bert", "bert", hidden_dropout_prob=0.1)


def run(folder: Path, bert: Path, *, data: Any = None, tell: Any = None, **changes: Any) -> tuple[Any, Any]:
    data = texts() if data is None else data
    whole = regraft.load(bert)
    collate = batches_for(whole, bert, next(iter(data))).collate
    values: dict[str, Any] = {
        "max_steps": 7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "logging_steps": 1, "save_steps": 2, "warmup_ratio": 0.2,
    }  # fmt: skip
    options = TrainOptions(**values | changes)
    return whole, train(whole, Sum(collate, [(1.0, OwnLoss())]), data, options, folder=folder, device="cpu", tell=tell)


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


def kill_at(step: int) -> Any:
    def tell(done: int, steps: int, figures: Mapping[str, float]) -> None:
        if done == step:
            raise Killed

    return tell


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5, "lr_scheduler_type": "linear"}], ids=["plain", "ema"])
def test_a_killed_run_ends_as_one_that_was_not(changes: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    whole, result = run(tmp_path / "a", bert, **changes)
    with pytest.raises(Killed):
        run(tmp_path / "b", bert, tell=kill_at(5), **changes)
    (tmp_path / "b" / "checkpoint-6").mkdir()  # as a process leaves it that dies while it writes
    again, resumed = run(tmp_path / "b", bert, **changes)
    assert (result.resumed_from, resumed.resumed_from) == (0, 4)
    assert same(whole, again)
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in result.history]
    assert len(result.history) == 7


def test_processes_that_prepare_examples_change_nothing(bert: Path, tmp_path: Path) -> None:
    one, _ = run(tmp_path / "a", bert, max_steps=3)
    two, _ = run(tmp_path / "b", bert, max_steps=3, dataloader_num_workers=2)
    assert same(one, two)


def test_activations_computed_again_change_nothing(bert: Path, tmp_path: Path) -> None:
    calm = save_tiny(tmp_path / "calm", "bert")
    one, _ = run(tmp_path / "a", calm, max_steps=2)
    two, _ = run(tmp_path / "b", calm, max_steps=2, gradient_checkpointing=True)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, two.state_dict()[name], atol=1e-6), name
    assert not any(getattr(m, "gradient_checkpointing", False) for m in two.modules())


def test_bfloat16_computes_and_leaves_float32(bert: Path, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    whole = regraft.load(bert)
    whole.bert.encoder.layer[0].output.dense.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    collate = batches_for(whole, bert, texts()[0]).collate
    options = TrainOptions(max_steps=1, bf16=True, per_device_train_batch_size=4)
    result = train(whole, Sum(collate, [(1.0, OwnLoss())]), texts(), options, folder=tmp_path, device="cpu")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert math.isfinite(result.history[0]["loss"])


def test_datasets_objects_are_data(bert: Path, tmp_path: Path) -> None:
    import datasets

    one, _ = run(tmp_path / "a", bert, max_steps=2)
    two, _ = run(tmp_path / "b", bert, max_steps=2, data=datasets.Dataset.from_list(texts()))
    assert same(one, two)


@pytest.mark.parametrize(
    ("package", "fix"), [("accelerate", r"regraft\[train\]"), ("tensorboard", "pip install tensorb")]
)
def test_packages_that_are_missing_are_named(
    package: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    options = TrainOptions(max_steps=1, tensorboard=package == "tensorboard")
    with pytest.raises(UserError, match=fix):
        train(model("bert"), Constant(1.0), [{"n": 0}], options, folder=tmp_path, device="cpu")


def test_a_stream_goes_on_where_it_was(bert: Path, tmp_path: Path) -> None:
    class Rows:
        def __iter__(self) -> Any:
            return iter(texts())

    whole, _ = run(tmp_path / "a", bert, data=Rows())
    with pytest.raises(Killed):
        run(tmp_path / "b", bert, data=Rows(), tell=kill_at(4))
    again, resumed = run(tmp_path / "b", bert, data=Rows())
    assert resumed.resumed_from == 2
    assert same(whole, again)


def test_other_options_or_data_begin_anew(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, bert, tell=kill_at(5))
    _, result = run(tmp_path, bert, learning_rate=2e-3)
    assert result.resumed_from == 0
    _, result = run(tmp_path, bert, learning_rate=2e-3)
    assert result.resumed_from == 7  # a run that was finished is not done again
    assert len(result.history) == 7


def test_ctrl_c_leaves_a_checkpoint_that_loads(bert: Path, tmp_path: Path) -> None:
    def interrupt(done: int, steps: int, figures: Mapping[str, float]) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"step 3 of 7 is kept in .*, and the same run goes on from there"):
        run(tmp_path / "a", bert, tell=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert type(regraft.load(tmp_path / "a" / "checkpoint-3")).__name__ == "BertForMaskedLM"
    again, result = run(tmp_path / "a", bert)
    assert result.resumed_from == 3
    assert same(again, run(tmp_path / "b", bert)[0])


def test_the_loop_is_the_loop_that_one_would_write(bert: Path, tmp_path: Path) -> None:
    """The same weights as a dozen lines of PyTorch, for what those lines have."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 4, "weight_decay": 0.1, "shuffle": False}
    whole, result = run(tmp_path, save_tiny(tmp_path / "calm", "bert"), **options)
    other = regraft.load(tmp_path / "calm").train()
    collate = batches_for(other, tmp_path / "calm", texts()[0]).collate
    matrices = [p for p in other.parameters() if p.ndim > 1]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-3)
    rows, at, losses = texts(), 0, []
    for step in range(4):
        rate = 1e-3 * ((step + 1) / 2 if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 3)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        total = 0.0
        for _ in range(2):
            numbers = range(at % 24, at % 24 + 4)
            batch = collate([rows[i] for i in numbers], [example_seed(0, at // 24, i) for i in numbers])
            loss = other(**batch).loss / 2
            loss.backward()
            total += float(loss)
            at += 4
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
    assert [h["loss"] for h in result.history] == pytest.approx(losses, rel=1e-5)
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name


def test_the_running_mean_is_what_is_left(bert: Path, tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []
    whole = regraft.load(bert)

    def keep(done: int, steps: int, figures: Mapping[str, float]) -> None:
        states.append({name: p.detach().clone() for name, p in whole.named_parameters()})

    collate = batches_for(whole, bert, texts()[0]).collate
    options = TrainOptions(max_steps=4, per_device_train_batch_size=4, ema=0.15, learning_rate=1e-3)
    train(whole, Sum(collate, [(1.0, OwnLoss())]), texts(), options, folder=tmp_path, device="cpu", tell=keep)
    name = "bert.encoder.layer.0.output.dense.weight"
    mean = states[0][name]
    for step, state in enumerate(states[1:], 2):
        decay = min(0.15, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * state[name]
    assert torch.allclose(dict(whole.named_parameters())[name], mean, atol=1e-7)
    assert not torch.equal(mean, states[-1][name])


@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(1, 3), st.integers(0, 4))
def test_processes_share_the_order_and_any_start_enters_it(
    length: int, batch: int, drop: bool, world: int, start: int
) -> None:
    drop = drop and length >= batch
    whole = list(Order(length, batch, 6 * world, 3, True, drop))
    parts = [list(Order(length, batch, 6 * world, 3, True, drop, rank=r, world=world)) for r in range(world)]
    assert [parts[i % world][i // world] for i in range(6 * world)] == whole
    late = list(Order(length, batch, 6 * world, 3, True, drop, world=world, start=start))
    assert late == parts[0][start:]
    epoch = [n for b in whole for e, n in b if e == 0]
    assert len(set(epoch)) == len(epoch)
    per_epoch = length // batch if drop else math.ceil(length / batch)
    if per_epoch <= len(whole):
        assert len(epoch) == (per_epoch * batch if drop else length)


def test_streams_are_dealt_in_turn() -> None:
    data = [{"n": i} for i in range(7)]
    taken = [Stream(data, 0, 2, rank=r, world=2) for r in range(2)]
    first = [[x["n"] for _, x in zip_first(s, 4)] for s in taken]
    assert first == [[0, 1, 4, 5], [2, 3, 6, 0]]
    assert [x["n"] for _, x in zip_first(Stream(data, 0, 2, rank=1, world=2, skip=1), 2)] == [6, 0]
    with pytest.raises(UserError, match="the stream holds no examples"):
        next(iter(Stream([], 0, 2)))


def zip_first(stream: Any, n: int) -> list[Any]:
    iterator = iter(stream)
    return [next(iterator) for _ in range(n)]


def test_schedules() -> None:
    assert [round(factor("linear", s, 6, warmup=2), 4) for s in range(7)] == [0.3333, 0.6667, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert factor("cosine", 4, 6, warmup=2, floor=0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert [factor("constant", s, 6) for s in range(6)] == [1.0] * 6
    cooled = [factor("constant_with_cooldown", s, 8, warmup=1, cooldown=4) for s in range(9)]
    assert cooled == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert factor("constant_with_cooldown", 8, 8, cooldown=4, floor=0.2) == pytest.approx(0.2)


def test_layer_wise_rates() -> None:
    whole = model("bert", num_hidden_layers=3)
    names = {id(p): name for name, p in whole.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in parameter_groups(whole, 1.0, 0.1, 0.5) for p in group["params"]}
    assert rates["cls.predictions.transform.dense.weight"] == 1.0
    assert [rates[f"bert.encoder.layer.{i}.output.dense.bias"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert rates["bert.embeddings.word_embeddings.weight"] == 0.0625
    decays = {
        names[id(p)]: group["weight_decay"] for group in parameter_groups(whole, 1.0, 0.1, 1.0) for p in group["params"]
    }
    assert decays["bert.encoder.layer.0.output.dense.weight"] == 0.1
    assert decays["bert.encoder.layer.0.output.dense.bias"] == 0
    assert len(rates) == len(names)
    with pytest.raises(UserError, match="no parameter to train"):
        parameter_groups(whole.requires_grad_(False), 1.0, 0.1, 1.0)


def test_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    options = TrainOptions(num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    stream = iter(())
    assert steps_of(options, range(22)) == 9
    assert steps_of(TrainOptions(max_steps=5), stream) == 5
    with pytest.raises(UserError, match="a stream has no length: give max_steps"):
        steps_of(TrainOptions(), stream)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert steps_of(options, range(22)) == 5


class Constant(Objective):
    """A loss that has nothing to do with the data: the contract alone, without terms."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.seen: list[tuple[int, ...]] = []

    def collate(self, examples: Any, seeds: Any) -> dict[str, Any]:
        self.seen.append(tuple(e["n"] for e in examples))
        return {"n": torch.tensor([e["n"] for e in examples])}

    def loss(self, whole: Any, batch: Any) -> Any:
        value = sum(p.square().mean() for p in whole.parameters()) * self.scale
        return value, {}


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    whole, objective = model("bert"), Constant(1.0)
    before = sum(float(p.square().mean()) for p in whole.parameters())
    options = TrainOptions(num_train_epochs=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1)
    result = train(whole, objective, [{"n": i} for i in range(5)], options, folder=tmp_path, device="cpu")
    assert result.steps == 6
    assert [len(batch) for batch in objective.seen] == [2, 2, 1, 2, 2, 1]
    assert sorted(n for batch in objective.seen[:3] for n in batch) == list(range(5))
    assert result.history[-1]["loss"] < result.history[0]["loss"] == pytest.approx(before, rel=1e-5)


def test_what_a_run_refuses(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is inf in step 1") as caught:
        train(model("bert"), Constant(float("inf")), [{"n": 0}], folder=tmp_path / "a", device="cpu")
    assert caught.value.code == "RG604"
    with pytest.raises(UserError, match="the data is empty"):
        train(model("bert"), Constant(1.0), [], folder=tmp_path / "b", device="cpu")
    options = TrainOptions(drop_last=True)
    with pytest.raises(UserError, match="3 examples do not fill a batch of 8"):
        train(model("bert"), Constant(1.0), [{"n": 0}] * 3, options, folder=tmp_path / "c", device="cpu")
    with pytest.raises(UserError, match="a Linear is no model of transformers"):
        train(torch.nn.Linear(2, 2), Constant(1.0), [{"n": 0}], folder=tmp_path / "d", device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the folder for checkpoints cannot be used"):
        train(model("bert"), Constant(1.0), [{"n": 0}], folder=tmp_path / "file", device="cpu")
    with pytest.raises(ValueError, match="more than the whole run"):
        TrainOptions(lr_scheduler_type="constant_with_cooldown", warmup_ratio=0.5, cooldown_ratio=0.6)


def test_the_configuration_is_left_as_it_was(tmp_path: Path) -> None:
    whole = model("gpt2")
    assert whole.config.use_cache is True
    train(whole, Constant(1.0), [{"n": 0}], TrainOptions(max_steps=1), folder=tmp_path, device="cpu")
    assert whole.config.use_cache is True
    assert not whole.training
    assert isinstance(whole, hf.GPT2LMHeadModel)
