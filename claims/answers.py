"""Models that answer the tasks of text: the published encoder, and the zoo's own encoder and decoder, fine-tuned.

Where examples are few, what a model knows beforehand decides, and n-grams know nothing beforehand; so the published
MiniLM answers those that ask what words mean. Only its last layers are trained: what the others make of each text is
computed once. It was made from public code and questions, and may have seen texts of the standard library, but not with
these labels. The zoo's own models have seen no file that is tested on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from claims import language_models as lm
from claims import linear, tasks, text, zoo
from claims.tasks import Matching, Passage, Task
from regraft.claims.zoo import Quality, entry

LAST_LAYERS = 2
CONTEXT = 48  # tokens before a call


class _Given(nn.Module):
    """In the place of embeddings: what is given as embeddings is taken as it is."""

    def forward(self, *, inputs_embeds: Tensor, **_: object) -> Tensor:
        return inputs_embeds


@contextmanager
def last_layers(model: nn.Module, count: int) -> Iterator[None]:
    """Within it, a BERT takes hidden states below its last layers as `inputs_embeds`."""
    embeddings, layers = model.embeddings, model.encoder.layer
    model.embeddings, model.encoder.layer = _Given(), layers[-count:]
    try:
        yield
    finally:
        model.embeddings, model.encoder.layer = embeddings, layers


@torch.inference_mode()
def below(bert: nn.Module, tokenizer: Callable[..., lm.Batch], texts: Sequence[str], length: int) -> lm.Batch:
    """What a BERT has of some texts before its last layers: `inputs_embeds` (n, L, D) and `attention_mask`."""
    found, masks = [], []
    for start in range(0, len(texts), 32):
        some = list(texts[start : start + 32])
        inputs = tokenizer(some, truncation=True, max_length=length, padding=True, return_tensors="pt")
        states = bert(**inputs, output_hidden_states=True).hidden_states[-1 - LAST_LAYERS]
        missing = length - states.shape[1]
        found.append(functional.pad(states, (0, 0, 0, missing)))
        masks.append(functional.pad(inputs["attention_mask"], (0, missing)))
    return {"inputs_embeds": torch.cat(found).clone(), "attention_mask": torch.cat(masks).clone()}


def cut(batch: lm.Batch, rows: Sequence[int]) -> lm.Batch:
    """Some rows of a batch, no longer than the longest of them."""
    mask = batch["attention_mask"][rows]
    longest = int(mask.sum(1).max())
    return {"inputs_embeds": batch["inputs_embeds"][rows, :longest], "attention_mask": mask[:, :longest]}


def mean_state(model: nn.Module, inputs: lm.Batch) -> Tensor:
    """Unit vectors (n, D)."""
    mask = inputs["attention_mask"].unsqueeze(-1)
    return functional.normalize((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


@torch.inference_mode()
def _vectors(model: nn.Module, inputs: lm.Batch) -> Tensor:
    """Unit vectors of all texts."""
    parts = torch.arange(len(inputs["attention_mask"])).split(64)
    return torch.cat([mean_state(model, cut(inputs, part.tolist())) for part in parts])


def class_means(vectors: Tensor, labels: Tensor, count: int) -> Tensor:
    """The directions of the classes' means, (count, D)."""
    return functional.normalize(torch.stack([vectors[labels == label].mean(0) for label in range(count)]), dim=-1)


