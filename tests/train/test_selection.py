"""Choosing rows by a teacher, seeing alike, and several trainings in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import regraft
from models import model
from regraft.errors import UserError
from regraft.inspect.rows import Row
from regraft.objectives.own_loss import OwnLoss
from regraft.train.batches import Batches, DataOptions, batches_for
from regraft.train.data import Joined, Part, open_data
from regraft.train.making import Work
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions
from regraft.train.selection import HeldOut, Pool, Selection, content_of, select, top_per_class
from regraft.train.stages import Stages
from regraft.train.teacher import TEACHER, Teacher
from regraft.train.views import AugmentOptions, augmented, crop_box, own_batches, seen_by_all, seen_by_both, views
from tiny import begin_with_cls, pictures, save_tiny, texts, write_rows

COLUMNS = DataOptions()


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.1, 0.25, 0.5, 0.9])), max_size=40), st.integers(1, 6))
def test_the_surest_of_each_class_stay_and_of_equal_ones_the_first(rows: list[tuple[int, float]], count: int) -> None:
    classes, sure = [c for c, _ in rows], [p for _, p in rows]
    expected = []
    for one in set(classes):
        best = sorted((i for i in range(len(rows)) if classes[i] == one), key=lambda i: (-sure[i], i))
        expected += best[:count]
    assert top_per_class(classes, sure, count) == sorted(expected)


def content(**fields: Any) -> Any:
    return content_of(Row("here", fields), COLUMNS, Path())


def test_near_copies_of_texts_share_their_words() -> None:
    words = [f"word{i}" for i in range(20)]
    held = HeldOut([content(text=" ".join(words))])
    assert held.has(content(text="  Word0, " + " ".join(words[1:]).upper() + "!"))
    assert held.has(content(text=" ".join([*words[:-1], "other"])))  # 17 of 19 triples
    assert not held.has(content(text=" ".join([*words[:10], "other", *words[11:]])))  # 15 of 21
    assert HeldOut(held.contents, 0.7).has(content(text=" ".join([*words[:10], "other", *words[11:]])))
    assert not held.has(content(text="something else"))
    assert HeldOut([content(text="two words")]).has(content(text="Two words."))
    assert HeldOut([content(text="?!")]).has(content(text="?!"))
    assert not HeldOut([content(text="?!")]).has(content(text="..."))


def test_near_copies_of_images_correlate(tmp_path: Path) -> None:
    image = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    held = HeldOut([content(pixel_values=image.numpy())])
    noise = 0.005 * torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert held.has(content(pixel_values=(0.5 * image + 0.2 + noise).tolist()))  # dimmed, lighter, with a little noise
    assert not held.has(content(pixel_values=image.flip(-1).numpy()))
    half = image.clone()
    half[:, 16:] = 0
    assert not held.has(content(pixel_values=half.numpy()))
    flat = content(pixel_values=torch.ones(1, 32, 32).tolist())
    assert not held.has(flat)
    assert HeldOut([flat]).has(flat)
    assert content(pixel_values=image[0].tolist()).digest == content(pixel_values=image.tolist()).digest
    for wrong in ([1.0, 2.0], "nothing"):
        with pytest.raises(UserError, match=r"which is no image|is no array of numbers"):
            content(pixel_values=wrong)


def constant(folder: Path, classes: int = 3) -> hf.PreTrainedModel:
    """A classifier whose logits are known: classes 0 and 1 have the sums of the left and right half."""
    teacher = regraft.load(save_tiny(folder, "vit", num_labels=classes))

    def forward(pixel_values: Tensor) -> Any:
        sides = [pixel_values[..., :4].sum((1, 2, 3)), pixel_values[..., 4:].sum((1, 2, 3))]
        rest = [torch.full_like(sides[0], -50.0)] * (classes - 2)
        return hf.modeling_outputs.ImageClassifierOutput(logits=torch.stack([*sides, *rest], 1))

    teacher.forward = forward
    return teacher


def collate(examples: Any, seeds: Any) -> dict[str, Tensor]:
    return {"pixel_values": torch.tensor(np.array([e["pixel_values"] for e in examples]), dtype=torch.float32)}


def image(left: float, right: float) -> dict[str, Any]:
    """An image of which no two are copies or nearly so, unless both numbers are the same."""
    pixels = np.zeros((1, 8, 8), dtype=np.float32)
    pixels[..., :4], pixels[..., 4:] = left / 32, right / 32
    return {"pixel_values": pixels.tolist(), "label": "never read"}


def test_select(tmp_path: Path) -> None:
    teacher = Teacher(constant(tmp_path))
    rows = [image(3, 1), image(1, 3), image(5, 1), image(3, 1), image(4, 1), image(9, 1), image(1, 2)]
    pool = Pool(rows, Path("pool.jsonl"), COLUMNS)
    seen = Pool([image(9, 1)], Path("data.jsonl"), COLUMNS)
    told: list[tuple[int, int]] = []
    found = {}
    for size in (1, 3, 64):
        found[size] = select(teacher, collate, pool, 2, seen=seen, batch_size=size, tell=lambda *a: told.append(a))
    one = found[1]
    assert one.rows == found[3].rows == found[64].rows == (1, 2, 4, 6)
    assert one.classes == (1, 0, 0, 1)
    assert one.confidences[1] == pytest.approx(1 / (1 + np.exp(-4)), rel=1e-5)
    assert (one.pool, one.copies, one.held_out) == (7, 2, 0)
    assert one.per_class == {"LABEL_0": 2, "LABEL_1": 2, "LABEL_2": 0}
    assert one.empty == ["LABEL_2"]
    assert told[-1] == (7, 7)
    lines = [json.loads(line) for line in one.manifest().splitlines()]
    assert [line["row"] for line in lines] == [2, 3, 5, 7]
    assert lines[0]["class"] == "LABEL_1"
    one.save(tmp_path / "kept.json", "key")
    assert Selection.kept(tmp_path / "kept.json", "key") == one
    assert Selection.kept(tmp_path / "kept.json", "another") is None
    assert Selection.kept(tmp_path / "nothing.json", "key") is None


def test_select_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    rows = pictures(10)
    pool = Pool(rows, Path("pool.jsonl"), COLUMNS)
    held = HeldOut([pool.content(3), pool.content(7)])
    found = select(Teacher(constant(tmp_path)), collate, pool, 99, held_out=held)
    assert sorted(found.rows) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert found.held_out == 2


def test_select_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    teacher = Teacher(constant(tmp_path))
    small = {"pixel_values": np.zeros((1, 4, 8)).tolist()}
    pool = Pool([image(1, 2), small], tmp_path / "pool.jsonl", COLUMNS)
    with pytest.raises(UserError, match=r"array of 1 x 4 x 8 and others are of 1 x 8 x 8 .*pool.jsonl, row 2"):
        select(teacher, collate, pool, 1)
    broken = Pool([image(float("nan"), 1)], tmp_path / "pool.jsonl", COLUMNS)
    with pytest.raises(UserError, match="outputs are not finite"):
        select(teacher, collate, broken, 1)


def test_parts_are_one_sequence() -> None:
    whole = Joined([Part([{"n": 0}, {"n": 1}]), Part([{"n": i} for i in range(10)], [7, 3]), Part([])])
    assert [whole[i]["n"] for i in range(len(whole))] == [0, 1, 7, 3]
    for wrong in (4, -1):
        with pytest.raises(IndexError):
            whole[wrong]
    assert len(Joined([])) == 0


def test_images_of_a_part_are_found_in_its_own_folder(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "pool").mkdir()
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "pool" / "a.png")
    part = Part([{"image": "a.png"}, {"image": [[0.0]]}], home=tmp_path / "pool")
    assert part[0]["image"].getpixel((0, 0)) == (10, 20, 30)
    assert part[1]["image"] == [[0.0]]
    assert Part([{"image": "a.png"}])[0]["image"] == "a.png"


# -- views ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0.05, 0.99), st.floats(0.5, 2))
def test_crops_lie_within_the_image(seed: int, least: float, ratio: float) -> None:
    top, left, height, width = crop_box(torch.Generator().manual_seed(seed), least, ratio)
    assert 0 <= top <= top + height <= 1 + 1e-9
    assert 0 <= left <= left + width <= 1 + 1e-9
    assert least - 1e-9 <= height * width <= 1 + 1e-9
    sides = height * ratio / width  # in pixels
    assert 3 / 4 - 1e-6 <= sides <= 4 / 3 + 1e-6 or (height, width) == (1, 1)


def test_augmentation() -> None:
    pixels = torch.rand(3, 12, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augmented(pixels, 5, AugmentOptions()), pixels)
    flipped = [bool(torch.equal(augmented(pixels, s, AugmentOptions(flip=True)), pixels.flip(-1))) for s in range(200)]
    assert 70 < sum(flipped) < 130
    assert all(
        torch.equal(augmented(pixels, s, AugmentOptions(flip=True)), pixels) for s in range(200) if not flipped[s]
    )
    every = AugmentOptions(crop=0.2, flip=True, noise=0.1)
    assert augmented(pixels, 1, every).shape == pixels.shape
    assert torch.equal(augmented(pixels, 1, every), augmented(pixels, 1, every))
    assert not torch.equal(augmented(pixels, 1, every), augmented(pixels, 2, every))
    noise = torch.stack([augmented(pixels, s, AugmentOptions(noise=0.1)) - pixels for s in range(50)])
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    # A ramp stays a ramp when it is cropped and brought back to its size, with another slope.
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64).contiguous()
    cropped = augmented(ramp, 3, AugmentOptions(crop=0.3))[0, 32, 8:-8]
    steps = cropped.diff()
    assert float(steps.std()) < 0.1 * float(steps.mean())


def test_both_see_the_same_part_of_an_image_at_other_sizes() -> None:
    ramps = {size: torch.linspace(0, 1, size).expand(1, size, size).contiguous() for size in (32, 64)}

    def at(size: int) -> Any:
        return lambda examples, seeds: {"pixel_values": torch.stack([ramps[size]] * len(examples))}

    both = seen_by_both(at(32), at(64), AugmentOptions(crop=0.3))
    batch = both([{}] * 6, list(range(6)))
    ours, theirs = batch["pixel_values"].mean((1, 2, 3)), batch[TEACHER]["pixel_values"].mean((1, 2, 3))
    assert torch.allclose(ours, theirs, atol=0.05)
    assert float(ours.std()) > 0.05
    words = seen_by_both(lambda e, s: {"input_ids": torch.ones(1, 3)}, None, AugmentOptions(flip=True))
    with pytest.raises(UserError, match="crop, flip and noise are for images"):
        words([{}], [0])


def test_the_teacher_is_shown_its_own_view() -> None:
    teacher = Teacher(model("vit"))
    plain = torch.rand(2, 1, 8, 8)
    own = torch.rand(2, 1, 8, 8)
    seen = teacher({"pixel_values": plain, TEACHER: {"pixel_values": own}}).output.logits
    assert torch.equal(seen, teacher({"pixel_values": own}).output.logits)
    assert not torch.equal(seen, teacher({"pixel_values": plain}).output.logits)


def test_several_teachers_have_views_of_their_own() -> None:
    def of(value: float) -> Any:
        return lambda examples, seeds: {"pixel_values": torch.full((len(examples), 1, 2, 2), value), "labels": [0]}

    student, teachers = views(seen_by_all(of(0.0), [None, of(1.0), of(2.0)])([{}], [0]), 3)
    assert set(student) == {"pixel_values", "labels"}
    assert teachers[0] == student
    assert [float(one["pixel_values"].mean()) for one in teachers] == [0.0, 1.0, 2.0]


def test_a_teacher_has_inputs_of_its_own_where_it_prepares_texts_otherwise(tmp_path: Path) -> None:
    def own(folder: Path) -> Batches | None:
        return own_batches(regraft.load(folder), folder, ours, {"text": "w1"}, DataOptions(), None)

    one = save_tiny(tmp_path / "a", "bert")
    ours = batches_for(regraft.load(one), one, {"text": "w1"}, labels=False)
    assert own(save_tiny(tmp_path / "b", "bert", seed=1)) is None
    assert own(save_tiny(tmp_path / "short", "bert", max_position_embeddings=8)) is not None
    two = save_tiny(tmp_path / "c", "bert", vocab_size=120)
    tokenizer = hf.AutoTokenizer.from_pretrained(two)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(two)
    assert own(two) is not None
    assert own(begin_with_cls(save_tiny(tmp_path / "d", "bert"))) is not None


def test_a_teacher_has_inputs_of_its_own_where_it_prepares_images_otherwise(tmp_path: Path) -> None:
    array = {"pixel_values": [[[0.0] * 8] * 8]}
    picture = {"image": [[0] * 8] * 8}

    def made(name: str, size: int, **changes: Any) -> Path:
        folder = save_tiny(tmp_path / name, "vit", **changes)
        hf.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
        return folder

    def own(student: Path, teacher: Path, example: dict[str, Any]) -> Batches | None:
        ours = batches_for(regraft.load(student), student, example, labels=False)
        return own_batches(regraft.load(teacher), teacher, ours, example, DataOptions(), None)

    small, other, large = made("a", 8), made("b", 8), made("c", 16)
    assert own(small, other, picture) is None
    assert own(small, large, picture) is not None
    assert own(small, large, array) is None
    assert own(small, made("d", 8, num_channels=3), array) is not None


def test_batch_norms_of_a_teacher() -> None:
    config = hf.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    torch.manual_seed(0)
    net = hf.ResNetForImageClassification(config)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean += 0.3
    kept = {name: value.clone() for name, value in net.named_buffers() if "running" in name}
    pixels = torch.rand(4, 1, 16, 16)
    running = Teacher(net)({"pixel_values": pixels}).output.logits
    batch = Teacher(net, batch_statistics=True)({"pixel_values": pixels}).output.logits
    assert not torch.allclose(running, batch, atol=1e-3)
    assert all(torch.equal(value, kept[name]) for name, value in net.named_buffers() if name in kept)
    net.train()
    assert torch.allclose(batch, net(pixel_values=pixels).logits, atol=1e-5)


# -- stages --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_stages_go_on_where_they_were(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bert", "bert", hidden_dropout_prob=0.1)
    data = open_data(write_rows(tmp_path / "data.jsonl", texts()))

    def run(work_folder: Path, dies_at: int | None = None) -> tuple[Any, dict[str, Any], list[tuple[int, int]]]:
        told = []

        def tell(step: int, steps: int, figures: Any) -> None:
            told.append((step, steps))
            if step == dies_at:
                raise Killed

        whole = regraft.load(folder)
        objective = Sum(batches_for(whole, folder, data[0]).collate, [(1.0, OwnLoss())])
        stages = Stages(Work({}, None, None, work_folder, key="k", device="cpu", tell=tell), 7)
        for name, steps in (("first", 4), ("second", 3)):
            options = TrainOptions(max_steps=steps, per_device_train_batch_size=4, logging_steps=1, save_steps=2)
            stages.fit(name, whole, objective, data, options)
        return whole, stages.facts(), told

    whole, facts, told = run(tmp_path / "a")
    assert told == [(i, 7) for i in range(1, 8)]
    assert [entry["step"] for entry in facts["history"]] == list(range(1, 8))
    assert [(s["name"], s["steps"], s["rows"]) for s in facts["stages"]] == [("first", 4, 24), ("second", 3, 24)]
    with pytest.raises(Killed):
        run(tmp_path / "b", dies_at=7)
    again, resumed, told = run(tmp_path / "b")
    assert told == [(7, 7)]  # the first stage is not trained again, the second goes on from its checkpoint
    assert [e["loss"] for e in resumed["history"]] == [e["loss"] for e in facts["history"]]
    one, two = whole.state_dict(), again.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
