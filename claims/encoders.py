"""The zoo's deep encoder of text, for smaller ones to learn from, and two tasks that encoders are fine-tuned to.

Which package is a function from, by the first sentence of its docstring? And what is each token of a piece of code: a
keyword, a name that is defined, called, looked up or otherwise used, a string, a comment, a number, or anything else?
Both have few training examples, so that what an encoder knows before counts.
"""

from __future__ import annotations

import io
import keyword
import random
import tokenize
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from sklearn.metrics import f1_score
from torch import Tensor, nn

from claims import corpus
from claims import language_models as lm
from regraft.claims.zoo import Quality, entry

LENGTH = 48
# Width, layers, vocabulary, steps.
SIZES = {"laptop": (128, 4, 1024, 1000), "smoke": (16, 4, 300, 2)}
PACKAGES = 8
OTHER, KEYWORD, DEFINED, CALLED, ATTRIBUTE, NAME, STRING, COMMENT, NUMBER = range(9)


@lru_cache(maxsize=4)
def files(seed: int, scale: str) -> tuple[list[corpus.Source], list[corpus.Source]]:
    """Files outside the domain: for training, and held out."""
    return corpus.split(False, seed, 0.06 if scale == "smoke" else 1.0)


@lru_cache(maxsize=4)
def ids(encoder: Path, seed: int, scale: str) -> Tensor:
    """The text of pre-training as tokens."""
    return lm.encoded(tokenizer_of(encoder), [source.text for source in files(seed, scale)[0]])


