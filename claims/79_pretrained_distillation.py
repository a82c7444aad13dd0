"""Which of eight methods is called, by the code that follows its name? 300 calls have labels, some 1000 have none; what
is tested on comes from files that are in neither, and that no model was pre-trained on. The name is masked, and the
classifier reads the masked place. A masked language model of three layers is pre-trained on source code and fine-tuned
on the 300: the teacher. Students have one layer of the same width (64) and are made in every way:

    FT    random, labels                  PD    pre-trained, soft labels
    PF    pre-trained, labels             PD+F  pre-trained, soft labels, labels
    D     random, soft labels             T, E  the teacher's lowest layer before fine-tuning, or its embeddings alone,
                                                then soft labels

Every arm has 150 steps per stage after pre-training and chooses its learning rate from the same two by 200 labelled
calls that nothing is trained on. D and PD are also taught on 150 unlabelled calls instead of all.

In a pilot (seed 100) the question was which package a function is from. Pre-training did not help there, neither the
teacher nor the students, so that the question says nothing about the claim.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from sklearn.metrics import f1_score

from claims import corpus, text
from claims import language_models as lm
from claims.tasks import split_files
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.claims.zoo import Quality, entry
from regraft.resize.surgery import save
from regraft.train.methods.fine_tune import fine_tune
from regraft.train.methods.pretrained_distillation import pretrained_distillation

METHODS = ("append", "close", "get", "join", "read", "replace", "split", "write")
LENGTH, WIDTH, RATES = 24, 64, (1e-3, 4e-3)
# (vocabulary, steps of pre-training, steps of other stages, share of the text, calls without labels, when few)
SIZES = {"laptop": (1024, 1600, 150, 1.0, 1500, 150), "smoke": (300, 2, 2, 0.02, 40, 20)}
Rows = list[dict[str, str]]


def calls(files: Iterable[corpus.Source], mask: str) -> Rows:
    """The code after each call's name, which is masked."""
    pattern = re.compile(rf"[\w)\]\"']\.({'|'.join(METHODS)})(?=\()")
    return [
        {"text": mask + source.text[found.end() : found.end() + 6 * LENGTH], "label": found[1]}
        for source in files
        for found in pattern.finditer(source.text)
    ]


@lru_cache(maxsize=2)
def splits(seed: int, scale: str) -> dict[str, Rows]:
    """labelled, validation, unlabelled and test, the last from files of their own."""
    draws = random.Random(seed)
    files = split_files(seed)
    train, test = (calls(files[part], lm.MASK) for part in ("train", "test"))
    draws.shuffle(train)
    draws.shuffle(test)
    unlabelled = SIZES[scale][4]
    labelled, validation = (300, 200) if scale == "laptop" else (24, 16)
    end = labelled + validation
    return {
        "labelled": train[:labelled],
        "validation": train[labelled:end],
        "unlabelled": [{"text": row["text"]} for row in train[end : end + unlabelled]],
        "test": test[:800] if scale == "laptop" else test[:40],
    }


def written(folder: Path, name: str, rows: Rows) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pieces(texts: Sequence[str]) -> Rows:
    """Source code in pieces of about as many characters as a model takes tokens of."""
    found: Rows = []
    for whole in texts:
        piece = ""
        for line in whole.splitlines(keepends=True):
            piece += line
            if len(piece) >= 3 * LENGTH:
                found.append({"text": piece[: 6 * LENGTH]})
                piece = ""
    return found


