"""Two tasks that encoders of code are fine-tuned to, with few examples each, so that what they know before counts.

Which package is a function from, by the first sentence of its docstring? And what is each token of a piece of code: a
keyword, a name that is defined, called, looked up or otherwise used, a string, a comment, a number, or anything else?
"""

from __future__ import annotations

import copy
import functools
import io
import keyword
import random
import statistics
import tokenize
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from sklearn.metrics import f1_score
from torch import Tensor, nn

from claims import corpus
from claims import language_models as lm
from claims.shared import best, grid

LENGTH = 48
PACKAGES = 6
OTHER, KEYWORD, DEFINED, CALLED, ATTRIBUTE, NAME, STRING, COMMENT, NUMBER = range(9)
RATES = (1e-3, 4e-3)
Tokenizer = transformers.PreTrainedTokenizerFast


@dataclass(frozen=True)
class Task:
    """Tokens (n, T) with a mask, and labels (n,) or (n, T), by part: train, validation, test."""

    classes: int
    parts: dict[str, tuple[Tensor, Tensor, Tensor]]


def packages(tokenizer: Tokenizer, files: Sequence[corpus.Source], seed: int, train: int) -> Task:
    """The package of a function by its docstring's first sentence; the packages with most functions."""
    found = corpus.functions(files)
    most = [top for top, _ in Counter(function.top for function in found).most_common(PACKAGES)]
    chosen = [function for function in found if function.top in most]
    random.Random(seed).shuffle(chosen)
    encoded = tokenizer(
        [f.summary for f in chosen], truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt",
        add_special_tokens=False,
    )  # fmt: skip
    labels = torch.tensor([most.index(function.top) for function in chosen])
    return _parted(PACKAGES, encoded["input_ids"], encoded["attention_mask"].bool(), labels, train)


def kinds(tokenizer: Tokenizer, files: Sequence[corpus.Source], seed: int, train: int) -> Task:
    """The kind of each token of a piece of code."""
    rows, tags = [], []
    for source in files:
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
    inputs, labels = (torch.tensor([values[i] for i in order[:600]]) for values in (rows, tags))
    return _parted(9, inputs, torch.ones_like(inputs, dtype=torch.bool), labels, train)


def _parted(classes: int, inputs: Tensor, mask: Tensor, labels: Tensor, train: int) -> Task:
    """`train` examples to train with, as many to choose by, and all others for the test; a third each of few."""
    train = min(train, len(inputs) // 3)
    cuts = {"train": slice(0, train), "validation": slice(train, 2 * train), "test": slice(2 * train, None)}
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


def examined(encoder: Any, tasks: dict[str, Task], steps: int, runs: int) -> dict[str, float]:
    """Macro F1 on the test of each task, and their mean, after fine-tuning `runs` times with the rate that is best on
    validation data."""
    found = {}
    for name, task in tasks.items():
        tuned = functools.partial(_tuned, encoder, task, steps)
        chosen, _ = best(grid(rate=RATES), functools.partial(tuned, 0, "validation"))
        found[name] = statistics.fmean(tuned(run, "test", **chosen) for run in range(runs))
    return {**found, "mean": statistics.fmean(found.values())}


def _tuned(encoder: Any, task: Task, steps: int, run: int, part: str, rate: float) -> float:
    inputs, mask, labels = task.parts["train"]
    torch.manual_seed(run)
    reader = Reader(copy.deepcopy(encoder), encoder.config.hidden_size, task.classes, labels.ndim == 2)
    draws = torch.Generator().manual_seed(run)

    def batch(_: int) -> lm.Batch:
        rows = torch.randint(len(inputs), (16,), generator=draws)
        return {"input_ids": inputs[rows], "mask": mask[rows], "labels": labels[rows]}

    lm.fit(reader, batch, steps, rate)  # type: ignore[arg-type]
    with torch.inference_mode():
        inputs, mask, labels = task.parts[part]
        pieces = zip(inputs.split(64), mask.split(64), strict=True)
        guesses = torch.cat([reader(i, m).logits.argmax(-1) for i, m in pieces])
    classes = range(task.classes)
    return float(f1_score(labels.flatten(), guesses.flatten(), average="macro", labels=classes, zero_division=0.0))
