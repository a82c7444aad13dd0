"""What models of text have in common: a tokenizer, training on windows or on questions, and n-gram baselines."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

PAD, USER, ASSISTANT, END, MASK, CLS = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|mask|>", "<|cls|>"
SPECIAL = [PAD, USER, ASSISTANT, END, MASK, CLS]
IGNORED = -100

Batch = dict[str, Tensor]


def trained_tokenizer(texts: Iterable[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with `size` tokens; with 256 and the special ones it is a tokenizer of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, mask_token=MASK, cls_token=CLS
    )


def encoded(tokenizer: transformers.PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """Texts one after the other as token ids, int64 (n,), without special tokens."""
    return torch.tensor([i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]])


def windows(ids: Tensor, length: int, count: int, generator: torch.Generator) -> Batch:
    """`count` windows at random places, each its own label."""
    starts = torch.randint(0, len(ids) - length, (count,), generator=generator)
    batch = torch.stack([ids[start : start + length] for start in starts.tolist()])
    return {"input_ids": batch, "labels": batch}


def fit(
    model: transformers.PreTrainedModel, batches: Callable[[int], Batch], steps: int, rate: float, decay: float = 0.05
) -> None:
    """AdamW; the rate rises over a tenth of the steps, then falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, betas=(0.9, 0.98))
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))
    )
    model.train()
    for step in range(steps):
        loss = model(**batches(step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def loss_on(model: transformers.PreTrainedModel, ids: Tensor, length: int, most: int) -> float:
    """Mean loss per token, in nats, over the first `most` tokens in windows that do not overlap."""
    rows = ids[: min(len(ids), most) // length * length].view(-1, length)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(32)]
    return sum(losses) / len(rows)


def dialogue(
    tokenizer: transformers.PreTrainedTokenizerFast, question: str, answer: str | None = None
) -> tuple[list[int], int]:
    """Ids of a question in the chat format, with its answer if given, and where the answer begins."""
    head = tokenizer(f"{USER}{question}{ASSISTANT}", add_special_tokens=False)["input_ids"]
    if answer is None:
        return head, len(head)
    return head + tokenizer(f"{answer}{END}", add_special_tokens=False)["input_ids"], len(head)


def padded(rows: Sequence[tuple[list[int], int]], pad: int) -> Batch:
    """Dialogues as a batch whose labels are the answers alone."""
    longest = max(len(ids) for ids, _ in rows)
    inputs = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, (ids, begin) in enumerate(rows):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, begin : len(ids)] = torch.tensor(ids[begin:])
        mask[row, : len(ids)] = 1
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


@torch.inference_mode()
def answer_losses(model: transformers.PreTrainedModel, rows: Sequence[tuple[list[int], int]], pad: int) -> Tensor:
    """Mean loss per token of each answer, (n,)."""
    found = []
    for start in range(0, len(rows), 64):
        batch = padded(rows[start : start + 64], pad)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        found.append(losses.sum(1) / (labels != IGNORED).sum(1))
    return torch.cat(found)


def trigram_loss(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """Mean loss per token of a trigram model with Witten-Bell smoothing: the baseline of language models."""
    tokens = train.tolist()
    tables: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(3)]
    for order, table in enumerate(tables):
        for i in range(order, len(tokens)):
            table[tuple(tokens[i - order : i])][tokens[i]] += 1
    sums = [{context: sum(counts.values()) for context, counts in table.items()} for table in tables]

    def probability(context: tuple[int, ...], token: int) -> float:
        lower = probability(context[1:], token) if context else 1 / vocabulary
        counts = tables[len(context)].get(context)
        if counts is None:
            return lower
        return (counts[token] + len(counts) * lower) / (sums[len(context)][context] + len(counts))

    held = test.tolist()
    return -sum(math.log(probability(tuple(held[i - 2 : i]), held[i])) for i in range(2, len(held))) / (len(held) - 2)
