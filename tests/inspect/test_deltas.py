"""What fine-tuning changed: figures against plain torch, robustness of the base check, advice in words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import models
from regraft.checkpoint import BLOCK, Checkpoint, MemoryTensor, open_checkpoint
from regraft.errors import UserError
from regraft.inspect.advice import layer_swap, sparsification
from regraft.inspect.deltas import QUANTILES, check_base, deltas, rank_bases, relative_distance


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, list[Checkpoint]]:
    folder = tmp_path_factory.mktemp("deltas")
    base = models.save_model(folder / "base", "llama")
    tuned = [models.save_fine_tune(folder / name, base, seed) for name, seed in (("a", 1), ("b", 2))]
    return open_checkpoint(str(base)), [open_checkpoint(str(t)) for t in tuned]


def in_memory(tensors: dict[str, torch.Tensor], **config: Any) -> Checkpoint:
    sources = {name: MemoryTensor(name, tensor) for name, tensor in tensors.items()}
    return Checkpoint("memory", Path(), sources, config=config)


def vector(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.cat([t.read().to(torch.float64) for t in checkpoint.tensors.values()])


def test_totals_are_those_of_plain_torch(family: tuple[Checkpoint, list[Checkpoint]]) -> None:
    base, tuned = family
    found = deltas(base, tuned).total
    theta = vector(base)
    d = torch.stack([vector(t).float() - theta.float() for t in tuned]).double()
    assert found.elements == theta.numel()
    assert found.base_norm == pytest.approx(float(theta.norm()))
    for i in range(2):
        assert found.norms[i] == pytest.approx(float(d[i].norm()))
        assert found.relative[i] == pytest.approx(float(d[i].norm() / theta.norm()))
        assert found.mean_abs[i] == pytest.approx(float(d[i].abs().mean()))
        assert found.unchanged[i] == pytest.approx(float((d[i] == 0).double().mean()))
        assert found.base_cosine[i] == pytest.approx(float(torch.cosine_similarity(theta, theta + d[i], 0)), abs=1e-9)
        ordered = d[i].abs().sort().values
        for q in QUANTILES:
            exact = float(ordered[max(int(-(-q * len(ordered) // 1)) - 1, 0)])
            assert found.quantiles[i][q] == pytest.approx(exact, rel=0.01)
    assert found.cosine[0][1] == pytest.approx(float(torch.cosine_similarity(d[0], d[1], 0)))
    assert found.cosine[0][0] == pytest.approx(1.0)
    moved, both = (d != 0).any(0), (d != 0).all(0)
    against = (d[0] * d[1]) < 0
    assert found.sign_conflict == pytest.approx(float(against.sum() / moved.sum()))
    assert found.pair_conflict[0][1] == pytest.approx(float(against.sum() / both.sum()))


def test_layers_and_parts_add_up_to_the_whole(family: tuple[Checkpoint, list[Checkpoint]]) -> None:
    base, tuned = family
    found = deltas(base, tuned)
    assert [len(layers) for layers in found.layers.values()] == [2]
    outside = [m for name, m in found.tensors.items() if ".layers." not in name]
    for i in range(2):
        squares = sum(m.norms[i] ** 2 for m in [*found.layers[""], *outside])
        assert squares**0.5 == pytest.approx(found.total.norms[i])
    assert sum(m.elements for m in [*found.layers[""], *outside]) == found.total.elements
    assert [sorted(layer) for layer in found.parts[""]] == [["attention", "ffn", "norm"]] * 2
    one = found.parts[""][1]["attention"][0]
    names = [n for n in found.tensors if n.startswith("model.layers.1.self_attn")]
    total = sum(found.tensors[n].mean_abs[0] * found.tensors[n].elements for n in names)
    assert one == pytest.approx(total / sum(found.tensors[n].elements for n in names))


def test_workers_do_not_change_a_digit_and_progress_ends_at_the_total(
    family: tuple[Checkpoint, list[Checkpoint]],
) -> None:
    base, tuned = family
    seen: list[tuple[int, int]] = []
    one = deltas(base, tuned, workers=1, on_progress=lambda done, total: seen.append((done, total)))
    assert one.to_dict() == deltas(base, tuned, workers=4).to_dict()
    assert seen[-1][0] == seen[-1][1] == base.parameters
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_tensors_larger_than_a_slice() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(11, BLOCK, generator=generator)
    model = base + 0.01 * torch.randn(base.shape, generator=generator)
    found = deltas(in_memory({"w": base}), [in_memory({"w": model})]).total
    assert found.norms[0] == pytest.approx(float((model - base).double().norm()), rel=1e-6)
    assert found.quantiles[0][1.0] == pytest.approx(float((model - base).abs().max()), rel=0.01)
    assert found.quantiles[0][0.5] == pytest.approx(0.01 * 0.6745, rel=0.02)


def test_a_model_with_more_rows_and_one_without_the_prefix(tmp_path: Path) -> None:
    base = models.save_model(tmp_path / "base", "bert")
    tensors = load_file(base / "model.safetensors")
    bare = {n.removeprefix("bert."): t * 1.01 for n, t in tensors.items() if n.startswith("bert.")}
    rows = bare["embeddings.word_embeddings.weight"]
    bare["embeddings.word_embeddings.weight"] = torch.cat([rows, torch.ones(2, 32)])
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_text((base / "config.json").read_text())
    found = deltas(open_checkpoint(str(base)), [open_checkpoint(str(tmp_path / "bare"))])
    assert found.tensors["bert.embeddings.word_embeddings.weight"].relative[0] == pytest.approx(0.01, rel=1e-3)
    assert any("96 and 98 rows: the first 96 count" in remark for remark in found.remarks)
    assert any("cls.predictions.bias is not in" in remark for remark in found.remarks)


def test_values_that_are_not_finite_are_none_and_said(tmp_path: Path) -> None:
    base = torch.ones(4, 32)
    broken = base.clone()
    broken[0, 0] = torch.nan
    found = deltas(in_memory({"w": base, "v": base}), [in_memory({"w": broken, "v": base * 2})])
    assert found.total.norms == [None]
    assert found.tensors["v"].relative == [1.0]
    assert found.remarks == ["w: not every value is finite"]
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert "not every change is finite" in text


def test_nothing_to_compare_is_an_error(family: tuple[Checkpoint, list[Checkpoint]]) -> None:
    base, _ = family
    with pytest.raises(UserError) as error:
        deltas(base, [in_memory({"other": torch.ones(2, 2)})])
    assert error.value.code == "RG202"
    with pytest.raises(UserError) as error:
        deltas(base, [])
    assert error.value.code == "RG305"


def digits_vit(model: Any, images: torch.Tensor, labels: torch.Tensor, rate: float, steps: int, seed: int) -> Any:
    model = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        batch = torch.randint(0, len(images), (64,), generator=generator)
        model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def test_training_from_another_start_is_told_from_fine_tuning_even_at_absurd_learning_rates() -> None:
    """The experiment behind the thresholds, shortened: real digits, real training."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    images, labels = torch.tensor(x / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    start, other = models.model("vit", 0), models.model("vit", 1)

    def checkpoint(model: Any) -> Checkpoint:
        return in_memory(model.state_dict(), model_type="vit")

    base = digits_vit(start, images, labels, 1e-3, 100, 0)
    rotated = torch.rot90(images, 1, (2, 3))
    usual = digits_vit(base, rotated, labels, 3e-4, 40, 1)
    absurd = digits_vit(base, rotated, labels, 1e-2, 40, 1)
    stranger = digits_vit(other, images, labels, 1e-3, 100, 0)
    found = {n: relative_distance(checkpoint(base), checkpoint(m)) for n, m in locals().items() if n in NAMES}
    assert found["usual"].verdict in ("fine-tune", "far")
    assert found["usual"].cosine > 0.9
    assert found["absurd"].verdict == "far"
    assert found["absurd"].cosine > 0.3
    assert found["stranger"].verdict == "unrelated"
    assert abs(found["stranger"].cosine) < 0.05
    assert check_base(checkpoint(base), checkpoint(absurd)) == ""
    assert "unrelated" in check_base(checkpoint(base), checkpoint(stranger))
    ranked = rank_bases(checkpoint(usual), [checkpoint(stranger), checkpoint(start), checkpoint(base)])
    assert [d.cosine for _, d in ranked] == sorted((d.cosine for _, d in ranked), reverse=True)
    assert len(ranked) == 2


