"""The zoo's decoder of text and its descendants: a small Llama pre-trained on the standard library's source, tuned to
instructions without the domain, continued on the domain without instructions, and their further lineage.

An instruction asks about a function by its name; answers are taken from its docstring or its module:
`<|user|>what does getpass do?<|assistant|>Prompt for a password, with echo turned off.<|end|>`. The special tokens
occur in no raw text, so that only instruction tuning teaches them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from torch import Tensor

from claims import corpus
from claims import language_models as lm
from claims.corpus import Function
from claims.shared import State
from regraft.claims.zoo import Quality, entry

LENGTH, BATCH = 128, 8
# (width, layers, vocabulary, steps of pre-training, steps of continuing, steps of instruction tuning)
SIZES = {"laptop": (96, 3, 1024, 2000, 250, 250), "smoke": (16, 2, 300, 3, 2, 2)}


def read(path: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(path).eval()


def state_of(path: Path) -> State:
    return {name: value.detach() for name, value in read(path).state_dict().items()}


def tokenizer_of(path: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(path)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def share(scale: str) -> float:
    return 0.06 if scale == "smoke" else 1.0


@lru_cache(maxsize=4)
def texts(domain: bool, seed: int, scale: str) -> tuple[list[str], list[str]]:
    """For training, and held out."""
    train, held = corpus.split(domain, seed, share(scale))
    return [source.text for source in train], [source.text for source in held]


@lru_cache(maxsize=8)
def ids(base: Path, domain: bool, seed: int, scale: str) -> tuple[Tensor, Tensor]:
    """Token ids of training and of held-out text."""
    tokenizer = tokenizer_of(base)
    train, held = texts(domain, seed, scale)
    return lm.encoded(tokenizer, train), lm.encoded(tokenizer, held)


@lru_cache(maxsize=4)
def questions(domain: bool, seed: int, scale: str) -> tuple[list[Function], list[Function]]:
    """Documented functions of the files that are trained on: for tuning, and held out for tests.

    Raw text of both has been seen; in the domain no instruction tuning of the general model has seen either.
    """
    found = corpus.functions(corpus.split(domain, seed, share(scale))[0])
    random.Random(seed).shuffle(found)
    cut = len(found) * 3 // 4 if not domain else len(found) // 2
    return found[:cut], found[cut:]


def ask(function: Function) -> str:
    return f"what does {function.name} do?"


def dialogues(
    tokenizer: transformers.PreTrainedTokenizerFast, found: Sequence[Function]
) -> list[tuple[list[int], int]]:
    """Two kinds of questions about each function: what it does, and where it is."""
    rows = [lm.dialogue(tokenizer, ask(f), f.summary) for f in found]
    return rows + [lm.dialogue(tokenizer, f"where is {f.name}?", f"In the module {f.top}.") for f in found]


@entry(data="1.5 million characters of the source of Python's standard library, none of them about the internet")
def decoder(folder: Path, *, seed: int, scale: str) -> Quality:
    width, layers, vocabulary, steps, _, _ = SIZES[scale]
    train, held = texts(False, seed, scale)
    tokenizer = lm.trained_tokenizer(train, vocabulary)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    seen, unseen = lm.encoded(tokenizer, train), lm.encoded(tokenizer, held)
    draws = generator(seed)
    lm.fit(model, lambda _: lm.windows(seen, LENGTH, BATCH, draws), steps, 5e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loss = lm.loss_on(model, unseen, LENGTH, 40_000)
    baseline = lm.trigram_loss(seen, unseen[:40_000], len(tokenizer))
    return Quality("loss per token, nats", loss, baseline, "trigrams", 0.05, higher_is_better=False)


@entry(data="0.7 million characters of the source of the standard library's modules about the internet")
def decoder_domain(folder: Path, *, seed: int, scale: str, start: str = "base") -> Quality:
    """Continued pre-training, of the base or of the instruct model."""
    base = decoder(seed=seed, scale=scale)
    origin = base if start == "base" else decoder_instruct(seed=seed, scale=scale)
    model, tokenizer = read(origin), tokenizer_of(base)
    train, held = ids(base, True, seed, scale)
    before = lm.loss_on(model, held, LENGTH, 40_000)
    draws = generator(seed + 1)
    lm.fit(model, lambda _: lm.windows(train, LENGTH, BATCH, draws), SIZES[scale][4], 1e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    after = lm.loss_on(model, held, LENGTH, 40_000)
    return Quality("loss per token of the domain, nats", after, before, "before", 0.05, higher_is_better=False)


@entry(data="questions about documented functions outside the domain, and their answers; a quarter held out")
def decoder_instruct(folder: Path, *, seed: int, scale: str) -> Quality:
    return _tuned(folder, decoder(seed=seed, scale=scale), False, seed, scale)


@entry(data="questions about half of the domain's documented functions, and their answers")
def decoder_domain_instruct(folder: Path, *, seed: int, scale: str) -> Quality:
    """The end of the domain's lineage: base, continued on the domain, tuned to the domain's questions."""
    return _tuned(folder, decoder_domain(seed=seed, scale=scale), True, seed, scale)


def _tuned(folder: Path, origin: Path, domain: bool, seed: int, scale: str) -> Quality:
    model, tokenizer = read(origin), tokenizer_of(origin)
    train, held = questions(domain, seed, scale)
    rows, pad = dialogues(tokenizer, train), tokenizer.pad_token_id
    test = dialogues(tokenizer, held[:100])
    before = float(lm.answer_losses(model, test, pad).mean())
    draws = random.Random(seed + 2)
    # Lightly: at 1e-3, tried with seed 100, a tuned model was worse at raw text than it had been by 0.7 nats.
    lm.fit(model, lambda _: lm.padded(draws.sample(rows, min(24, len(rows))), pad), SIZES[scale][5], 3e-4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    after = float(lm.answer_losses(model, test, pad).mean())
    return Quality("loss per token of answers, nats", after, before, "before", 0.3, higher_is_better=False)
