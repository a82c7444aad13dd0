"""What text encoders make of texts, each kind as its own library would; and the cache of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.nn import functional

from described import save_classifier, save_encoder
from regraft.errors import UserError
from regraft.train.feature_cache import FeatureCache
from regraft.train.text_embeddings import MISSING, embed_texts
from regraft.train.text_encoder import TextEncoder
from tiny import texts

TEXTS = [row["text"] for row in texts(9)]


def by_hand(folder: Path, kind: str, pooling: str, text: str) -> torch.Tensor:
    """The unit vector of one text, without padding, by the classes of transformers."""
    tokens = hf.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    load: Any = {
        "clip": hf.CLIPModel,
        "clip_text": hf.CLIPTextModel,
        "clip_projected": hf.CLIPTextModelWithProjection,
        "t5": hf.T5EncoderModel,
    }.get(kind, hf.AutoModel)
    whole = load.from_pretrained(folder).eval()
    with torch.no_grad():
        if kind == "clip" and pooling == "own":
            vector = whole.text_projection(whole.text_model(**tokens).pooler_output)[0]
        elif pooling == "own":
            output = whole(**tokens)
            vector = (output.text_embeds if kind == "clip_projected" else output.pooler_output)[0]
        else:
            states = (whole.text_model if kind == "clip" else whole)(**tokens).last_hidden_state[0]
            vector = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
    return functional.normalize(vector, dim=-1)


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        ("bert", "mean"), ("bert", "first"), ("bert", "last"), ("roberta", "mean"), ("t5", "mean"), ("gpt2", "last"),
        ("clip", "own"), ("clip", "mean"), ("clip_text", "own"), ("clip_projected", "own"),
    ],
)  # fmt: skip
def test_each_kind_of_encoder(kind: str, pooling: Any, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / kind, kind)
    encoder = TextEncoder(folder, pooling, device="cpu")
    vectors, cut = encoder(TEXTS)
    expected = torch.stack([by_hand(folder, kind, pooling, text) for text in TEXTS])
    assert torch.allclose(vectors, expected, atol=1e-5)
    assert vectors.shape == (9, encoder.dimension)
    assert not cut.any()


def test_auto_is_what_the_model_is_made_for(tmp_path: Path) -> None:
    found = {
        kind: TextEncoder(save_encoder(tmp_path / kind, kind), device="cpu").pooling
        for kind in ("bert", "gpt2", "t5", "clip", "clip_text", "clip_projected")
    }
    assert found == {
        "bert": "mean", "gpt2": "mean", "t5": "mean", "clip": "own", "clip_text": "own", "clip_projected": "own"
    }  # fmt: skip
    stored = tmp_path / "bert" / "1_Pooling" / "config.json"
    stored.parent.mkdir()
    stored.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert TextEncoder(tmp_path / "bert", device="cpu").pooling == "first"
    stored.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="pooling of this sentence encoder is none that is known"):
        TextEncoder(tmp_path / "bert", device="cpu")
    assert TextEncoder(tmp_path / "bert", "mean", device="cpu").pooling == "mean"


def test_long_texts_are_cut_and_counted_or_read_by_sentence(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "bert", "bert")
    long, short = "w1 w2 w3 w4 w5 w6. w7 w8!  w9", "w1 w2"
    vectors, cut = TextEncoder(folder, max_length=4, device="cpu")([long, short])
    assert cut.tolist() == [True, False]
    assert torch.allclose(vectors[0], by_hand(folder, "bert", "mean", "w1 w2 w3 w4"), atol=1e-5)
    encoder = TextEncoder(folder, max_length=7, by_sentence=True, device="cpu")
    vectors, cut = encoder([long, short])
    parts = [by_hand(folder, "bert", "mean", part) for part in ("w1 w2 w3 w4 w5 w6.", "w7 w8!", "w9")]
    assert torch.allclose(vectors[0], functional.normalize(torch.stack(parts).mean(0), dim=-1), atol=1e-5)
    assert cut.tolist() == [False, False]


def test_each_text_is_embedded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(save_encoder(tmp_path / "bert", "bert"), device="cpu")
    asked: list[str] = []
    run = TextEncoder.__call__

    def counted(self: TextEncoder, some: Any) -> Any:
        asked.extend(some)
        return run(self, some)

    monkeypatch.setattr(TextEncoder, "__call__", counted)
    data = [*TEXTS, None, "", TEXTS[0], "  "]
    first = embed_texts(encoder, data, batch=4, folder=tmp_path / "cache")
    assert asked == TEXTS
    assert (first.texts, first.missing, first.distinct, first.cut) == (10, 3, 9, 0)
    again = embed_texts(encoder, iter([*TEXTS, "w39 w1"]), folder=tmp_path / "cache")
    assert asked == [*TEXTS, "w39 w1"]
    vectors, numbers = again([TEXTS[2], None, TEXTS[0], TEXTS[2]])
    assert torch.allclose(vectors[[0, 2, 3]], run(encoder, [TEXTS[2], TEXTS[0], TEXTS[2]])[0], atol=1e-5)
    assert not vectors[1].any()
    assert numbers[1] == MISSING
    assert numbers[0] == numbers[3] != numbers[2]
    assert torch.equal(vectors, first([TEXTS[2], None, TEXTS[0], TEXTS[2]])[0])
    with pytest.raises(UserError, match="the text 'w0' has no embedding"):
        first(["w0"])
    other = TextEncoder(save_encoder(tmp_path / "bert", "bert", seed=1), device="cpu")
    embed_texts(other, TEXTS[:2], folder=tmp_path / "cache")
    assert asked[10:] == TEXTS[:2]


def test_how_alike_texts_are_and_their_centre(tmp_path: Path) -> None:
    encoder = TextEncoder(save_encoder(tmp_path / "bert", "bert"), device="cpu")
    made = embed_texts(encoder, [*TEXTS, TEXTS[0]], centre=True)
    plain, _ = encoder(TEXTS)
    pairs = [float(plain[i] @ plain[j]) for i in range(9) for j in range(i)]
    assert made.mean_cosine == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    expected = functional.normalize(plain - plain.mean(0), dim=-1)
    assert torch.allclose(made(TEXTS)[0], expected, atol=1e-4)
    assert embed_texts(encoder, TEXTS[:1]).mean_cosine == 1.0


def test_encoders_and_texts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    vit = save_classifier(tmp_path / "vit", "vit")
    bert = save_encoder(tmp_path / "bert", "bert")
    bare = save_encoder(tmp_path / "bare", "bert")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    unpadded = save_encoder(tmp_path / "unpadded", "bert")
    for path in unpadded.glob("*token*"):
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in stored.items() if k not in ("pad_token", "eos_token")}))
    lacking = save_encoder(tmp_path / "lacking", "bert")
    tensors = load_file(lacking / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layer.1.output.dense" not in name}
    save_file(kept, lacking / "model.safetensors", metadata={"format": "pt"})
    broken = save_encoder(tmp_path / "broken", "bert")
    tensors["bert.embeddings.word_embeddings.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    encoder = TextEncoder(bert, device="cpu")
    for call, words in (
        (lambda: TextEncoder(vit, device="cpu"), "a vit model reads no texts"),
        (lambda: TextEncoder(bare, device="cpu"), "the text encoder's folder has no tokenizer"),
        (lambda: TextEncoder(unpadded, device="cpu"), "the tokenizer has no token to pad with"),
        (lambda: TextEncoder(bert, "own", device="cpu"), "has no text embedding of its own"),
        (lambda: TextEncoder(lacking, device="cpu"), "the text encoder lacks weights .*layer.1.output.dense"),
        (lambda: TextEncoder(broken, device="cpu")(["w1"]), "output is not finite for 'w1'"),
        (lambda: embed_texts(encoder, ["w1", 5]), "the description is int, not text .row 2 of the data"),
        (lambda: embed_texts(encoder, [None, ""]), "no example has a text"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_a_head_that_is_missing_does_no_harm(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "bert", "bert")
    before = TextEncoder(folder, device="cpu")(TEXTS)[0]
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "predictions.transform" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(TextEncoder(folder, device="cpu")(TEXTS)[0], before)


def test_two_that_write_one_cache_do_not_mix_what_they_write(tmp_path: Path) -> None:
    one, two = FeatureCache(tmp_path, "m"), FeatureCache(tmp_path, "m")
    for i in range(4):
        one.write(f"one {i}", {"x": torch.full((3,), float(i))})
        two.write(f"two {i}", {"x": torch.full((2,), 10.0 + i)})
    third = FeatureCache(tmp_path, "m")
    assert len(third) == 8
    for i in range(4):
        for cache, key, value in ((one, "one", i), (two, "two", 10 + i), (third, "one", i), (third, "two", 10 + i)):
            found = cache.read(f"{key} {i}")
            assert found is not None
            assert set(found["x"].tolist()) == {float(value)}
