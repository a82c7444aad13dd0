"""What experiments on smaller models share: four pre-trained models, each with its pre-training and a task behind it.

    vision    the zoo's vision transformer;  classes of jittered digits    -> is a jittered digit even? 40 labels
    text      the zoo's decoder;             next tokens of source code    -> which package is this from? 120 windows
    pairs     the zoo's CLIP;                jittered images, captions     -> which of ten captions? 50 images
    minilm    the published MiniLM encoder;  summaries and their texts     -> which text is a summary's? 64 pairs

A batch of pre-training is drawn from a seed alone, so that all arms see the same batches. Tasks are scored on images,
files and docstrings that fine-tuning has not seen. Nor has pre-training, but for files: it reads code without knowing
where that is from.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import regraft
from claims import corpus, text, vision, zoo
from claims import language_models as lm
from regraft.objectives.own_loss import OwnLoss
from regraft.train.objective import Batch, Term
from regraft.train.order import generator
from regraft.train.tap import Seen

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
TEMPERATURE = 0.05
SMOKE = 8  # pairs that MiniLM is tested on where nothing is judged


@dataclass(frozen=True)
class Size:
    """Steps of pre-training and of fine-tuning, and how much is tested on."""

    pretraining: int
    fine_tuning: int
    tested: int


class Setting(ABC):
    """A pre-trained model, what it was pre-trained with, and a task."""

    own: Term = OwnLoss()
    cached = False  # whether what the original says is worth keeping

    def __init__(self, base: Path, seed: int, size: Size) -> None:
        self.base, self.seed, self.size = base, seed, size

    def load(self) -> Any:
        return regraft.load(self.base)

    def collate(self, examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Batch:
        """For the training loop: an example is a whole batch, which is drawn."""
        return self.pretraining_batch(seeds[0])

    @abstractmethod
    def pretraining_batch(self, draw: int) -> Batch:
        """A batch with what the model's own loss needs."""

    @abstractmethod
    def task(self, model: Any) -> nn.Module:
        """The model with a head for the task, which starts the same for all arms."""

    @abstractmethod
    def task_batch(self, step: int) -> Batch:
        """A batch of the task's few labelled examples."""

    @abstractmethod
    def score(self, task: nn.Module, part: str) -> float:
        """Share of right answers on "validation" or "test"."""

    def fine_tune(self, model: Any, steps: int, rate: float) -> nn.Module:
        task = self.task(model)
        torch.manual_seed(self.seed)  # of dropout
        lm.fit(task, self.task_batch, steps, rate)  # type: ignore[arg-type]
        return task.eval()