@lru_cache(maxsize=4)
def tokenizer_of(encoder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(encoder)


def masked(rows: Tensor, mask: int, draws: torch.Generator) -> lm.Batch:
    """15 % of the tokens are asked for, and masked."""
    asked = torch.rand(rows.shape, generator=draws) < 0.15
    labels = torch.where(asked, rows, torch.full_like(rows, lm.IGNORED))
    return {"input_ids": torch.where(asked, torch.full_like(rows, mask), rows), "labels": labels}


@entry(data="the text of the decoder's pre-training, with 15 % of the tokens masked")
def deep_encoder(folder: Path, *, seed: int, scale: str) -> Quality:
    width, layers, vocabulary, steps = SIZES[scale]
    train, held = ([source.text for source in part] for part in files(seed, scale))
    tokenizer = lm.trained_tokenizer(train, vocabulary)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.BertForMaskedLM(config)
    seen, unseen = lm.encoded(tokenizer, train), lm.encoded(tokenizer, held)
    draws, mask = torch.Generator().manual_seed(seed), tokenizer.mask_token_id
    lm.fit(model, lambda _: masked(lm.windows(seen, LENGTH, 32, draws)["input_ids"], mask, draws), steps, 2e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fixed = torch.Generator().manual_seed(0)
    batch = masked(lm.windows(unseen, LENGTH, 300, fixed)["input_ids"], mask, fixed)
    with torch.inference_mode():
        guesses = model(input_ids=batch["input_ids"]).logits.argmax(-1)
    asked = batch["labels"] != lm.IGNORED
    counts = torch.zeros(len(tokenizer), len(tokenizer))
    counts.index_put_((seen[:-1], seen[1:]), torch.ones(len(seen) - 1), accumulate=True)
    bigrams = counts.argmax(1)[batch["input_ids"].roll(1, 1)]
    found, plain = (float((one == batch["labels"])[asked].float().mean()) for one in (guesses, bigrams))
    return Quality("accuracy on masked tokens", found, plain, "bigrams", 0.05)


# -- tasks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Tokens (n, T) with a mask, and labels (n,) or (n, T), by part: train, validation, test."""

    classes: int
    parts: dict[str, tuple[Tensor, Tensor, Tensor]]


def packages(encoder: Path, seed: int, scale: str) -> Task:
    """The package of a function by its docstring's first sentence."""
    found = corpus.functions(files(seed, scale)[0])
    most = [top for top, _ in Counter(function.top for function in found).most_common(PACKAGES)]
    chosen = [function for function in found if function.top in most]
    random.Random(seed).shuffle(chosen)
    encoded = tokenizer_of(encoder)(
        [f.summary for f in chosen], truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt",
        add_special_tokens=False,
    )  # fmt: skip
    labels = torch.tensor([most.index(function.top) for function in chosen])
    return _parted(PACKAGES, encoded["input_ids"], encoded["attention_mask"].bool(), labels, 300, 200, scale)


def kinds(encoder: Path, seed: int, scale: str) -> Task:
    """The kind of each token of a piece of code, from files that no encoder was pre-trained on."""
    tokenizer, rows, tags = tokenizer_of(encoder), [], []
    for source in files(seed, scale)[1]:
        classes = _classes(source.text)
        if classes is None:
            continue
        encoded = tokenizer(source.text, add_special_tokens=False, return_offsets_mapping=True)
        marks = [_first(classes, begin, end, source.text) for begin, end in encoded["offset_mapping"]]
        for start in range(0, len(marks) - LENGTH, 3 * LENGTH):
            rows.append(encoded["input_ids"][start : start + LENGTH])
            tags.append(marks[start : start + LENGTH])
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    order = order[:900]
    inputs, labels = (torch.tensor([values[i] for i in order]) for values in (rows, tags))
    return _parted(9, inputs, torch.ones_like(inputs, dtype=torch.bool), labels, 150, 150, scale)


def _parted(classes: int, inputs: Tensor, mask: Tensor, labels: Tensor, train: int, check: int, scale: str) -> Task:
    if scale == "smoke":
        train = check = len(inputs) // 3
    cuts = {"train": slice(0, train), "validation": slice(train, train + check), "test": slice(train + check, None)}
    return Task(classes, {name: (inputs[cut], mask[cut], labels[cut]) for name, cut in cuts.items()})


def _classes(code: str) -> list[int] | None:
    """The kind of each character; None for a file that Python cannot read as tokens."""
    starts = [0]
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = [OTHER] * len(code)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    for i, token in enumerate(tokens):
        before = tokens[i - 1].string if i else ""
        after = tokens[i + 1].string if i + 1 < len(tokens) else ""
        kind = OTHER
        if token.type == tokenize.NAME:
            kind = KEYWORD if keyword.iskeyword(token.string) else NAME
            if kind == NAME and before in ("def", "class"):
                kind = DEFINED
            elif kind == NAME and after == "(":
                kind = CALLED
            elif kind == NAME and before == ".":
                kind = ATTRIBUTE
        elif token.type == tokenize.COMMENT:
            kind = COMMENT
        elif token.type == tokenize.NUMBER:
            kind = NUMBER
        elif token.type == tokenize.STRING or "STRING" in tokenize.tok_name[token.type]:
            kind = STRING
        begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        found[begin:end] = [kind] * (end - begin)
    return found


def _first(classes: Sequence[int], begin: int, end: int, code: str) -> int:
    """The kind of a token's first character that is no space."""
    return next((classes[i] for i in range(begin, end) if not code[i].isspace()), classes[begin])


class Reader(nn.Module):
    """An encoder with a linear layer on each token, or on the mean of them."""

    def __init__(self, encoder: Any, width: int, classes: int, each: bool) -> None:
        super().__init__()
        self.encoder, self.head, self.each = encoder, nn.Linear(width, classes), each

    def forward(self, input_ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Any:
        states = self.encoder(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        if not self.each:
            states = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        logits = self.head(states)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def fine_tuned(make: Callable[[], Any], task: Task, rate: float, steps: int, seed: int) -> Reader:
    """An encoder, made anew, fine-tuned to a task."""
    inputs, mask, labels = task.parts["train"]
    torch.manual_seed(seed)
    encoder = make()
    reader = Reader(encoder, encoder.config.hidden_size, task.classes, labels.ndim == 2)
    draws = torch.Generator().manual_seed(seed)

    def batch(_: int) -> lm.Batch:
        rows = torch.randint(len(inputs), (16,), generator=draws)
        return {"input_ids": inputs[rows], "mask": mask[rows], "labels": labels[rows]}

    lm.fit(reader, batch, steps, rate)  # type: ignore[arg-type]
    return reader


@torch.inference_mode()
def score(reader: Reader, task: Task, part: str) -> float:
    """Macro F1."""
    inputs, mask, labels = task.parts[part]
    guesses = torch.cat([reader(i, m).logits.argmax(-1) for i, m in zip(inputs.split(64), mask.split(64), strict=True)])
    classes = range(task.classes)
    return float(f1_score(labels.flatten(), guesses.flatten(), average="macro", labels=classes, zero_division=0.0))
