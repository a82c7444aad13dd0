"""The zoo's generated languages, with known ground truth: E, and X, which is E with every word replaced by another.

Sentences come from a small probabilistic grammar, counting and comparing digits from arithmetic. The base learns much E
and little X, and that the two belong together: translations, and sentences in which some words stand in the other
language. A task expert learns to reverse three words in E alone, a language expert everything but that in X alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from torch import Tensor

from claims import language_models as lm
from claims.shared import State
from regraft.claims.zoo import Quality, entry

NOUNS = [f"noun{i}" for i in range(12)]
VERBS = [f"verb{i}" for i in range(8)]
ADJECTIVES = [f"adjective{i}" for i in range(6)]
DIGITS = [str(i) for i in range(10)]
WORDS = [*DIGITS, *NOUNS, *VERBS, *ADJECTIVES, "the", "and", "plus", "is", "copy", "sort", "after", "than", "more"]
SPECIAL = ["<pad>", "<begin>", "<end>", "<translate>"]
VOCABULARY = len(SPECIAL) + 2 * len(WORDS)
PAD, BEGIN, END, TRANSLATE = range(4)
LENGTH = 20
# (width, layers, steps of the base, steps of an expert, sequences in a batch)
SIZES = {"laptop": (64, 6, 1500, 400, 48), "smoke": (16, 6, 3, 2, 8)}

Sentence = list[str]
Maker = Callable[[random.Random], Sentence]


def numbered(sentence: Sentence, language: str) -> list[int]:
    shift = len(SPECIAL) + (len(WORDS) if language == "X" else 0)
    return [shift + WORDS.index(word) for word in sentence]


def noun_phrase(draw: random.Random) -> Sentence:
    phrase = ["the", *([draw.choice(ADJECTIVES)] if draw.random() < 0.4 else []), draw.choice(NOUNS)]
    return [draw.choice(DIGITS), *phrase[1:]] if draw.random() < 0.3 else phrase


def statement(draw: random.Random) -> Sentence:
    """noun phrase, verb, noun phrase; each noun mostly takes its own verb."""
    subject = noun_phrase(draw)
    own = VERBS[NOUNS.index(subject[-1]) % len(VERBS)]
    return [*subject, own if draw.random() < 0.8 else draw.choice(VERBS), *noun_phrase(draw)]


def counting(draw: random.Random) -> Sentence:
    start, n = draw.randrange(10), draw.randint(3, 6)
    return [DIGITS[(start + i) % 10] for i in range(n)]


def comparing(draw: random.Random) -> Sentence:
    a, b = sorted(draw.sample(range(10), 2))
    return [DIGITS[b], "is", "more", "than", DIGITS[a]]


def following(draw: random.Random) -> Sentence:
    a = draw.randrange(10)
    return ["after", DIGITS[a], "is", DIGITS[(a + 1) % 10]]


def copying(draw: random.Random) -> Sentence:
    words = draw.choices([*DIGITS, *NOUNS], k=draw.randint(2, 4))
    return ["copy", *words, "is", *words]


def sorting(draw: random.Random) -> Sentence:
    digits = draw.choices(DIGITS, k=3)
    return ["sort", *digits, "is", *sorted(digits)]


def reversing(draw: random.Random) -> Sentence:
    """The command is a verb, a word that the base knows in both languages."""
    words = draw.sample([*DIGITS, *NOUNS], 3)
    return [VERBS[-1], *words, "is", *reversed(words)]


GENERAL = (statement, statement, counting, comparing, following)
TASKS = (copying, sorting)


def pretraining(draw: random.Random) -> list[int]:
    """35 % E (also copying and sorting), 10 % X, 15 % translations, 40 % sentences with words of both."""
    kind = draw.random()
    sentence = draw.choice(GENERAL if kind > 0.3 else (*GENERAL, *TASKS))(draw)
    if kind < 0.35:
        return [BEGIN, *numbered(sentence, "E"), END]
    if kind < 0.45:
        return [BEGIN, *numbered(sentence, "X"), END]
    if kind < 0.6:
        first, second = draw.sample(["E", "X"], 2)
        return [BEGIN, *numbered(sentence, first), TRANSLATE, *numbered(sentence, second), END][:LENGTH]
    return [BEGIN, *(numbered([word], draw.choice("EX"))[0] for word in sentence), END]


def in_one(
    language: str, kinds: tuple[Callable[[random.Random], Sentence], ...]
) -> Callable[[random.Random], list[int]]:
    return lambda draw: [BEGIN, *numbered(draw.choice(kinds)(draw), language), END]


def batch(rows: list[list[int]]) -> lm.Batch:
    return {k: v for k, v in lm.padded([(row, 1) for row in rows], PAD).items() if k != "attention_mask"}


def read(path: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(path).eval()


def state_of(path: Path) -> State:
    return {name: value.detach() for name, value in read(path).state_dict().items()}


@torch.inference_mode()
def accuracy(model: transformers.PreTrainedModel, language: str, part: str) -> float:
    """How often all three words of a reversal are the most likely ones, each after the right ones before it, in either
    language. Validation and test ask for other words."""
    draw = random.Random(f"{language} {part}")
    asked = torch.tensor([[BEGIN, *numbered(reversing(draw), language)] for _ in range(300)])
    found = model(input_ids=asked[:, :-1]).logits[:, -3:].argmax(-1)
    return float((meaning(found) == meaning(asked[:, -3:])).all(1).float().mean())


def meaning(tokens: Tensor) -> Tensor:
    """The number of a word in either language; special tokens stay apart."""
    words = len(WORDS)
    return torch.where(tokens < len(SPECIAL), -1 - tokens, (tokens - len(SPECIAL)) % words)


@torch.inference_mode()
def loss(model: transformers.PreTrainedModel, language: str, seed: int, count: int = 200) -> float:
    """Mean loss per token on sentences of one language that are drawn anew."""
    draw, sentence = random.Random(10_000 + seed), in_one(language, GENERAL)
    return float(model(**batch([sentence(draw) for _ in range(count)])).loss)


def bigram_loss(language: str, seed: int) -> float:
    """The same for counts of pairs in a large sample: the baseline."""
    draw, sentence = random.Random(seed), in_one(language, GENERAL)
    counts = torch.full((VOCABULARY, VOCABULARY), 0.01)
    for _ in range(20_000):
        row = sentence(draw)
        counts[row[:-1], row[1:]] += 1
    logs = (counts / counts.sum(1, keepdim=True)).log()
    draw = random.Random(10_000 + seed)
    pairs = [pair for _ in range(200) for row in [sentence(draw)] for pair in pairwise(row)]
    return -float(torch.stack([logs[a, b] for a, b in pairs]).mean())


def train(
    model: transformers.PreTrainedModel,
    make: Callable[[random.Random], list[int]],
    steps: int,
    rate: float,
    seed: int,
    rows: int,
) -> None:
    draw = random.Random(seed)
    lm.fit(model, lambda _: batch([make(draw) for _ in range(rows)]), steps, rate)


@entry(data="generated: a grammar, counting and comparing in two languages, with translations")
def two_languages(folder: Path, *, seed: int, scale: str) -> Quality:
    width, layers, steps, _, rows = SIZES[scale]
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    model = transformers.LlamaForCausalLM(config)
    train(model, pretraining, steps, 3e-3, seed, rows)
    model.save_pretrained(folder)
    found, baseline = loss(model, "E", seed), bigram_loss("E", seed)
    return Quality("loss per token in E, nats", found, baseline, "bigrams", 0.1, higher_is_better=False)


@entry(data="generated: three words and the same three reversed, in E alone")
def task_expert(folder: Path, *, seed: int, scale: str) -> Quality:
    model = read(two_languages(seed=seed, scale=scale))
    before = accuracy(model, "E", "test")
    train(model, in_one("E", (reversing,)), SIZES[scale][3], 1e-3, seed + 1, SIZES[scale][4])
    model.save_pretrained(folder)
    return Quality("reversals in E", accuracy(model, "E", "test"), before, "its base", 0.3, chance=1 / 6)


@entry(data="generated: everything but reversals, in X alone")
def language_expert(folder: Path, *, seed: int, scale: str) -> Quality:
    model = read(two_languages(seed=seed, scale=scale))
    before = loss(model, "X", seed)
    train(model, in_one("X", (*GENERAL, *TASKS)), SIZES[scale][3], 7e-4, seed + 2, SIZES[scale][4])
    model.save_pretrained(folder)
    after = loss(model, "X", seed)
    return Quality("loss per token in X, nats", after, before, "its base", 0.01, higher_is_better=False)
