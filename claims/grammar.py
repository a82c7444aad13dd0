"""A probabilistic context-free grammar with number agreement across nested clauses, whose probabilities are known.

`the old dogs that the cat sees chase a bird`: a verb agrees with its subject however much stands between the two, which
no n-gram sees. The inside algorithm gives the probability of a sentence, so that a model's loss can be held against the
least that is possible. Which sentences are for training, validation and test is a function of the sentence alone.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import torch
import transformers

from claims import language_models as lm
from regraft.claims.zoo import Quality, entry

NOUNS = {"S": ["dog", "cat", "bird", "child", "artist", "king", "river", "engine"]}
NOUNS["P"] = ["dogs", "cats", "birds", "children", "artists", "kings", "rivers", "engines"]
VERBS = {"S": ["sees", "chases", "likes", "follows", "hears"], "P": ["see", "chase", "like", "follow", "hear"]}
ADJECTIVES = ["old", "small", "quick", "green"]
DETERMINERS = {"S": ["the", "a", "every"], "P": ["the", "some", "many"]}
START, PAD, BEGIN, END = "S", 0, 1, 2
LONGEST = 20  # words; longer sentences are drawn anew

# A symbol's rules: (probability, right side). A right side is two symbols, one symbol that has rules, or one word.
Rules = dict[str, list[tuple[float, tuple[str, ...]]]]


def _evenly(share: float, words: list[str]) -> list[tuple[float, tuple[str, ...]]]:
    return [(share / len(words), (word,)) for word in words]


def rules() -> Rules:
    found: Rules = {START: [(0.5, ("NP_S", "VP_S")), (0.5, ("NP_P", "VP_P"))]}
    found["NP"] = [(0.5, ("NP_S",)), (0.5, ("NP_P",))]
    for number in "SP":
        found[f"NP_{number}"] = [(0.65, (f"D_{number}", f"N_{number}")), (0.35, (f"NQ_{number}", f"R_{number}"))]
        found[f"NQ_{number}"] = [(1.0, (f"D_{number}", f"N_{number}"))]
        found[f"N_{number}"] = [*_evenly(0.7, NOUNS[number]), (0.3, ("A", f"N_{number}"))]
        found[f"VP_{number}"] = [(0.7, (f"V_{number}", "NP")), (0.3, (f"V_{number}", "ADV"))]
        found[f"R_{number}"] = [(0.5, ("that", "O")), (0.5, ("that", f"VP_{number}"))]
        found[f"V_{number}"] = _evenly(1.0, VERBS[number])
        found[f"D_{number}"] = _evenly(1.0, DETERMINERS[number])
    found["O"] = [(0.5, ("NP_S", "V_S")), (0.5, ("NP_P", "V_P"))]  # a relative clause without its object
    found["A"], found["ADV"] = _evenly(1.0, ADJECTIVES), _evenly(1.0, ["often", "never"])
    return found


RULES = rules()
WORDS = sorted({part for right in RULES.values() for _, parts in right for part in parts} - set(RULES))
VOCABULARY = 3 + len(WORDS)
# (width, layers, steps, sentences in a batch)
SIZES = {"laptop": (64, 3, 1000, 48), "smoke": (16, 1, 2, 8)}

Sentence = tuple[str, ...]


def derived(draw: random.Random, symbol: str = START) -> Sentence:
    """A sentence of the grammar."""
    if symbol not in RULES:
        return (symbol,)
    weights, sides = zip(*RULES[symbol], strict=True)
    return tuple(word for part in draw.choices(sides, weights)[0] for word in derived(draw, part))


@lru_cache(maxsize=1)
def _by_right() -> tuple[dict[str, list[tuple[str, float]]], list[tuple[str, str, str, float]]]:
    """Rules with one symbol on the right by that symbol, and (left, first, second, probability) of the others."""
    single: dict[str, list[tuple[str, float]]] = defaultdict(list)
    double = []
    for left, sides in RULES.items():
        for probability, parts in sides:
            if len(parts) == 1:
                single[parts[0]].append((left, probability))
            else:
                double.append((left, parts[0], parts[1], probability))
    return single, double


def log_probability(sentence: Sentence) -> float:
    """That the grammar derives exactly this, in nats, by the inside algorithm; -inf if it cannot."""
    single, double = _by_right()
    chart: dict[tuple[int, int], dict[str, float]] = {}
    count = len(sentence)
    for length in range(1, count + 1):
        for start in range(count - length + 1):
            cell: dict[str, float] = defaultdict(float)
            if length == 1:
                cell[sentence[start]] = 1.0
            for middle in range(start + 1, start + length):
                first, second = chart[start, middle], chart[middle, start + length]
                for left, a, b, probability in double:
                    if a in first and b in second:
                        cell[left] += probability * first[a] * second[b]
            waiting = list(cell.items())
            while waiting:  # no symbol leads to itself by single rules, so this ends
                symbol, inside = waiting.pop()
                for left, probability in single.get(symbol, ()):
                    cell[left] += probability * inside
                    waiting.append((left, probability * inside))
            chart[start, start + length] = cell
    found = chart[0, count].get(START, 0.0)
    return math.log(found) if found else -math.inf


def part_of(sentence: Sentence) -> str:
    """80 % for training, 10 % for validation, 10 % for tests."""
    share = hashlib.blake2b(" ".join(sentence).encode(), digest_size=1).digest()[0] / 256
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def drawn(draw: random.Random, part: str) -> Sentence:
    """A sentence of a part that is not too long."""
    while True:
        sentence = derived(draw)
        if len(sentence) <= LONGEST and part_of(sentence) == part:
            return sentence


def numbered(sentence: Sentence) -> list[int]:
    return [BEGIN, *(3 + WORDS.index(word) for word in sentence), END]


def batch(sentences: list[Sentence]) -> lm.Batch:
    return {k: v for k, v in lm.padded([(numbered(s), 1) for s in sentences], PAD).items() if k != "attention_mask"}


@lru_cache(maxsize=2)
def tested(count: int) -> tuple[Sentence, ...]:
    """Sentences of the test part, the same for all seeds."""
    draw = random.Random("test")
    return tuple(drawn(draw, "test") for _ in range(count))


def least_loss(sentences: list[Sentence]) -> float:
    """The grammar's own loss per token, the end of a sentence being a token as well."""
    return -sum(map(log_probability, sentences)) / sum(len(sentence) + 1 for sentence in sentences)