NAMES = ("usual", "absurd", "stranger")


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_tells_a_fine_tune_from_a_stranger(name: str) -> None:
    def checkpoint(model: Any) -> Checkpoint:
        return in_memory(model.state_dict(), **model.config.to_dict())

    base = models.model(name)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * parameter.abs().mean() * torch.randn_like(parameter)
    assert relative_distance(checkpoint(base), checkpoint(base)).verdict == "identical"
    assert relative_distance(checkpoint(base), checkpoint(tuned)).verdict == "fine-tune"
    stranger = relative_distance(checkpoint(base), checkpoint(models.model(name, seed=5)))
    assert stranger.verdict == "unrelated"
    assert stranger.relative == pytest.approx(2**0.5, abs=0.05)


def test_the_sample_is_bounded_and_always_the_same() -> None:
    class Counting(MemoryTensor):
        read_elements = 0

        def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
            found = super().read(start, stop)
            Counting.read_elements += found.numel()
            return found

    big = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    tensors = {f"layers.{i}.w": Counting(f"layers.{i}.w", big) for i in range(2)}
    one = Checkpoint("one", Path(), tensors)
    first = relative_distance(one, in_memory(dict.fromkeys(tensors, big * 1.1)), sample=1000)
    assert Counting.read_elements == 2000
    assert first == relative_distance(one, in_memory(dict.fromkeys(tensors, big * 1.1)), sample=1000)
    assert first.relative == pytest.approx(0.1, rel=1e-4)
    assert first.cosine == pytest.approx(1.0)


