"""f1, knn, linear_probe and retrieval: against the same scores computed by other means, and what they refuse."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_fscore_support

from models import config
from regraft.errors import UserError
from regraft.inspect.intervals import wilson
from regraft.inspect.metrics.f1 import f1, f1_of, per_class, table
from regraft.inspect.metrics.knn import knn
from regraft.inspect.metrics.linear_probe import linear_probe
from regraft.inspect.metrics.retrieval import ranks, retrieval
from regraft.methods import method
from regraft.recipe import parse_recipe
from regraft.recipe.run import run
from tiny import add_tokenizer, pairs, pictures, save_tiny, write_rows


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bert"), "bert", initializer_range=0.3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("clip"), "clip", initializer_factor=3.0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    hf.BertForSequenceClassification(config("bert", initializer_range=0.5, **names)).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def themed(n: int = 40) -> list[dict[str, Any]]:
    """Texts whose class can be seen in their words."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(n):
        first = 20 * (i % 2)
        words = [f"x{first + int(j)}" for j in torch.randint(20, (6,), generator=generator)]
        rows.append({"text": " ".join(words), "label": ["low", "high"][i % 2], "group": "ab"[i // 2 % 2]})
    return rows


def embedded(folder: Path, texts: list[str]) -> np.ndarray:
    """Mean states one text at a time, without padding."""
    whole, tokenizer = hf.AutoModel.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found = [whole(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in texts]
    return torch.stack(found).numpy()


# F1

CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@given(CLASSES, st.sampled_from(["macro", "weighted", "micro"]))
def test_f1_agrees_with_scikit_learn(rows: list[tuple[int, int]], average: Any) -> None:
    true, guess = (np.array(side) for side in zip(*rows, strict=True))
    expected = f1_score(true, guess, average=average, zero_division=0)
    assert f1_of(table(true, guess, 4), average) == pytest.approx(expected)


@given(CLASSES, st.integers(0, 3))
def test_f1_of_each_class_agrees_with_scikit_learn(rows: list[tuple[int, int]], positive: int) -> None:
    true, guess = (np.array(side) for side in zip(*rows, strict=True))
    precision, recall, f, _ = precision_recall_fscore_support(true, guess, labels=range(4), zero_division=0)
    found = per_class(table(true, guess, 4))
    for ours, theirs in zip(found, (f, precision, recall), strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist())
    assert f1_of(table(true, guess, 4), "binary", positive) == pytest.approx(f[positive])


def test_f1_of_a_model(classifier: Path, tmp_path: Path) -> None:
    rows = [{"text": r["text"], "label": "abc"[i % 3], "group": r["group"]} for i, r in enumerate(themed())]
    data = write_rows(tmp_path / "a.jsonl", rows)
    whole, tokenizer = (
        hf.AutoModelForSequenceClassification.from_pretrained(classifier).eval(),
        hf.AutoTokenizer.from_pretrained(classifier),
    )
    with torch.no_grad():
        guesses = ["abc"[int(whole(**tokenizer(r["text"], return_tensors="pt")).logits.argmax())] for r in rows]
    assert len(set(guesses)) > 1
    truth = [r["label"] for r in rows]
    score = f1(classifier, data, batch_size=7)
    assert score.value == pytest.approx(f1_score(truth, guesses, average="macro", zero_division=0))
    assert score.interval is not None
    assert score.interval[0] <= score.value <= score.interval[1]
    inside = [i for i, r in enumerate(rows) if r["group"] == "a"]
    expected = f1_score([truth[i] for i in inside], [guesses[i] for i in inside], average="macro", zero_division=0)
    assert score.per_group["a"].value == pytest.approx(expected)
    one = f1(classifier, data, average="binary", positive="b")
    assert one.value == pytest.approx(f1_score(truth, guesses, labels=["b"], average="macro", zero_division=0))
    assert score.notes["classes"]["b"]["f1"] == pytest.approx(one.value)
    with pytest.raises(UserError, match="go together"):
        f1(classifier, data, average="binary")
    with pytest.raises(UserError, match=r"no label 'd'"):
        f1(classifier, data, average="binary", positive="d")


# Neighbours


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_neighbours_of_each_row_among_the_others(bert: Path, tmp_path: Path, distance: str) -> None:
    rows = themed(30)
    score = knn(bert, write_rows(tmp_path / "a.jsonl", rows), k=3, metric=distance)
    x = embedded(bert, [r["text"] for r in rows])
    if distance == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    apart = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(apart, np.inf)
    right = 0
    for i, row in enumerate(rows):
        votes = [rows[j]["label"] for j in np.argsort(apart[i])[:3]]
        right += max(set(votes), key=votes.count) == row["label"]
    assert score.value == right / 30
    assert score.interval == wilson(right, 30)
    assert {name: s.n for name, s in score.per_group.items()} == {"a": 16, "b": 14}


def test_neighbours_in_other_rows(bert: Path, tmp_path: Path) -> None:
    rows = themed(30)
    data, known = write_rows(tmp_path / "a.jsonl", rows[:10]), write_rows(tmp_path / "b.jsonl", rows[10:])
    score = knn(bert, data, train_data=str(known), k=1)
    x = embedded(bert, [r["text"] for r in rows])
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    nearest = (x[:10] @ x[10:].T).argmax(1)
    assert score.value == np.mean([rows[i]["label"] == rows[10 + j]["label"] for i, j in enumerate(nearest)])
    assert score.notes["neighbours from"] == 20
    with pytest.raises(UserError, match=r"20 rows with known labels .* k is 21"):
        knn(bert, data, train_data=str(known), k=21)


def test_pictures_have_neighbours(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "vit", "vit")
    rows = [{**row, "label": i % 2} for i, row in enumerate(pictures(12))]
    score = knn(folder, write_rows(tmp_path / "a.jsonl", rows), k=1)
    assert score.n == 12
    assert 0 <= score.value <= 1


# A linear classifier


def test_a_linear_probe_finds_what_is_there(bert: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = themed(60)
    data, known = write_rows(tmp_path / "a.jsonl", rows[:20]), write_rows(tmp_path / "b.jsonl", rows[20:])
    score = linear_probe(bert, data, train_data=str(known))
    x, y = embedded(bert, [r["text"] for r in rows]).astype(np.float64), [r["label"] for r in rows]
    scale = StandardScaler().fit(x[20:])
    fitted = LogisticRegression(max_iter=1000).fit(scale.transform(x[20:]), y[20:])
    assert score.value == pytest.approx(fitted.score(scale.transform(x[:20]), y[:20]))
    folded = linear_probe(bert, write_rows(tmp_path / "c.jsonl", rows), folds=3)
    assert folded.n == 60
    assert linear_probe(bert, tmp_path / "c.jsonl", folds=3) == folded
    hasty = linear_probe(bert, tmp_path / "c.jsonl", folds=3, max_iter=1)
    assert "before it had converged" in hasty.notes["remark"]


def test_what_a_linear_probe_refuses(bert: Path, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", [{"text": "w1", "label": 1}] * 6)
    with pytest.raises(UserError, match="all rows have the label '1'"):
        linear_probe(bert, one)
    few = write_rows(tmp_path / "b.jsonl", [{"text": "w1", "label": i == 0} for i in range(6)])
    with pytest.raises(UserError, match=r"the class 'True' has 1 row\(s\), and there are 5 folds"):
        linear_probe(bert, few)


# Retrieval


def test_ranks_by_hand() -> None:
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    queries = torch.tensor([[2.0, 1.0], [1.0, 0.5], [0.1, 3.0], [0.0, 0.0]])
    # Rows 1 and 2 are one document; a vector of zeros is as near to all of them.
    assert ranks(queries, documents, ["a", "b", "b", "c"]).tolist() == [1.0, 2.0, 1.0, 2.0]
    # Equal vectors of different documents share their places.
    assert ranks(queries[2:3], documents[2:3], ["b"]).tolist() == [1.0]
    assert ranks(queries[[2, 2, 2, 2]], documents, ["a", "b", "c", "d"]).tolist() == [3.0, 1.5, 1.5, 4.0]


def asked(n: int = 24) -> list[dict[str, Any]]:
    """A query shares half of its words with its document."""
    rows = []
    for i in range(n):
        words = [f"x{3 * i + j}" for j in range(6)]
        rows.append({"query": " ".join(words[:4]), "document": " ".join(words[2:]), "group": "ab"[i % 2]})
    return rows


@pytest.mark.parametrize("reverse", [False, True])
def test_retrieval_of_texts(bert: Path, tmp_path: Path, reverse: bool) -> None:
    rows = asked()
    data = write_rows(tmp_path / "a.jsonl", rows)
    sides = [embedded(bert, [r[c] for r in rows]) for c in ("query", "document")]
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (reversed(sides) if reverse else sides))
    cosines = one @ other.T
    places = np.array([1 + (cosines[i] > cosines[i, i]).sum() for i in range(len(rows))])
    for k in (1, 3):
        score = retrieval(bert, data, k=k, reverse=reverse, batch_size=7)
        assert score.value == pytest.approx((places <= k).mean())
        assert score.notes["recall@10"] == pytest.approx((places <= 10).mean())
    score = retrieval(bert, data, measure="mrr", reverse=reverse)
    assert score.value == score.notes["mrr"] == pytest.approx((1 / places).mean())
    assert score.interval is not None
    assert score.interval[0] <= score.value <= score.interval[1]
    assert score.per_group["a"].value == pytest.approx((1 / places[::2]).mean())
    assert (score.n, score.unit) == (24, "queries")


@pytest.mark.parametrize("reverse", [False, True])
def test_retrieval_of_images(clip: Path, tmp_path: Path, reverse: bool) -> None:
    rows = [{"query": f"x{i} x{i + 20}", "pixel_values": r["pixel_values"]} for i, r in enumerate(pairs(12))]
    score = retrieval(clip, write_rows(tmp_path / "a.jsonl", rows), measure="mrr", reverse=reverse)
    whole, tokenizer = hf.CLIPModel.from_pretrained(clip).eval(), hf.AutoTokenizer.from_pretrained(clip)
    inputs = tokenizer([r["query"] for r in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = whole(**inputs, pixel_values=torch.tensor([r["pixel_values"] for r in rows]))
    logits = (output.logits_per_image if reverse else output.logits_per_text).numpy()
    key = [json.dumps(r["query" if reverse else "pixel_values"]) for r in rows]
    assert len(set(key)) == 12
    places = np.array([1 + (logits[i] > logits[i, i]).sum() for i in range(12)])
    assert score.value == pytest.approx((1 / places).mean())


def test_what_retrieval_refuses(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no document"):
        retrieval(bert, write_rows(tmp_path / "a.jsonl", [{"query": "w1"}]))
    with pytest.raises(UserError, match="all rows have the same document"):
        retrieval(bert, write_rows(tmp_path / "b.jsonl", [{"query": "w1", "document": "w2"}] * 3))
    with pytest.raises(UserError, match="does not take"):
        retrieval(bert, write_rows(tmp_path / "c.jsonl", [{"query": "w1", "pixel_values": [[[0.0]]] * 3}]))


# All of them


@pytest.mark.parametrize("name", ["f1", "knn", "linear_probe", "retrieval"])
def test_a_plan_can_check_without_a_model(name: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"unrelated": 1}])
    one = method("evaluate", name)
    with pytest.raises(UserError) as caught:
        one.check(data, one.resolve({}))
    assert caught.value.code == "RG601"


@pytest.mark.parametrize("one", [knn, linear_probe], ids=lambda m: m.name)
def test_scikit_learn_is_asked_for(one: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "sklearn":
            raise ModuleNotFoundError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"sklearn.*regraft\[eval\]"):
        one(bert, write_rows(tmp_path / "a.jsonl", themed()))


RECIPE = """
models: {a: ./a, b: ./b}
steps:
  near: {evaluate: knn, models: [a, b], data: test.jsonl, train_data: train.jsonl, k: 1}
  found: {evaluate: retrieval, models: [a, b], data: asked.jsonl, measure: mrr}
"""


def test_in_a_recipe_the_second_file_counts(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_tiny(tmp_path / name, "bert", seed=seed, initializer_range=0.3)
    rows = themed(30)
    write_rows(tmp_path / "test.jsonl", rows[:10])
    write_rows(tmp_path / "train.jsonl", rows[10:])
    write_rows(tmp_path / "asked.jsonl", asked())
    recipe = parse_recipe(RECIPE, path=tmp_path / "recipe.yaml")
    first = run(recipe, tmp_path / "out").evaluations
    assert [e.metric for e in first] == ["knn", "knn", "retrieval", "retrieval"]
    assert (
        first[0].score["value"]
        == knn(tmp_path / "a", tmp_path / "test.jsonl", train_data=str(tmp_path / "train.jsonl"), k=1).value
    )  # type: ignore[arg-type]
    kept = len(list((tmp_path / "out" / "artefacts" / "scores").iterdir()))
    run(recipe, tmp_path / "out")
    assert len(list((tmp_path / "out" / "artefacts" / "scores").iterdir())) == kept
    write_rows(tmp_path / "train.jsonl", rows[12:])
    again = run(recipe, tmp_path / "out").evaluations
    assert again[0].score["notes"]["neighbours from"] == 18
    with pytest.raises(UserError, match=r"no data at 'gone.jsonl', which train_data names"):
        run(parse_recipe(RECIPE.replace("train.jsonl", "gone.jsonl"), path=tmp_path / "recipe.yaml"), tmp_path / "new")
