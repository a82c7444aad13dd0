"""The metrics: against scores computed by other means, and every way in which data or a model can be unfit."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models import config, save_model
from regraft.errors import UserError
from regraft.inspect.intervals import bootstrap, wilson
from regraft.inspect.metric import Score
from regraft.inspect.metrics.accuracy import accuracy
from regraft.inspect.metrics.perplexity import perplexity
from regraft.inspect.metrics.similarity import similarity, spearman
from regraft.methods import method, methods

WORDS = [f"w{i}" for i in range(60)]


def save_tokenizer(folder: Path, **special: str) -> None:
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"} | special
    vocabulary = {word: i for i, word in enumerate([*names.values(), *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(
        folder
    )


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_of(generator: torch.Generator, length: int) -> str:
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {i: f"digit {i}" for i in range(10)}
    labels = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    return save_model(tmp_path_factory.mktemp("vit"), "vit", num_labels=10, **labels)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("llama"), "llama", initializer_range=0.3)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("bert"), "bert", initializer_range=0.3)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    transformers.BertForSequenceClassification(config("bert", initializer_range=0.5, **names)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(40):
        pixels = (torch.rand(8, 8, generator=generator) * 100).round() / 100
        rows.append(
            {"pixel_values": pixels.tolist(), "label": f"digit {i % 10}", "group": "even" if i % 2 == 0 else "odd"}
        )
    return rows


def expected(vit: Path, rows: list[dict[str, Any]]) -> list[bool]:
    model = transformers.ViTForImageClassification.from_pretrained(vit).eval()
    with torch.no_grad():
        guess = model(pixel_values=torch.tensor([row["pixel_values"] for row in rows])[:, None]).logits.argmax(-1)
    return [model.config.id2label[g] == row["label"] for g, row in zip(guess.tolist(), rows, strict=True)]


@contextmanager
def refused(code: str, *words: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block raises this error, whose sentence has these expressions in this order."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code
    assert re.search(".*".join(words), str(caught.value), re.DOTALL), str(caught.value)


# Registry and scores


def test_the_room_knows_its_metrics() -> None:
    assert {m.name for m in methods("evaluate")} >= {"accuracy", "perplexity", "similarity"}
    assert method("evaluate", "accuracy") is accuracy
    with refused("RG301", "accuracy"):
        method("evaluate", "acuracy")


@pytest.mark.parametrize("one", methods("evaluate"), ids=lambda m: m.name)
def test_every_metric_documents_itself(one: Any) -> None:
    assert one.doc.strip()
    assert not one.summary.endswith(".")
    assert all(f.description for f in one.options.model_fields.values())


def test_options_are_checked(vit: Path, tmp_path: Path) -> None:
    with refused("RG302", "btach_size", "batch_size"):
        accuracy(vit, tmp_path, btach_size=3)
    with refused("RG303", "batch_size"):
        accuracy(vit, tmp_path, batch_size=0)


def test_a_score_survives_json() -> None:
    score = Score(value=0.5, n=4, interval=(0.1, 0.9), per_group={"a": Score(value=1.0, n=2)})
    assert Score.model_validate(json.loads(score.model_dump_json())) == score


# Intervals


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(case: tuple[int, int]) -> None:
    right, n = case
    reference = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert 0 <= wilson(right, n)[0] <= right / n <= wilson(right, n)[1] <= 1


def test_bootstrap_covers_the_mean_and_is_repeatable() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    low, high = bootstrap(400, lambda i: float(values[i].mean())) or (0.0, 0.0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.2)
    assert bootstrap(400, lambda i: float(values[i].mean())) == (low, high)
    assert bootstrap(1, lambda i: 0.0) is None
    assert bootstrap(10, lambda i: math.nan) is None


@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(-1, 1)), min_size=3, max_size=40))
def test_spearman_agrees_with_scipy(pairs: list[tuple[int, float]]) -> None:
    x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


# Accuracy


def test_accuracy_is_the_share_of_right_answers(vit: Path, images: list[dict[str, Any]], tmp_path: Path) -> None:
    data = write_lines(tmp_path / "test.jsonl", images)
    right = expected(vit, images)
    score = accuracy(vit, data, batch_size=7)
    assert score.value == sum(right) / 40
    assert score.n == 40
    assert score.interval == wilson(sum(right), 40)
    assert list(score.per_group) == ["even", "odd"]
    assert score.per_group["odd"].value == sum(right[1::2]) / 20
    assert accuracy(vit, data, batch_size=64) == score
    assert accuracy(vit, data, limit=9).n == 9


def test_all_formats_give_the_same_score(vit: Path, images: list[dict[str, Any]], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    score = accuracy(vit, write_lines(tmp_path / "test.jsonl", images))
    with (tmp_path / "test.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["pixel_values", "label", "group"])
        writer.writeheader()
        writer.writerows({**row, "pixel_values": json.dumps(row["pixel_values"])} for row in images)
    np.savez(tmp_path / "test.npz", **{key: np.array([row[key] for row in images]) for key in images[0]})
    table = datasets.Dataset.from_list(images)
    table.to_parquet(tmp_path / "test.parquet")
    (tmp_path / "test.json").write_text(json.dumps(images))
    datasets.DatasetDict({"test": table, "train": table.select(range(3))}).save_to_disk(tmp_path / "saved")
    for name in ("test.csv", "test.npz", "test.parquet", "test.json"):
        assert accuracy(vit, tmp_path / name) == score, name
    assert accuracy(vit, tmp_path / "saved", split="test") == score
    with refused("RG601", "2 splits", "test, train"):
        accuracy(vit, tmp_path / "saved")


def test_class_labels_are_compared_by_name(vit: Path, images: list[dict[str, Any]], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    backwards = [f"digit {9 - i}" for i in range(10)]
    rows = [{**row, "label": backwards.index(row["label"])} for row in images]
    features = datasets.Dataset.from_list(rows).features | {"label": datasets.ClassLabel(names=backwards)}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "test.parquet")
    assert accuracy(vit, tmp_path / "test.parquet").value == sum(expected(vit, images)) / 40


def test_numbers_stand_for_the_models_own_labels(vit: Path, images: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{**row, "label": i % 10} for i, row in enumerate(images)]
    assert accuracy(vit, write_lines(tmp_path / "a.jsonl", rows)).value == sum(expected(vit, images)) / 40


def test_text_is_classified_in_padded_batches(classifier: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    texts = [text_of(generator, 1 + i % 9) for i in range(30)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    model = transformers.BertForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        guesses = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    assert 0 < sum(guesses) < 30
    labels = [["no", "yes"][guess if i % 3 else 1 - guess] for i, guess in enumerate(guesses)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    score = accuracy(classifier, write_lines(tmp_path / "a.jsonl", rows), batch_size=8)
    assert score.value == pytest.approx(20 / 30)
    assert score.notes == {"texts_cut": 0}
    assert accuracy(classifier, tmp_path / "a.jsonl", max_length=4).notes["texts_cut"] == sum(
        i % 9 > 3 for i in range(30)
    )


def test_images_go_through_the_models_processor(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    folder = save_model(tmp_path / "rgb", "vit", num_channels=3)
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}, do_resize=True)
    processor.save_pretrained(folder)
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    rows, right = [], 0
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        pillow.fromarray(pixels).save(tmp_path / f"{i}.png")
        inputs = processor(images=[pillow.fromarray(pixels)], return_tensors="pt")
        with torch.no_grad():
            guess = int(model(**inputs).logits.argmax())
        right += guess == i % 2
        rows.append({"image": f"{i}.png" if i % 2 else pixels.tolist(), "label": i % 2})
    assert accuracy(folder, write_lines(tmp_path / "a.jsonl", rows)).value == right / 6
    for bad, words in (("none.png", "no image"), ("../x.png", "outside"), ([[300.0]], "0 to 255"), ([1, 2], "shape")):
        with refused("RG601", words):
            accuracy(folder, write_lines(tmp_path / "b.jsonl", [{"image": bad, "label": 0}]))
    (tmp_path / "fake.png").write_bytes(b"no image at all")
    with refused("RG601", "fake.png"):
        accuracy(folder, write_lines(tmp_path / "b.jsonl", [{"image": "fake.png", "label": 0}]))
    (folder / "preprocessor_config.json").unlink()
    with refused("RG602", "preprocessor_config"):
        accuracy(folder, tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": "digit 1"}, "no input column"),
        ({"pixel_values": [[0.0] * 8] * 8}, "no column 'label'"),
        ({"pixel_values": [[0.0] * 8] * 8, "label": "digit x"}, "no label 'digit x'.*did you mean"),
        ({"pixel_values": [[0.0] * 8] * 8, "label": 10}, "no label 10"),
        ({"pixel_values": [[0.0] * 8] * 8, "label": None}, "'label' is empty"),
        ({"pixel_values": [[0.0] * 4] * 4, "label": 1}, "does not take arrays of this size"),
        ({"pixel_values": [[0.0] * 8, [0.0]], "label": 1}, "no array of numbers"),
        ({"pixel_values": [[math.nan] * 8] * 8, "label": 1}, "NaN"),
        ({"pixel_values": [[[0.0] * 8] * 8] * 3, "label": 1}, "1 channel"),
    ],
)
def test_unfit_rows_are_named(vit: Path, tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with refused("RG601", "line 1" if "label" in row else words) as caught:
        accuracy(vit, write_lines(tmp_path / "a.jsonl", [row]))
    assert re.search(words, str(caught.value))


# Data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "does not exist"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n\n{"text": "b", "label"\n', "not JSON.*line 3"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n[1]\n', "list.*line 2"),
        ("a.jsonl", b'{"text": "a", "label": 0}\n{"txt": "b", "label": 0}\n', "'text'.*line 2"),
        ("a.jsonl", b'{"text": "\xff", "label": 0}\n', "not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "nested"),
        ("a.csv", b"text,label\na,0\nb,0,1\n", "more fields.*line 3"),
        ("a.csv", b'text,label\n"a,0\n', "CSV"),
        ("a.npz", b"PK not really", "NumPy archive"),
        ("a.xlsx", b"x", "unknown data format '.xlsx'"),
        ("a.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_unfit_data_is_named(classifier: Path, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused("RG601", words):
        accuracy(classifier, tmp_path / name)


def test_pickled_arrays_are_refused(classifier: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", text=np.array(["a", None], dtype=object), label=np.array([0, 1]))
    with refused("RG601", "NumPy archive"):
        accuracy(classifier, tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", text=np.array(["a"]), label=np.array([0, 1]))
    with refused("RG601", "different lengths"):
        accuracy(classifier, tmp_path / "b.npz")


def test_a_missing_package_is_named(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with refused("RG602", "datasets", "pip install"):
        accuracy(vit, tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["accuracy", "perplexity", "similarity"])
def test_a_plan_can_check_without_a_model(name: str, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", [{"unrelated": 1}])
    one = method("evaluate", name)
    with refused("RG601"):
        one.check(data, one.resolve({}))


# Models


def test_models_without_the_head_are_refused(bert: Path, vit: Path, tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "a.jsonl", [{"text": "w1 w2", "label": 0}])
    with refused("RG602", "text classification", "random"):
        accuracy(bert, texts)
    with refused("RG602", "vit model cannot do text classification"):
        accuracy(vit, texts)
    with refused("RG101"):
        accuracy(tmp_path / "none", texts)


def test_regression_heads_are_refused(tmp_path: Path) -> None:
    transformers.BertForSequenceClassification(config("bert", num_labels=1)).save_pretrained(tmp_path / "m")
    with refused("RG602", "1 output"):
        accuracy(tmp_path / "m", write_lines(tmp_path / "a.jsonl", [{"text": "w1", "label": 0}]))


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "m", "llama")
    with refused("RG602", "tokenizer"):
        perplexity(tmp_path / "m", write_lines(tmp_path / "a.jsonl", [{"text": "w1"}]))


def test_a_model_that_needs_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    auto = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(auto))
    (tmp_path / "m" / "configuration_own.py").write_text("raise SystemExit('this was run')")
    with refused("RG110", "own"):
        accuracy(tmp_path / "m", write_lines(tmp_path / "a.jsonl", [{"text": "w1", "label": 0}]))


def test_broken_outputs_are_no_score(vit: Path, images: list[dict[str, Any]], tmp_path: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(vit)
    with torch.no_grad():
        model.classifier.bias[3] = math.nan
    model.save_pretrained(tmp_path / "m")
    with refused("RG602", "not finite"):
        accuracy(tmp_path / "m", write_lines(tmp_path / "a.jsonl", images))


# Perplexity


def test_perplexity_scores_every_token_but_the_first_once(llama: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    texts = [text_of(generator, n) for n in (5, 1, 17, 9, 30)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    stream = [t for text in texts for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    model = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 8):
            window = torch.tensor(stream[start : start + 9])
            scores = model(input_ids=window[None, :-1]).logits[0].double().log_softmax(-1)
            nats -= scores.gather(1, window[1:, None]).sum().item()
    data = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    score = perplexity(llama, data, length=8, batch_size=3)
    assert score.n == len(stream) - 1
    assert score.unit == "tokens"
    assert not score.higher_is_better
    assert score.value == pytest.approx(math.exp(nats / (len(stream) - 1)), rel=1e-5)
    assert score.interval is not None
    assert score.interval[0] < score.value < score.interval[1]
    assert score.notes["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)


def test_groups_are_packed_apart(llama: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = [{"text": text_of(generator, 20), "group": "ab"[i % 2]} for i in range(6)]
    score = perplexity(llama, write_lines(tmp_path / "all.jsonl", rows), length=8)
    for group in "ab":
        own = [{"text": row["text"]} for row in rows if row["group"] == group]
        alone = perplexity(llama, write_lines(tmp_path / f"{group}.jsonl", own), length=8)
        assert score.per_group[group].value == pytest.approx(alone.value, rel=1e-6)
    assert score.n == sum(s.n for s in score.per_group.values())


def test_only_next_token_models_have_a_perplexity(bert: Path, vit: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", [{"text": "w1 w2 w3"}])
    with refused("RG602", "pseudo-perplexity"):
        perplexity(bert, data)
    with refused("RG602", "encoder-decoder"):
        perplexity(save_model(tmp_path / "t5", "t5"), data)
    with refused("RG602", "vit model cannot"):
        perplexity(vit, data)


def test_text_files_are_read_by_line(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 w2 w3\n\nw4 w5\n")
    assert perplexity(llama, tmp_path / "a.txt").notes["texts"] == 2
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    with refused("RG601", "holds int, not text"):
        perplexity(llama, tmp_path / "b.jsonl")


# Similarity


def pairs_of(n: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(6)
    return [
        {
            "sentence1": text_of(generator, 2 + i % 5),
            "sentence2": text_of(generator, 3 + i % 4),
            "score": i % 4,
            "group": "ab"[i % 2],
        }
        for i in range(n)
    ]


def test_similarity_ranks_cosines_of_mean_states(bert: Path, tmp_path: Path) -> None:
    rows = pairs_of(24)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    model = transformers.AutoModel.from_pretrained(bert).eval()

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    cosines = [torch.cosine_similarity(embed(r["sentence1"]), embed(r["sentence2"]), 0).item() for r in rows]
    reference = stats.spearmanr(cosines, [row["score"] for row in rows]).statistic
    data = write_lines(tmp_path / "a.jsonl", rows)
    score = similarity(bert, data, batch_size=5)
    assert score.value == pytest.approx(reference, abs=1e-9)
    assert score.interval is not None
    assert score.interval[0] <= score.value <= score.interval[1]
    assert {name: s.n for name, s in score.per_group.items()} == {"a": 12, "b": 12}
    assert similarity(bert, data, pooling="first").value != score.value


def test_similarity_takes_the_encoder_of_t5(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "t5", "t5")
    save_tokenizer(folder)
    assert -1 <= similarity(folder, write_lines(tmp_path / "a.jsonl", pairs_of(8))).value <= 1


def test_an_unused_part_may_be_missing_and_a_used_one_not(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    data = write_lines(tmp_path / "a.jsonl", pairs_of(8))
    assert not any("pooler" in name for name in load_file(bert / "model.safetensors"))
    similarity(bert, data)  # the pooler is missing, and not used
    folder = tmp_path / "m"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    kept = {n: t for n, t in load_file(bert / "model.safetensors").items() if "layer.1.output.dense.weight" not in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with refused("RG602", "lacks weights", r"layer\.1\.output"):
        similarity(folder, data)


def test_gold_scores_must_have_an_order(bert: Path, tmp_path: Path) -> None:
    rows = [{**row, "score": 1.0} for row in pairs_of(4)]
    with refused("RG601", "have no order"):
        similarity(bert, write_lines(tmp_path / "a.jsonl", rows))
    rows[2]["score"] = "high"
    with refused("RG601", "'high', not a number", "line 3"):
        similarity(bert, write_lines(tmp_path / "a.jsonl", rows))