def test_models_without_a_common_matrix_are_unknown_and_no_reason_to_refuse() -> None:
    a, b = in_memory({"w": torch.ones(8, 8)}), in_memory({"v": torch.ones(8, 8)})
    assert relative_distance(a, b).verdict == "unknown"
    assert relative_distance(a, in_memory({"w": torch.ones(8, 9)})).skipped == 1
    assert check_base(a, b) == ""
    assert relative_distance(a, in_memory({"w": torch.zeros(8, 8)})).verdict == "unknown"


@pytest.mark.parametrize(
    ("scale", "unchanged", "words"),
    [
        (0.0005, 0.0, "is expected to work"),
        (0.004, 0.0, "try DARE at low drop rates"),
        (0.5, 0.0, "95 % of the changes exceed"),
        (0.5, 0.0, "not expected to work"),
        (0.0005, 0.7, "70% of the entries did not change"),
        (0.0, 1.0, "this model is its base"),
        (float("nan"), 0.0, "not every change is finite"),
    ],
)
def test_the_rule_of_thumb_for_dropping_changes(scale: float, unchanged: float, words: str) -> None:
    normal = {0.05: 0.0627, 0.5: 0.674, 0.9: 1.645, 0.95: 1.96, 0.99: 2.576, 1.0: 4.5}
    assert words in sparsification({q: scale * z for q, z in normal.items()}, unchanged)


def test_layers_to_swap_are_the_outer_ones_where_the_language_changed_more() -> None:
    maths = [1.0, 1.0, 3.0, 4.0, 3.0, 1.0]
    swahili = [9.0, 8.0, 2.0, 1.0, 2.0, 6.0]
    assert layer_swap(maths, swahili) == (2, 1)
    assert layer_swap(maths, [10 * x for x in swahili]) == (2, 1)
    assert layer_swap(swahili, maths) == (0, 0)
    assert layer_swap(maths, maths) == (0, 0)
    assert layer_swap([], []) == (0, 0)
    assert layer_swap([1.0, None], [0.0, 0.0]) == (0, 0)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_swapped_layers_never_overlap(profiles: list[tuple[float, float]]) -> None:
    task, language = [a for a, _ in profiles], [b for _, b in profiles]
    bottom, top = layer_swap(task, language)
    assert 0 <= bottom + top < len(profiles) or (bottom, top) == (0, 0)
