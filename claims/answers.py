"""Models that answer the tasks of text: the published encoder, and the zoo's own encoder and decoder, fine-tuned.

Where examples are few, what a model knows beforehand decides, and n-grams know nothing beforehand; so the published
MiniLM answers those that ask what words mean, and the zoo's own encoder and decoder those about code. Of MiniLM
only the last layers are trained: what the others make of each text is computed once. It was made from public code and
questions, and may have seen texts of the standard library, but not with these labels. The zoo's own models have seen no
file that is tested on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from claims import language_models as lm
from claims import linear, tasks, text, zoo
from claims.tasks import Matching, Passage, Task
from regraft.claims.zoo import Quality, entry

LAST_LAYERS = 2
CONTEXT = 48  # tokens before what is asked for, and behind it


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


@entry(data="paragraphs of docstrings and comments from eight packages of the standard library, eight of each")
def task_module(folder: Path, *, seed: int, scale: str) -> Quality:
    return _classifier(folder, tasks.module(seed, scale), seed, scale, 64)


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


Row: TypeAlias = "tuple[list[int], int]"  # tokens, and where those begin whose likelihood counts


def _called(tokenizer: transformers.PreTrainedTokenizerFast, before: str, name: str) -> Row:
    """The end of the text before a call, and the method's name, which counts."""
    head = tokenizer(before, add_special_tokens=False)["input_ids"][-CONTEXT:]
    return head + tokenizer(name, add_special_tokens=False)["input_ids"], len(head)


def _filled(tokenizer: transformers.PreTrainedTokenizerFast, statement: str, sign: str) -> Row:
    """A statement with a sign in the place of what is hidden; all but its first token counts."""
    return tokenizer(statement.replace(tasks.HIDDEN, sign) + "\n", add_special_tokens=False)["input_ids"], 1


def _reader(
    folder: Path, task: Task, row: Callable[..., Row], *, seed: int, scale: str, end: int | None = None
) -> Quality:
    """The decoder goes on as it was trained, on the examples with their answers; of all answers that a passage could
    have, the likeliest counts."""
    base = text.decoder(seed=seed, scale=scale)
    model, tokenizer = text.read(base), text.tokenizer_of(base)
    rows = [row(tokenizer, p.text, task.classes[p.label]) for p in task.parts["train"]]
    draws = random.Random(seed)
    count, steps = min(32, len(rows)), 20 if scale == "laptop" else 1
    lm.fit(model, lambda _: lm.padded(draws.sample(rows, count), tokenizer.pad_token_id), steps, 3e-4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, plain = likeliest(model, tokenizer, task, row), linear.classified(task, end=end)
    return Quality(f"accuracy: {task.question}", found, plain, "n-grams", 0.05, chance=task.chance)


def likeliest(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, task: Task, row: Callable[..., Row]
) -> float:
    """How often the right answer to a test passage is the likeliest of all classes."""
    test = task.parts["test"]
    rows = [row(tokenizer, passage.text, name) for passage in test for name in task.classes]
    lengths = torch.tensor([len(ids) - begin for ids, begin in rows])
    losses = (lm.answer_losses(model, rows, tokenizer.pad_token_id) * lengths).view(len(test), -1)
    return float((losses.argmin(1) == torch.tensor([p.label for p in test])).float().mean())


@entry(data="36 calls of twelve methods in the source of the standard library, and the text before them")
def task_call(folder: Path, *, seed: int, scale: str) -> Quality:
    return _reader(folder, tasks.call(seed, scale), _called, seed=seed, scale=scale, end=24)


@entry(data="60 statements of the standard library, of which one bracket or quote is hidden")
def task_balance(folder: Path, *, seed: int, scale: str) -> Quality:
    return _reader(folder, tasks.balance(seed, scale), _filled, seed=seed, scale=scale)


def around_hidden(tokenizer: transformers.PreTrainedTokenizerFast, passages: Sequence[Passage]) -> lm.Batch:
    """Passages with the mask in the place of what is hidden, where the label is."""
    halves = [tokenizer(p.text.split(tasks.HIDDEN), add_special_tokens=False)["input_ids"] for p in passages]
    rows = [[*before[-CONTEXT:], tokenizer.mask_token_id, *after[:CONTEXT]] for before, after in halves]
    batch = dict(tokenizer.pad({"input_ids": rows}, return_tensors="pt"))
    hidden = batch["input_ids"] == tokenizer.mask_token_id
    labels = torch.full_like(batch["input_ids"], lm.IGNORED)
    labels[hidden] = torch.tensor([passage.label for passage in passages])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


@entry(data="12 words of the standard library's source, hidden, from code or from comments and docstrings")
def task_prose(folder: Path, *, seed: int, scale: str) -> Quality:
    """The encoder says at the mask what is hidden."""
    task, base = tasks.prose(seed, scale), zoo.encoder(seed=seed, scale=scale)
    tokenizer, names = text.tokenizer_of(base), dict(enumerate(task.classes))
    torch.manual_seed(seed)
    model = transformers.ModernBertForTokenClassification.from_pretrained(
        base, id2label=names, label2id={name: i for i, name in names.items()}
    )
    examples = around_hidden(tokenizer, task.parts["train"])
    lm.fit(model, lambda _: examples, 60 if scale == "laptop" else 1, 1e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, plain = right_at_mask(model, tokenizer, task), linear.classified(task)
    return Quality(f"accuracy: {task.question}", found, plain, "n-grams", 0.05, chance=task.chance)


@torch.inference_mode()
def right_at_mask(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, task: Task) -> float:
    """How often the right class is the likeliest at the mask of test passages."""
    right, test = 0, task.parts["test"]
    for start in range(0, len(test), 64):
        batch = around_hidden(tokenizer, test[start : start + 64])
        labels = batch.pop("labels")
        asked = labels != lm.IGNORED
        right += int((model(**batch).logits[asked].argmax(-1) == labels[asked]).sum())
    return right / len(test)


ENTRIES = {
    "task_module": (task_module, "BertModel", {}),
    "task_prose": (task_prose, "ModernBertForTokenClassification", {}),
    "task_retrieval": (task_retrieval, "BertModel", {}),
    "task_call": (task_call, "LlamaForCausalLM", {}),
    "task_balance": (task_balance, "LlamaForCausalLM", {}),
    "task_doctest": (task_doctest, "BertModel", {}),
}