class Task(nn.Module):
    """A model and a head: inputs -> logits, and the loss if there are labels."""

    def __init__(self, model: Any, head: nn.Module | None, answer: Callable[[Any, Any, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self.head, self._answer = model, head, answer

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        logits = self._answer(self.model, self.head, inputs)
        return SimpleNamespace(
            logits=logits, loss=functional.cross_entropy(logits, labels) if labels is not None else None
        )


def head(width: int, classes: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(width, classes)


def jittered(images: Tensor, draw: int) -> Tensor:
    """As `vision.jittered`, drawn from a number and for all images at once: moved, dimmed, with noise."""
    source, (count, _, rows, columns) = generator(draw), images.shape
    down, right = torch.randint(-1, 2, (2, count, 1), generator=source)
    y, x = (torch.arange(rows) - down) % rows, (torch.arange(columns) - right) % columns
    moved = images[torch.arange(count)[:, None, None], 0, y[:, :, None], x[:, None, :]].unsqueeze(1)
    dimmed = moved * (0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=source))
    return (dimmed + 0.15 * torch.randn(images.shape, generator=source)).clamp(0, 1)


@torch.inference_mode()
def accuracy(task: nn.Module, batches: Sequence[Batch]) -> float:
    """Over batches of inputs and labels."""
    right = torch.cat([task(**{**b, "labels": None}).logits.argmax(-1) == b["labels"] for b in batches])
    return float(right.float().mean())


class _Digits(Setting):
    """What both settings with images have in common: some labelled images, and tests under several jitters."""

    labelled, batch = 40, 50

    def __init__(self, base: Path, seed: int, scale: str, size: Size) -> None:
        super().__init__(base, seed, size)
        self.parts = vision.splits(seed, scale)

    def labels(self, digits: Tensor) -> Tensor:
        return digits

    def more(self) -> Batch:
        """Further inputs of the task."""
        return {}

    def task_batch(self, step: int) -> Batch:
        train = self.parts["train"]
        source = generator(1000 * self.seed + step)
        chosen = torch.randint(min(self.labelled, len(train.labels)), (self.batch,), generator=source)
        images = jittered(train.images[chosen], 1000 * self.seed + step)
        return {"pixel_values": images, "labels": self.labels(train.labels[chosen]), **self.more()}

    def score(self, task: nn.Module, part: str) -> float:
        split, labels = self.parts[part], self.labels(self.parts[part].labels)
        return accuracy(
            task,
            [
                {"pixel_values": jittered(split.images, 77 + i), "labels": labels, **self.more()}
                for i in range(self.size.tested)
            ],
        )


class Vision(_Digits):
    def __init__(self, seed: int, scale: str) -> None:
        size = Size(160, 160, 4) if scale == "laptop" else Size(2, 1, 1)
        super().__init__(vision.digits_vit(seed=seed, scale=scale), seed, scale, size)

    def pretraining_batch(self, draw: int) -> Batch:
        train = self.parts["train"]
        chosen = torch.randint(len(train.labels), (64,), generator=generator(draw))
        return {"pixel_values": jittered(train.images[chosen], draw), "labels": train.labels[chosen]}

    def labels(self, digits: Tensor) -> Tensor:
        return digits % 2

    def task(self, model: Any) -> nn.Module:
        def answer(model: Any, head: Any, inputs: Batch) -> Tensor:
            logits: Tensor = head(model.base_model(**inputs).last_hidden_state[:, 0])
            return logits

        return Task(model, head(model.config.hidden_size, 2, self.seed), answer)


class Pairs(_Digits):
    labelled = 50

    def __init__(self, seed: int, scale: str) -> None:
        size = Size(160, 160, 4) if scale == "laptop" else Size(2, 1, 1)
        super().__init__(zoo.digits_clip(seed=seed, scale=scale), seed, scale, size)
        tokenizer = text.tokenizer_of(self.base)
        skills = zoo.PAIR_SKILLS
        self.captions = torch.tensor(tokenizer([f"a {s} {d} <end>" for s in skills for d in range(10)])["input_ids"])
        self.questions = torch.tensor(tokenizer([f"a {d} <end>" for d in range(10)])["input_ids"])
        train = self.parts["train"]
        self.images = torch.stack([zoo.pair_images(skill, train.images) for skill in skills])
        self.of_digit = [(train.labels == d).nonzero().flatten() for d in range(10)]

    def pretraining_batch(self, draw: int) -> Batch:
        """As the zoo's, but jittered as the task's: each caption once, with an image that it fits."""
        source = generator(draw)
        picks = [
            of[int(torch.randint(len(of), (1,), generator=source))] for _ in zoo.PAIR_SKILLS for of in self.of_digit
        ]
        images = torch.stack([self.images[i // 10, pick] for i, pick in enumerate(picks)])
        return {"input_ids": self.captions, "pixel_values": jittered(images, draw), "return_loss": True}

    def more(self) -> Batch:
        return {"input_ids": self.questions}

    def task(self, model: Any) -> nn.Module:
        def answer(model: Any, head: Any, inputs: Batch) -> Tensor:
            logits: Tensor = model(**inputs).logits_per_image
            return logits

        return Task(model, None, answer)


class Text(Setting):
    length, labelled, batch = 32, 120, 16

    def __init__(self, seed: int, scale: str) -> None:
        size = Size(160, 160, 1200) if scale == "laptop" else Size(2, 1, 12)
        super().__init__(text.decoder(seed=seed, scale=scale), seed, size)
        self.tokenizer = text.tokenizer_of(self.base)
        self.seen = text.ids(self.base, False, seed, scale)[0]
        files: dict[str, list[list[str]]] = {part: [[] for _ in PACKAGES] for part in ("train", "validation", "test")}
        for label, package in enumerate(PACKAGES):
            found = [source.text for source in corpus.sources() if source.top == package]
            random.Random(seed).shuffle(found)
            for i, content in enumerate(found[: 6 if scale == "smoke" else None]):
                part = ("train", "test", "validation", "train", "test")[i % 5]
                files[part][label].append(content[:20_000])
        counts = {"train": self.labelled, "validation": 600, "test": self.size.tested}
        self.parts = {
            part: self._windows(files[part], counts[part] if scale == "laptop" else 12, seed + i)
            for i, part in enumerate(files)
        }

    def _windows(self, files: list[list[str]], count: int, seed: int) -> Batch:
        """As many windows of each package as of any other."""
        source = generator(seed)
        found = [
            lm.windows(lm.encoded(self.tokenizer, texts), self.length, count // len(files), source)["input_ids"]
            for texts in files
        ]
        labels = torch.arange(len(files)).repeat_interleave(count // len(files))
        return {"input_ids": torch.cat(found), "labels": labels}

    def pretraining_batch(self, draw: int) -> Batch:
        return lm.windows(self.seen, self.length, 16, generator(draw))

    def task(self, model: Any) -> nn.Module:
        def answer(model: Any, head: Any, inputs: Batch) -> Tensor:
            logits: Tensor = head(model.base_model(**inputs).last_hidden_state.mean(1))
            return logits

        return Task(model, head(model.config.hidden_size, len(PACKAGES), self.seed), answer)

    def task_batch(self, step: int) -> Batch:
        train = self.parts["train"]
        chosen = torch.randint(len(train["labels"]), (self.batch,), generator=generator(1000 * self.seed + step))
        return {name: value[chosen] for name, value in train.items()}

    def score(self, task: nn.Module, part: str) -> float:
        rows = self.parts[part]
        batches = zip(rows["input_ids"].split(200), rows["labels"].split(200), strict=True)
        return accuracy(task, [{"input_ids": ids, "labels": labels} for ids, labels in batches])


class Contrastive(Term):
    """The loss of a sentence encoder: within a batch, each summary must find its own text, and each text its summary.

    The first half of the batch are summaries, the second half their texts.
    """

    name = "own"

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        logits = similarities(student.output.last_hidden_state, batch["attention_mask"]) / TEMPERATURE
        labels = torch.arange(len(logits))
        return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def similarities(states: Tensor, mask: Tensor) -> Tensor:
    """Cosines of the first half of a batch with the second, (B / 2, B / 2); a sentence is the mean of its tokens."""
    weights = mask.unsqueeze(-1).float()
    vectors = functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    left, right = vectors.chunk(2)
    return left @ right.T


class MiniLM(Setting):
    own: Term = Contrastive()
    cached = True
    length, batch, labelled = 16, 8, 64

    def __init__(self, seed: int, scale: str) -> None:
        size = Size(120, 12, 120) if scale == "laptop" else Size(1, 1, SMOKE)
        super().__init__(zoo.minilm(seed=seed, scale=scale), seed, size)
        self.tokenizer = text.tokenizer_of(self.base)
        pairs = zoo.docstrings.read_pairs(5000, seed)
        cuts = [size.tested, size.tested + 100, size.tested + 100 + self.labelled]
        self.parts = {"test": pairs[: cuts[0]], "validation": pairs[cuts[0] : cuts[1]]}
        self.few, self.many = pairs[cuts[1] : cuts[2]], pairs[cuts[2] :]

    def load(self) -> Any:
        """Embeddings, half of the parameters and dense in all arms, stay as they are; for tests one layer is enough."""
        model = super().load()
        model.embeddings.requires_grad_(False)
        if self.size.tested == SMOKE:
            model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:1], 1
        return model

    def _batch(self, pairs: Sequence[tuple[str, str]]) -> Batch:
        texts = [pair[side] for side in (0, 1) for pair in pairs]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.length, padding=True, return_tensors="pt")
        return dict(encoded)

    def pretraining_batch(self, draw: int) -> Batch:
        return self._batch(random.Random(draw).sample(self.many, self.batch))

    def task(self, model: Any) -> nn.Module:
        def answer(model: Any, head: Any, inputs: Batch) -> Tensor:
            return similarities(model(**inputs).last_hidden_state, inputs["attention_mask"]) / TEMPERATURE

        return Task(model, None, answer)

    def task_batch(self, step: int) -> Batch:
        chosen = random.Random(1000 * self.seed + step).sample(self.few, self.batch)
        return self._batch(chosen) | {"labels": torch.arange(self.batch)}

    def score(self, task: nn.Module, part: str) -> float:
        pairs = self.parts[part]
        return accuracy(task, [self._batch(pairs) | {"labels": torch.arange(len(pairs))}])


SETTINGS: dict[str, Callable[[int, str], Setting]] = {"vision": Vision, "text": Text, "pairs": Pairs, "MiniLM": MiniLM}
