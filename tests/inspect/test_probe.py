"""The probe: answers in words against what the models compute, remarks, and every way in which a probe is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

from models import config, save_fine_tune, save_model
from regraft.cli.main import app
from regraft.cli.probe import shown
from regraft.errors import UserError
from regraft.inspect.answers import repeats
from regraft.inspect.metric import Score
from regraft.inspect.metrics.probe import probe

WORDS = [f"w{i}" for i in range(60)]
TEXTS = ["w1 w2 w3", "w40 w5", "w9 w9 w10 w11 w12", "w30"]


def save_tokenizer(folder: Path, **special: str) -> Path:
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "mask_token": "[MASK]"} | special
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*names.values(), *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    return folder


def rows(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def save(folder: Path, model_class: Any, family: str, **changes: Any) -> Path:
    torch.manual_seed(3)
    model_class(config(family, **changes)).save_pretrained(folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    folder = tmp_path_factory.mktemp("classifier")
    return save(folder, hf.BertForSequenceClassification, "bert", initializer_range=0.5, **names)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tokenizer(save_model(tmp_path_factory.mktemp("gpt2"), "gpt2", initializer_range=0.4))
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "min_length": 30}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_model(tmp_path_factory.mktemp("bert"), "bert", initializer_range=0.4))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return rows(tmp_path / "probes.jsonl", [{"text": text} for text in TEXTS])


@contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    with pytest.raises(UserError) as caught:
        yield
    assert caught.value.code == code
    assert re.search(".*".join(words), str(caught.value), re.DOTALL), str(caught.value)


def ids(text: str) -> torch.Tensor:
    names = ["[PAD]", "[UNK]", "[EOS]", "[MASK]", *WORDS]
    return torch.tensor([[names.index(word) for word in text.split()]])


# Answers


def test_a_text_classifier_answers_with_label_names(classifier: Path, texts: Path) -> None:
    score = probe(classifier, texts, batch_size=3)
    model = hf.BertForSequenceClassification.from_pretrained(classifier).eval()
    assert [a.input for a in score.answers] == TEXTS
    sure = []
    for text, answer in zip(TEXTS, score.answers, strict=True):
        with torch.no_grad():
            expected = model(input_ids=ids(text)).logits[0].softmax(-1)
        assert answer.output == ("no", "yes")[int(expected.argmax())]
        assert answer.value == pytest.approx(float(expected.max()), abs=1e-5)
        other, least = answer.alternatives[0]
        assert {answer.output, other} == {"no", "yes"}
        assert least == pytest.approx(float(expected.min()), abs=1e-5)
        sure.append(float(expected.max()))
    assert score.value == pytest.approx(sum(sure) / 4, abs=1e-5)
    assert (score.n, score.interval) == (4, None)
    assert not any("LABEL_0" in remark for remark in score.notes["remarks"])
    assert Score.model_validate(json.loads(score.model_dump_json())) == score


def test_labels_make_it_an_accuracy(classifier: Path, texts: Path, tmp_path: Path) -> None:
    outputs = [a.output for a in probe(classifier, texts).answers]
    wrong = {"no": "yes", "yes": "no"}
    labels = [outputs[0], wrong[outputs[1]], ("no", "yes").index(outputs[2]), None]
    lines = [{"text": t, "label": label, "group": g} for t, label, g in zip(TEXTS, labels, "aabb", strict=True)]
    score = probe(classifier, rows(tmp_path / "labelled.jsonl", lines))
    assert [a.right for a in score.answers] == [True, False, True, None]
    assert (score.value, score.n) == (pytest.approx(2 / 3), 3)
    assert score.interval is not None
    assert score.interval[0] < 2 / 3 < score.interval[1]
    assert {name: own.value for name, own in score.per_group.items()} == {"a": 0.5, "b": 1.0}


def test_an_image_classifier_without_names_is_remarked(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "vit", "vit", initializer_range=0.3)
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(8, 8, generator=generator).tolist() for _ in range(3)]
    score = probe(folder, rows(tmp_path / "images.jsonl", [{"pixel_values": p} for p in pixels]), max_inputs=2)
    model = hf.ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(pixel_values=torch.tensor(pixels[:2])[:, None]).logits.softmax(-1)
    assert [a.output for a in score.answers] == [f"LABEL_{i}" for i in expected.argmax(-1).tolist()]
    assert [a.value for a in score.answers] == pytest.approx(expected.amax(-1).tolist(), abs=1e-5)
    assert score.answers[0].input == "images.jsonl, line 1"
    assert any("LABEL_0" in remark for remark in score.notes["remarks"])


def greedy(model: Any, start: torch.Tensor, steps: int, end: int | None, **source: Any) -> tuple[list[int], float]:
    """Greedy decoding by hand, without a cache: the new tokens and their mean log-probability."""
    tokens, logs = start, []
    for _ in range(steps):
        with torch.no_grad():
            given = {"decoder_input_ids": tokens, **source} if source else {"input_ids": tokens}
            log = model(**given).logits[0, -1].log_softmax(-1)
        logs.append(float(log.max()))
        tokens = torch.cat([tokens, log.argmax()[None, None]], 1)
        if int(tokens[0, -1]) == end:
            break
    return tokens[0, start.shape[1] :].tolist(), sum(logs) / len(logs)


def test_a_causal_model_continues_greedily_whatever_its_own_settings(gpt2: Path, texts: Path) -> None:
    score = probe(gpt2, texts, max_new_tokens=6)
    model = hf.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(gpt2)
    means = []
    for text, answer in zip(TEXTS, score.answers, strict=True):
        expected, mean = greedy(model, ids(text), 6, None)
        assert answer.output == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert answer.value == pytest.approx(math.exp(mean), rel=1e-4)
        means.append(mean)
    assert score.value == pytest.approx(math.exp(sum(means) / 4), rel=1e-4)


def test_a_continuation_is_right_if_it_begins_with_the_label(gpt2: Path, texts: Path, tmp_path: Path) -> None:
    first = probe(gpt2, texts).answers[0].output.split()[0]
    lines = [{"text": TEXTS[0], "label": first.upper()}, {"text": TEXTS[0], "label": first[:-1]}]
    assert [a.right for a in probe(gpt2, rows(tmp_path / "labelled.jsonl", lines)).answers] == [True, False]


def test_a_chat_template_is_applied_only_if_asked(gpt2: Path, texts: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "chat", "gpt2", initializer_range=0.4)
    save_tokenizer(folder)
    plain = probe(folder, texts, max_new_tokens=4)
    (folder / "chat_template.jinja").write_text("w50 w51 {{ messages[0]['content'] }} w52")
    asked = probe(folder, texts, max_new_tokens=4, chat=True)
    expected, _ = greedy(hf.GPT2LMHeadModel.from_pretrained(folder).eval(), ids(f"w50 w51 {TEXTS[0]} w52"), 4, None)
    decoded = hf.AutoTokenizer.from_pretrained(folder).decode(expected, skip_special_tokens=True).strip()
    assert asked.answers[0].output == decoded
    assert probe(folder, texts, max_new_tokens=4) == plain
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    with refused("RG602", "chat template", "no users here"):
        probe(folder, texts, chat=True)


def test_an_encoder_decoder_writes(tmp_path: Path, texts: Path) -> None:
    folder = save_tokenizer(save_model(tmp_path / "t5", "t5"))
    score = probe(folder, texts, max_new_tokens=5)
    model = hf.T5ForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    end = model.generation_config.eos_token_id
    for text, answer in zip(TEXTS, score.answers, strict=True):
        expected, mean = greedy(model, torch.tensor([[0]]), 5, end, input_ids=ids(text))
        assert answer.output == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert answer.value == pytest.approx(math.exp(mean), rel=1e-4)


def test_a_masked_model_fills_the_gap(bert: Path, tmp_path: Path) -> None:
    lines = ["w1 <mask> w3", "w4 [MASK] w5 [MASK]", "w6"]
    score = probe(bert, rows(tmp_path / "gaps.jsonl", [{"text": text} for text in lines]))
    model = hf.BertForMaskedLM.from_pretrained(bert).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        one = model(input_ids=ids("w1 [MASK] w3")).logits[0, 1].softmax(-1).topk(4)
        two = model(input_ids=ids("w4 [MASK] w5 [MASK]")).logits[0, [1, 3]].softmax(-1).max(-1)
    best, *others = zip(tokenizer.convert_ids_to_tokens(one.indices.tolist()), one.values.tolist(), strict=True)
    first = score.answers[0]
    assert (first.output, first.value) == (tokenizer.decode([int(one.indices[0])]), pytest.approx(best[1], abs=1e-5))
    assert [value for _, value in first.alternatives] == pytest.approx([value for _, value in others], abs=1e-5)
    assert score.answers[1].output == " / ".join(tokenizer.decode([i]) for i in two.indices.tolist())
    assert score.answers[1].value == pytest.approx(math.sqrt(float(two.values.prod())), abs=1e-5)
    assert (score.answers[2].value, score.n) == (None, 2)
    assert any("no mask token" in remark for remark in score.notes["remarks"])


def test_an_encoder_names_the_nearest_other_input(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path)
    torch.manual_seed(0)
    hf.BertModel(config("bert", initializer_range=0.4), add_pooling_layer=False).save_pretrained(folder)
    lines = [{"text": text, "label": label} for text, label in zip([*TEXTS, "w1 w2 w3 w3"], "abccd", strict=True)]
    score = probe(folder, rows(tmp_path / "data.jsonl", lines), batch_size=2)
    model = hf.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        vectors = [model(input_ids=ids(line["text"])).last_hidden_state[0].mean(0) for line in lines]
    for i, answer in enumerate(score.answers):
        cosines = [torch.cosine_similarity(vectors[i], v, 0).item() if j != i else -2 for j, v in enumerate(vectors)]
        nearest = max(range(5), key=cosines.__getitem__)
        assert (answer.output, answer.value) == (lines[nearest]["text"], pytest.approx(max(cosines), abs=1e-4))
        assert answer.notes["norm"] == pytest.approx(float(vectors[i].norm()), rel=1e-4)
        assert answer.right == (lines[nearest]["label"] == lines[i]["label"])


@pytest.mark.parametrize("kind", ["text", "pixel_values"])
def test_a_dual_encoder_embeds_texts_and_images(tmp_path: Path, kind: str) -> None:
    folder = save_tokenizer(save_model(tmp_path / "clip", "clip"))
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = TEXTS[:3] if kind == "text" else images.tolist()
    score = probe(folder, rows(tmp_path / "data.jsonl", [{kind: value} for value in given]))
    model = hf.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if kind == "text":
            vectors = [model.get_text_features(input_ids=ids(t)).pooler_output[0] for t in TEXTS[:3]]
        else:
            vectors = list(model.get_image_features(pixel_values=images).pooler_output)
    assert [a.notes["norm"] for a in score.answers] == pytest.approx([float(v.norm()) for v in vectors], rel=1e-4)


# Remarks


def test_a_constant_model_is_remarked(tmp_path: Path, texts: Path) -> None:
    model = hf.GPT2LMHeadModel(config("gpt2", tie_word_embeddings=False))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[4 + 30] = 1.0  # w30, always
    model.save_pretrained(tmp_path / "stuck")
    score = probe(save_tokenizer(tmp_path / "stuck"), texts, max_new_tokens=8)
    remarks = " ".join(score.notes["remarks"])
    assert "the output repeats itself (for 4 of 4)" in remarks
    assert "every input gets the same output" in remarks
    once = probe(tmp_path / "stuck", texts, max_new_tokens=1)
    assert "the output is the input (for 1 of 4)" in once.notes["remarks"]
    cut = probe(tmp_path / "stuck", texts, max_length=2)
    assert "2 text(s) were cut" in " ".join(cut.notes["remarks"])


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [([1] * 6, True), ([1] * 5, False), ([9, 8, 1, 2, 1, 2, 1, 2], True), ([1, 2, 1, 2, 1, 2, 3], False)],
)
def test_a_loop_is_three_times_the_same_and_six_tokens(tokens: list[int], loop: bool) -> None:
    assert repeats(tokens) is loop


# What is refused


def test_rows_that_cannot_be_used(classifier: Path, bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    with refused("RG601", "no input column", "sentence"):
        probe(classifier, rows(data, [{"sentence": "w1"}]))
    with refused("RG601", "no label 'yess'", "yes"):
        probe(classifier, rows(data, [{"text": "w1", "label": "yess"}]))
    with refused("RG601", "no column 'truth'"):
        probe.check(rows(data, [{"text": "w1"}]), probe.resolve({"label": "truth"}))
    with refused("RG601", "mask token", "write .MASK."):
        probe(bert, rows(data, [{"text": "w1"}]))
    with refused("RG601", "nearest other input", "two rows"):
        probe(bert, rows(data, [{"text": "w1"}]), task="embed")
    with refused("RG601", "no tokens"):
        probe(bert, rows(data, [{"text": ""}]), task="generate")


def test_models_that_cannot_be_used(gpt2: Path, classifier: Path, texts: Path, tmp_path: Path) -> None:
    with refused("RG303", "max_new_tokens is 64", "64 tokens"):
        probe(gpt2, texts, max_new_tokens=64)
    pixels = rows(tmp_path / "images.jsonl", [{"pixel_values": [[0.0] * 8] * 8}] * 2)
    with refused("RG602", "text generation takes text", "pixel_values"):
        probe(gpt2, pixels)
    with refused("RG602", "bert model does not take images"):
        probe(classifier, pixels)
    with refused("RG602", "chat template"):
        probe(gpt2, texts, chat=True)
    unknown = save(tmp_path / "qa", hf.BertForQuestionAnswering, "bert")
    with refused("RG602", "no probe for the architecture BertForQuestionAnswering", "set task"):
        probe(unknown, texts)
    single = save(tmp_path / "regression", hf.BertForSequenceClassification, "bert", num_labels=1)
    with refused("RG602", "1 output"):
        probe(single, texts)
    no_mask = save(tmp_path / "no-mask", hf.BertForMaskedLM, "bert")
    settings = json.loads((no_mask / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (no_mask / "tokenizer_config.json").write_text(json.dumps(settings))
    with refused("RG602", "no mask token"):
        probe(no_mask, texts)
    vit = save_model(tmp_path / "vit", "vit")
    with refused("RG601", "does not take these inputs"):
        probe(vit, rows(tmp_path / "large.jsonl", [{"pixel_values": [[0.0] * 12] * 12}]))


def test_missing_and_broken_weights(classifier: Path, texts: Path, tmp_path: Path) -> None:
    model = hf.BertForSequenceClassification.from_pretrained(classifier)
    names = [n for n in model.state_dict() if ".layer.1." not in n]
    headless = save_tokenizer(tmp_path / "headless")
    model.config.architectures = ["BertModel"]
    model.save_pretrained(headless, state_dict={n: model.state_dict()[n] for n in names})
    settings = json.loads((headless / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (headless / "config.json").write_text(json.dumps(settings))
    with refused("RG602", "lacks weights of the encoder"):
        probe(headless, texts)
    broken = save_tokenizer(tmp_path / "broken")
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    model.save_pretrained(broken)
    with refused("RG602", "not finite"):
        probe(broken, texts, task="classify")


# The table


def test_a_run_prints_a_table_before_and_after(classifier: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = texts.parent
    save_fine_tune(folder / "a", classifier, 1, scale=3.0)
    save_tokenizer(folder / "a")
    (folder / "recipe.yaml").write_text(
        f"models: {{base: {classifier}, a: ./a}}\n"
        "steps:\n"
        "  merged: {merge: linear, models: [base, a]}\n"
        "  look: {evaluate: probe, models: [base, a, merged], data: probes.jsonl}\n"
    )
    monkeypatch.setenv("COLUMNS", "160")
    done = CliRunner().invoke(app, ["run", str(folder / "recipe.yaml"), "--out", str(folder / "out")])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("look (* differs from base)"))
    assert lines[start + 1].split() == ["input", "base", "a", "merged"]
    scores = json.loads((folder / "out" / "scores.json").read_text())
    answers = [one["score"]["answers"] for one in scores]
    changed = 0
    for i, line in enumerate(lines[start + 2 : start + 6]):
        cells = re.split(r"\s{2,}", line.strip())
        assert cells[0] == TEXTS[i]
        for cell, own in zip(cells[1:], answers, strict=True):
            star = own[i]["output"] != answers[0][i]["output"]
            assert cell == f"{own[i]['output']} {own[i]['value']:.2f}" + " *" * star
            changed += star
    assert changed  # the fine-tune moved the weights by three times their spread


def test_texts_are_cut_and_cannot_steer_the_terminal() -> None:
    assert shown("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert shown("x" * 40) == "x" * 40
    assert shown("x" * 41) == "x" * 39 + "…"
    assert len(shown("x " * 200)) == 40