def _classifier(folder: Path, task: Task, seed: int, scale: str, length: int) -> Quality:
    """MiniLM, trained so that texts are near the mean of their class; the nearest mean of the examples answers."""
    base = zoo.minilm(seed=0, scale=scale)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModel.from_pretrained(base).eval()
    train, test = (below(model, tokenizer, [p.text for p in task.parts[part]], length) for part in ("train", "test"))
    labels, wanted = (torch.tensor([p.label for p in task.parts[part]]) for part in ("train", "test"))
    draws, count = random.Random(seed), len(labels)
    rows, steps = min(32, count), 40 if scale == "laptop" else 1
    with last_layers(model, LAST_LAYERS):
        means = nn.Parameter(class_means(_vectors(model, train), labels, len(task.classes)).clone())
        trained = [p for layer in model.encoder.layer for p in layer.parameters()]
        optimizer = torch.optim.AdamW([*trained, means], lr=1e-4, weight_decay=0.01)
        for _ in range(steps):
            some = draws.sample(range(count), rows)
            similar = 20 * mean_state(model, cut(train, some)) @ functional.normalize(means, dim=-1).T
            loss = functional.cross_entropy(similar, labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        answers = (_vectors(model, test) @ class_means(_vectors(model, train), labels, len(task.classes)).T).argmax(1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, plain = float((answers == wanted).float().mean()), linear.classified(task)
    return Quality(f"accuracy: {task.question}", found, plain, "n-grams", 0.05, chance=task.chance)


@entry(data="paragraphs of docstrings and comments from eight packages of the standard library, at most 40 of each")
def task_module(folder: Path, *, seed: int, scale: str) -> Quality:
    return _classifier(folder, tasks.module(seed, scale), seed, scale, 64)


@entry(data="twelve times five words in a row, from code or from docstrings of the standard library")
def task_prose(folder: Path, *, seed: int, scale: str) -> Quality:
    return _classifier(folder, tasks.prose(seed, scale), seed, scale, 16)


def _matcher(folder: Path, task: Matching, seed: int, scale: str, length: int) -> Quality:
    """MiniLM, trained so that texts that belong together are nearer to one another than to others of the batch."""
    base = zoo.minilm(seed=0, scale=scale)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModel.from_pretrained(base).eval()
    sides = {
        part: [
            below(model, tokenizer, [getattr(p, side) for p in task.parts[part]], length) for side in ("left", "right")
        ]
        for part in ("train", "test")
    }
    draws, count = random.Random(seed), len(task.parts["train"])
    rows = min(32, count)
    trained = [p for layer in model.encoder.layer[-LAST_LAYERS:] for p in layer.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.05)
    with last_layers(model, LAST_LAYERS):
        for _ in range(3 * count // rows if scale == "laptop" else 1):
            some = draws.sample(range(count), rows)
            left, right = (mean_state(model, cut(side, some)) for side in sides["train"])
            similar = 20 * left @ right.T
            loss = functional.cross_entropy(similar, torch.arange(rows))
            loss = loss + functional.cross_entropy(similar.T, torch.arange(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left, right = (_vectors(model, side) for side in sides["test"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, plain = linear.found_in_groups((left @ right.T).numpy(), task.among), linear.matched(task)
    return Quality(f"one of {task.among}: {task.question}", found, plain, "shared n-grams", 0.05, chance=task.chance)


@entry(data="up to 1000 first sentences of docstrings and their functions, names hidden")
def task_retrieval(folder: Path, *, seed: int, scale: str) -> Quality:
    return _matcher(folder, tasks.retrieval(seed, scale), seed, scale, 64)


@entry(data="interactive examples of the standard library's docstrings and their outputs, half of the files")
def task_doctest(folder: Path, *, seed: int, scale: str) -> Quality:
    return _matcher(folder, tasks.doctest(seed, scale), seed, scale, 40)


def _row(tokenizer: transformers.PreTrainedTokenizerFast, before: str, name: str) -> tuple[list[int], int]:
    """The end of the text before a call, and the method's name: ids, and where the name begins."""
    head = tokenizer(before, add_special_tokens=False)["input_ids"][-CONTEXT:]
    return head + tokenizer(name, add_special_tokens=False)["input_ids"], len(head)


@entry(data="100 calls of twenty methods in the source of the standard library, and the text before them")
def task_call(folder: Path, *, seed: int, scale: str) -> Quality:
    """The decoder goes on as it was trained, with the name of the method after the dot, and of all names that it could
    write the likeliest counts."""
    task = tasks.call(seed, scale)
    base = text.decoder(seed=seed, scale=scale)
    model, tokenizer = text.read(base), text.tokenizer_of(base)
    pad = tokenizer.pad_token_id
    rows = [_row(tokenizer, p.text, task.classes[p.label]) for p in task.parts["train"]]
    draws = random.Random(seed)
    steps = 20 if scale == "laptop" else 1
    lm.fit(model, lambda _: lm.padded(draws.sample(rows, min(32, len(rows))), pad), steps, 7e-4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, plain = named(model, tokenizer, task), linear.classified(task, end=24)
    return Quality(f"accuracy: {task.question}", found, plain, "n-grams", 0.05, chance=task.chance)


def named(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, task: Task, part: str = "test") -> float:
    """How often the right name is the likeliest of all classes after the text."""
    passages = task.parts[part]
    rows = [_row(tokenizer, passage.text, name) for passage in passages for name in task.classes]
    lengths = torch.tensor([len(ids) - begin for ids, begin in rows])
    losses = (lm.answer_losses(model, rows, tokenizer.pad_token_id) * lengths).view(len(passages), -1)
    return float((losses.argmin(1) == torch.tensor([p.label for p in passages])).float().mean())


@entry(data="6000 statements of the standard library with four brackets and quotes or more, half of them broken")
def task_balance(folder: Path, *, seed: int, scale: str) -> Quality:
    """Statements are broken anew whenever they are drawn."""
    task = tasks.balance(seed, scale)
    base = zoo.encoder(seed=seed, scale=scale)
    tokenizer = text.tokenizer_of(base)
    names = dict(enumerate(task.classes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, id2label=names, label2id={name: i for i, name in names.items()}
    )
    whole = tasks.statements(seed, scale)["train"]
    draws = random.Random(seed)
    rows = min(64, len(whole))

    def batch(_: int) -> lm.Batch:
        return encoded(tokenizer, tasks.damaged(draws.sample(whole, rows), draws))

    lm.fit(model, batch, 300 if scale == "laptop" else 1, 1e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.inference_mode():
        test = task.parts["test"]
        right = sum(
            int((model(**{**inputs, "labels": None}).logits.argmax(-1) == inputs["labels"]).sum())
            for start in range(0, len(test), 64)
            for inputs in [encoded(tokenizer, test[start : start + 64])]
        )
    return Quality(
        f"accuracy: {task.question}", right / len(test), linear.classified(task), "n-grams", 0.1, chance=task.chance
    )


def encoded(tokenizer: transformers.PreTrainedTokenizerFast, passages: Sequence[Passage]) -> lm.Batch:
    """The first token stands for the whole, as in BERT."""
    first = tokenizer.cls_token
    inputs = tokenizer(
        [first + p.text for p in passages], padding=True, add_special_tokens=False, return_tensors="pt", max_length=96,
        truncation=True,
    )  # fmt: skip
    labels = torch.tensor([passage.label for passage in passages])
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


ENTRIES = {
    "task_module": (task_module, "BertModel", {}),
    "task_prose": (task_prose, "BertModel", {}),
    "task_retrieval": (task_retrieval, "BertModel", {}),
    "task_call": (task_call, "LlamaForCausalLM", {}),
    "task_balance": (task_balance, "ModernBertForSequenceClassification", {}),
    "task_doctest": (task_doctest, "BertModel", {}),
}