@torch.inference_mode()
def loss(model: transformers.PreTrainedModel, sentences: list[Sentence]) -> float:
    return float(model(**batch(sentences)).loss)


def trigram_loss(train: list[Sentence], test: list[Sentence]) -> float:
    """Over the tokens of sentences, each of which begins with two beginnings that are not counted."""

    def ids(sentences: list[Sentence]) -> torch.Tensor:
        return torch.tensor([i for sentence in sentences for i in numbered(sentence)])

    total = lm.trigram_loss(ids(train), ids(test), VOCABULARY)
    tokens = sum(len(sentence) + 2 for sentence in test)
    return total * tokens / (tokens - len(test))  # after an end there is a beginning, which costs next to nothing


@entry(data="generated: a grammar in which verbs agree with nouns that nested clauses part them from")
def grammar(folder: Path, *, seed: int, scale: str) -> Quality:
    width, layers, steps, rows = SIZES[scale]
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    model, draw = transformers.LlamaForCausalLM(config), random.Random(seed)
    lm.fit(model, lambda _: batch([drawn(draw, "train") for _ in range(rows)]), steps, 3e-3)
    model.save_pretrained(folder)
    count = 400 if scale == "laptop" else 10
    test, sample = list(tested(count)), [drawn(draw, "train") for _ in range(50 * count)]
    least = least_loss(test)
    found, plain = loss(model, test) - least, trigram_loss(sample, test) - least
    chance = math.log(VOCABULARY) - least
    metric = "loss per token beyond the grammar's own, nats"
    return Quality(metric, found, plain, "trigrams", plain / 2, chance=chance, higher_is_better=False)


ENTRIES = {"grammar": (grammar, "LlamaForCausalLM", {})}
