"""On an accelerator training starts from the same losses as on the processor, and leaves the same kind of model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from described import described, save_classifier, save_encoder
from models import config
from regraft.errors import UserError
from regraft.resize.methods.pela import pela
from regraft.train.methods.distil import distil
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.methods.gpt4image import gpt4image
from regraft.train.methods.minilm import minilm
from regraft.train.methods.pretrained_distillation import pretrained_distillation
from regraft.train.methods.self_distil import self_distil
from regraft.train.methods.ssld import ssld
from regraft.train.methods.transfer import transfer
from tiny import add_tokenizer, pictures, rows_for, save_tiny, texts, write_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

FAST: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-3, "save_steps": 2,
}  # fmt: skip
Case = Callable[[Path], tuple[Any, Path, dict[str, Any]]]


def text_case(method: Any, **options: Any) -> Case:
    def case(place: Path) -> tuple[Any, Path, dict[str, Any]]:
        data = write_rows(place / "data.jsonl", texts())
        taught = {"teacher": save_tiny(place / "teacher", "bert", seed=1)} if method in (distil, minilm) else {}
        return method, save_tiny(place / "model", "bert"), {"data": data} | taught | options

    return case


def image_case(method: Any, **options: Any) -> Case:
    def case(place: Path) -> tuple[Any, Path, dict[str, Any]]:
        data = write_rows(place / "data.jsonl", pictures())
        given: dict[str, Any] = {"data": data, "teacher": save_tiny(place / "teacher", "vit", seed=1)}
        if method is ssld:
            given["unlabelled"] = write_rows(place / "pool.jsonl", pictures(48)[24:])
        return method, save_tiny(place / "model", "vit"), given | options

    return case


def low_rank(family: str) -> Case:
    def case(place: Path) -> tuple[Any, Path, dict[str, Any]]:
        data = write_rows(place / "data.jsonl", rows_for(family))
        calm = {"dropout_rate": 0.0} if family == "t5" else {}
        return pela, save_tiny(place / "model", family, **calm), {"data": data, "ratio": 2}

    return case


def descriptions(place: Path) -> tuple[Any, Path, dict[str, Any]]:
    data = write_rows(place / "data.jsonl", described())
    text = save_encoder(place / "text", "bert")
    return gpt4image, save_classifier(place / "model", "vit"), {"data": data, "teacher": text}


def staged(place: Path) -> tuple[Any, Path, dict[str, Any]]:
    data = write_rows(place / "data.jsonl", texts())
    names = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
    torch.manual_seed(1)
    hf.BertForSequenceClassification(config("bert", **names)).save_pretrained(place / "teacher")
    add_tokenizer(place / "teacher")
    stages = ("pretrain", "distil")
    return pretrained_distillation, save_tiny(place / "model", "bert"), {
        "data": data, "teacher": place / "teacher", "stages": stages
    }  # fmt: skip


CASES: dict[str, Case] = {
    "fine_tune": text_case(fine_tune),
    "fine_tune, ema": text_case(fine_tune, ema=0.5, gradient_accumulation_steps=2),
    "distil": text_case(distil, feature_weight=0.1),
    "distil, teacher on the processor": text_case(distil, teacher_device="cpu"),
    "minilm": text_case(minilm),
    "self_distil": text_case(self_distil, target="mean"),
    "ssld": image_case(ssld),
    "pretrained_distillation": staged,
    "transfer": image_case(transfer),
    "gpt4image": descriptions,
    **{f"pela, {family}": low_rank(family) for family in ("bert", "gpt2", "llama", "t5", "vit", "swin", "clip")},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_processor(name: str, tmp_path: Path) -> None:
    method, model, given = CASES[name](tmp_path)
    histories = []
    for device in ("cpu", "auto"):
        made = method(model, folder=tmp_path / device, device=device, **given, **FAST)
        histories.append(made.diagnostics["training"]["history"])
        made.model.save_pretrained(tmp_path / f"{device} model")
        assert all(p.isfinite().all() for p in made.model.parameters())
    on_cpu, on_cuda = histories
    assert len(on_cpu) == len(on_cuda) > 0
    for one, other in zip(on_cpu, on_cuda, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02), name


def test_bfloat16_and_a_run_that_goes_on(tmp_path: Path) -> None:
    _, model, given = CASES["fine_tune"](tmp_path)
    options = {**given, **FAST, "bf16": True, "max_steps": 6}

    class Killed(Exception):
        pass

    def tell(step: int, *_: Any) -> None:
        if step == 5:
            raise Killed

    whole = fine_tune(model, folder=tmp_path / "a", device="auto", **options)
    with pytest.raises(Killed):
        fine_tune(model, folder=tmp_path / "b", device="auto", tell=tell, **options)
    again = fine_tune(model, folder=tmp_path / "b", device="auto", **options)
    losses, resumed = (made.diagnostics["training"]["history"] for made in (whole, again))
    assert len(losses) == len(resumed) == 6
    for one, other in zip(losses, resumed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name].cpu(), value.cpu(), rtol=1e-2, atol=1e-3)


def test_a_teacher_on_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    _, model, given = CASES["distil"](tmp_path)
    with pytest.raises(UserError, match="device 'cuda:97' cannot be used"):
        distil(model, folder=tmp_path / "a", **FAST, **given | {"teacher_device": "cuda:97"})


def test_the_low_rank_model_is_one_that_goes_back(tmp_path: Path) -> None:
    """What was trained on the accelerator loads on the processor and answers there as it did."""
    from regraft.resize.surgery import load, save

    _, model, given = CASES["pela, bert"](tmp_path)
    made = pela(model, folder=tmp_path / "work", device="auto", **given, **FAST)
    ids = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
    with torch.no_grad():
        before = made.model.cpu().eval()(**ids).logits
        on_cuda = made.model.cuda()(**{k: v.cuda() for k, v in ids.items()}).logits.cpu()
        save(made.model.cpu(), tmp_path / "saved")
        after = load(tmp_path / "saved").eval()(**ids).logits
    assert torch.equal(before, after)
    torch.testing.assert_close(on_cuda, before, rtol=1e-3, atol=1e-3)
    assert isinstance(made.model, hf.BertForMaskedLM)