def pretrained(folder: Path, layers: int, seed: int, scale: str) -> Quality:
    """A masked language model of source code."""
    vocabulary, steps, _, share, _, _ = SIZES[scale]
    seen, held = (pieces([source.text for source in part]) for part in corpus.split(False, seed, share))
    tokenizer = lm.trained_tokenizer([row["text"] for row in seen], vocabulary)
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=LENGTH, global_attn_every_n_layers=1,
        classifier_pooling="cls", pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as work:
        begun = Path(work) / "begun"
        transformers.ModernBertForMaskedLM(config).save_pretrained(begun)
        tokenizer.save_pretrained(begun)
        made = fine_tune(
            begun, data=written(Path(work), "texts", seen), folder=Path(work) / "run", device="cpu", max_steps=steps,
            per_device_train_batch_size=32, max_length=LENGTH, learning_rate=3e-3, warmup_ratio=0.1, seed=seed,
            save_steps=0,
        )  # fmt: skip
    save(made.model, folder)
    tokenizer.save_pretrained(folder)
    return guessed(made.model, tokenizer, [row["text"] for row in held[:300]])


@torch.inference_mode()
def guessed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Quality:
    """How often the model guesses a masked token, against the most frequent token."""
    inputs = tokenizer(list(texts), truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    asked = (torch.rand(ids.shape, generator=text.generator(0)) < 0.15) & mask
    logits = model.eval()(input_ids=ids.masked_fill(asked, tokenizer.mask_token_id), attention_mask=mask.long()).logits
    found = float((logits.argmax(-1) == ids)[asked].float().mean())
    plain = float((ids[asked] == ids[mask].mode().values).float().mean())
    return Quality("accuracy on masked tokens", found, plain, "the most frequent token", 0.03)


@entry(data="1.5 million characters of the source of the standard library, 15 % of the tokens masked")
def code_encoder(folder: Path, *, layers: int, seed: int, scale: str) -> Quality:
    return pretrained(folder, layers, seed, scale)


@entry(data="300 calls of eight methods in the standard library, with the method as label")
def call_classifier(folder: Path, *, seed: int, scale: str) -> Quality:
    """The encoder of three layers, fine-tuned at the better of two rates by validation."""
    base = code_encoder(layers=3, seed=seed, scale=scale)
    parts = splits(seed, scale)
    best, top = None, -1.0
    with tempfile.TemporaryDirectory() as work:
        data = written(Path(work), "labelled", parts["labelled"])
        for rate in (3e-4, 1e-3):
            made = fine_tune(
                base, data=data, folder=Path(work) / str(rate), device="cpu", max_steps=2 * SIZES[scale][2], seed=seed,
                head="sequence_classification", labels=METHODS, learning_rate=rate, per_device_train_batch_size=16,
                max_length=LENGTH, warmup_ratio=0.1, save_steps=0,
            )  # fmt: skip
            found = f1(made.model, base, parts["validation"])
            if found > top:
                best, top = made.model, found
    save(best, folder)
    text.tokenizer_of(base).save_pretrained(folder)
    plain = 1 / len(METHODS)
    return Quality("macro F1 on calls in other files", f1(best, base, parts["test"]), plain, "chance", 0.2)


@torch.inference_mode()
def f1(model: Any, tokenizer_from: Path, rows: Rows) -> float:
    """Macro F1 of a classifier."""
    tokenizer = text.tokenizer_of(tokenizer_from)
    guesses: list[int] = []
    for first in range(0, len(rows), 100):
        texts = [row["text"] for row in rows[first : first + 100]]
        inputs = tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        guesses += model.eval()(**inputs).logits.argmax(-1).tolist()
    named = [model.config.id2label[number] for number in guesses]
    return float(f1_score([row["label"] for row in rows], named, labels=METHODS, average="macro", zero_division=0))


class Arms:
    """The students of one seed."""

    def __init__(self, seed: int, scale: str, folder: Path) -> None:
        self.seed, self.rates = seed, RATES if scale != "smoke" else RATES[:1]
        self.steps, few = SIZES[scale][2], SIZES[scale][5]
        self.large = code_encoder(layers=3, seed=seed, scale=scale)
        self.small = code_encoder(layers=1, seed=seed, scale=scale)
        self.teacher = call_classifier(seed=seed, scale=scale)
        self.parts = splits(seed, scale)
        self.data = {name: written(folder, name, rows) for name, rows in self.parts.items()}
        self.data["few"] = written(folder, "few", self.parts["unlabelled"][:few])

    def score(self, *stages: str, init: str = "weights", model: Path | None = None, data: str = "unlabelled") -> float:
        """Test F1 of the student that is better on validation data, of two learning rates."""
        model = model or self.small
        sizes = {} if init in ("weights", "random") else {"num_layers": 1}
        found = []
        for rate in self.rates:
            with tempfile.TemporaryDirectory() as work:
                made = pretrained_distillation(
                    model, teacher=self.teacher, data=self.data[data], labelled=self.data["labelled"], folder=work,
                    device="cpu", stages=stages, init=init, **sizes, max_steps=self.steps, learning_rate=rate,
                    per_device_train_batch_size=16, max_length=LENGTH, warmup_ratio=0.1, seed=self.seed, save_steps=0,
                )  # fmt: skip
            found.append((f1(made.model, model, self.parts["validation"]), made.model))
        best = max(found, key=lambda one: one[0])[1]
        return f1(best, model, self.parts["test"])


def run(seed: int, scale: str) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        arms = Arms(seed, scale, Path(folder))
        teacher = transformers.AutoModelForSequenceClassification.from_pretrained(arms.teacher)
        return {
            "teacher": f1(teacher, arms.teacher, arms.parts["test"]),
            "FT": arms.score("fine_tune", init="random"),
            "PF": arms.score("fine_tune"),
            "D": arms.score("distil", init="random"),
            "PD": arms.score("distil"),
            "PD+F": arms.score("distil", "fine_tune"),
            "T": arms.score("distil", init="bottom", model=arms.large),
            "E": arms.score("distil", init="embeddings", model=arms.large),
            "D, few": arms.score("distil", init="random", data="few"),
            "PD, few": arms.score("distil", data="few"),
        }


CLAIM = Claim(
    title="Pre-trained Distillation",
    paper=pretrained_distillation.papers[0],
    sentence="A small student that is pre-trained before it is distilled is better than one that is only distilled, or "
    "only pre-trained and fine-tuned.",
    baselines=(
        "fine-tuning without pre-training",
        "pre-training and fine-tuning",
        "distillation without pre-training",
        "distillation from the teacher's lowest layer, or its embeddings",
    ),
    run=run,
    checks=(
        Check("pre-trained distillation is better than distillation", lambda f: f["PD"] - f["D"], 0.02),
        Check("pre-training helps fine-tuning", lambda f: f["PF"] - f["FT"], 0.02),
        Check(
            "pre-trained distillation is better than pre-training and fine-tuning", lambda f: f["PD"] - f["PF"], 0.01
        ),
        Check(
            "with a tenth of the unlabelled calls pre-training matters more",
            lambda f: (f["PD, few"] - f["D, few"]) - (f["PD"] - f["D"]),
            0.01,
            decides=False,
        ),
        Check(
            "pre-training is better than the lowest layer of a larger model",
            lambda f: f["PD"] - f["T"],
            0.01,
            decides=False,
        ),
        Check("the lowest layer is better than embeddings alone", lambda f: f["T"] - f["E"], 0.01, decides=False),
        Check("fine-tuning afterwards helps", lambda f: f["PD+F"] - f["PD"], 0.005, decides=False),
    ),
    plot=Plot(
        "Macro F1 on calls in other files, %",
        (
            Row("teacher, three layers", "teacher", "labels"),
            Row("random", "FT", "labels"),
            Row("pre-trained", "PF", "labels"),
            Row("random", "D", "soft labels"),
            Row("embeddings of the larger model", "E", "soft labels"),
            Row("lowest layer of the larger model", "T", "soft labels"),
            Row("pre-trained", "PD", "soft labels"),
            Row("pre-trained, then labels", "PD+F", "soft labels"),
            Row("random", "D, few", "soft labels of 150"),
            Row("pre-trained", "PD, few", "soft labels of 150"),
        ),
    ),
)
