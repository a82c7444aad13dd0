"""Sums and differences of two numbers below 100, generated, so that the right answer is known.

A question is written as digits, `07+85=`, and its answer from the units up, `290`, in the order in which it is worked
out by hand. Which questions are for training, validation and test is a function of the question alone: no part has a
question of another, whatever the seed. Seeds vary the order of training and the initial weights.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from sklearn.linear_model import LogisticRegression

from claims import language_models as lm
from regraft.claims.zoo import Quality, entry

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": lambda a, b: a + b, "-": lambda a, b: abs(a - b)}
TOKENS = [*"0123456789", *OPERATIONS, "="]
QUESTION, ANSWER = 6, 3  # tokens
ANSWERS = {"+": 199, "-": 100}  # how many there are
PARTS = ("train", "validation", "test")
# (width, layers, steps, questions in a batch)
SIZES = {"laptop": (96, 2, 1200, 128), "smoke": (16, 1, 2, 16)}

Question = tuple[int, str, int]


def part_of(question: Question) -> str:
    """70 % for training, 10 % for validation, 20 % for tests."""
    number = hashlib.blake2b(repr(question).encode(), digest_size=4).digest()
    share = int.from_bytes(number, "big") / 2**32
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def questions(part: str, operations: str = "+-") -> list[Question]:
    """All questions of a part, in a fixed order."""
    every = ((a, sign, b) for sign in operations for a in range(100) for b in range(100))
    return [question for question in every if part_of(question) == part]


def right(question: Question) -> int:
    a, sign, b = question
    return OPERATIONS[sign](a, b)


def written(question: Question) -> list[int]:
    """Tokens of a question and of its answer."""
    a, sign, b = question
    asked, answer = f"{a:02d}{sign}{b:02d}=", f"{right(question):03d}"
    return [TOKENS.index(token) for token in [*asked, *reversed(answer)]]


def batch(some: list[Question]) -> lm.Batch:
    """Questions with answers; only answers are learnt."""
    ids = torch.tensor([written(question) for question in some])
    labels = ids.clone()
    labels[:, :QUESTION] = lm.IGNORED
    return {"input_ids": ids, "labels": labels}


@torch.inference_mode()
def accuracy(model: transformers.PreTrainedModel, some: list[Question]) -> float:
    """How often the whole answer is right, each digit the likeliest after those that the model gave before it."""
    ids = batch(some)["input_ids"]
    given = ids[:, :QUESTION]
    for _ in range(ANSWER):
        given = torch.cat([given, model(input_ids=given).logits[:, -1:].argmax(-1)], 1)
    return float((given == ids).all(1).float().mean())


def linear_accuracy(train: list[Question], test: list[Question]) -> float:
    """The baseline: logistic regression on the digits and the sign, for each digit of the answer."""

    def table(some: list[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = batch(some)["input_ids"]
        return torch.nn.functional.one_hot(ids[:, : QUESTION - 1], len(TOKENS)).flatten(1), ids[:, QUESTION:]

    (seen, digits), (asked, wanted) = table(train), table(test)
    guesses = [
        torch.tensor(LogisticRegression(max_iter=200).fit(seen.numpy(), digits[:, i].numpy()).predict(asked.numpy()))
        for i in range(ANSWER)
    ]
    return float((torch.stack(guesses, 1) == wanted).all(1).float().mean())


def fresh(scale: str, seed: int) -> transformers.LlamaForCausalLM:
    """A decoder of digits with random weights."""
    width, layers, _, _ = SIZES[scale]
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


@entry(data="generated: 70 % of all sums and differences of two numbers below 100")
def arithmetic(folder: Path, *, seed: int, scale: str, operations: str = "+-") -> Quality:
    _, _, steps, rows = SIZES[scale]
    train, test = (questions(part, operations) for part in ("train", "test"))
    model, draw = fresh(scale, seed), random.Random(seed)
    lm.fit(model, lambda _: batch(draw.sample(train, rows)), steps, 3e-3)
    model.save_pretrained(folder)
    few = 1 if scale == "laptop" else 50
    found, plain = accuracy(model, test[::few]), linear_accuracy(train[::few], test[::few])
    chance = sum(1 / ANSWERS[sign] for sign in operations) / len(operations)
    return Quality("whole answers right", found, plain, "logistic regression of digits", 0.3, chance=chance)


ENTRIES = {"arithmetic": (arithmetic, "LlamaForCausalLM", {})}
