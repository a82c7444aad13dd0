"""Choosing unlabelled rows by a teacher: for each class those that it is surest of, no copies, nothing held out.

1. Rows that repeat a row of the data to train on, or an earlier row, are left out; so are rows that are (nearly) a row
   of the held-out data, which would make its scores worthless.
2. Each row that is left goes to the class that the teacher finds most likely.
3. Of each class the `per_class` rows with the highest probability stay, all of them where there are fewer; of equal
   ones the first. What is chosen depends neither on the size of batches nor on labels, if the rows have any.

Nearly the same are texts whose triples of words overlap (Jaccard), and images whose grey values on a grid of 16 x 16
correlate, each from a threshold on. The published work matches SIFT features, which also finds parts of images.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from regraft.errors import UserError
from regraft.inspect import images
from regraft.inspect.classification import names_by_number
from regraft.inspect.rows import Row, home_of
from regraft.train.batches import DataOptions
from regraft.train.data import Part
from regraft.train.objective import Collate
from regraft.train.teacher import Teacher

# From here on two rows count as the same; for texts and for images.
SIMILARITY = {"text": 0.8, "image": 0.99}
_GRID = 16
_WORDS = 3


@dataclass(frozen=True)
class Selection:
    """What was chosen from a pool.

    Attributes:
        rows: numbers of the rows, from 0, in the order of the pool.
        classes: the teacher's class of each.
        confidences: the probability that it gives to that class.
        names: of all classes of the teacher.
        pool: rows that there were.
        copies: rows left out as copies of others.
        held_out: rows left out because they are, or are nearly, held-out ones.
    """

    rows: tuple[int, ...]
    classes: tuple[int, ...]
    confidences: tuple[float, ...]
    names: tuple[str, ...]
    pool: int
    copies: int = 0
    held_out: int = 0

    @property
    def per_class(self) -> dict[str, int]:
        """Name of each class -> rows chosen for it."""
        counts = Counter(self.classes)
        return {name: counts[number] for number, name in enumerate(self.names)}

    @property
    def empty(self) -> list[str]:
        """The classes for which there is no row."""
        return [name for name, count in self.per_class.items() if not count]

    def manifest(self) -> str:
        """JSON Lines: the number of each row, from 1, its class and how sure the teacher is."""
        chosen = zip(self.rows, self.classes, self.confidences, strict=True)
        rows = ({"row": n + 1, "class": self.names[c], "confidence": round(p, 6)} for n, c, p in chosen)
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def summary(self) -> dict[str, Any]:
        """JSON-able: counts."""
        return {
            "pool": self.pool,
            "copies": self.copies,
            "held_out": self.held_out,
            "chosen": len(self.rows),
            "per_class": self.per_class,
        }

    def save(self, path: Path, key: str) -> None:
        """Keep it for a run that goes on; appears whole."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"key": key, "selection": asdict(self)}), encoding="utf-8")
        part.replace(path)

    @classmethod
    def kept(cls, path: Path, key: str) -> Selection | None:
        """What `save` kept under this key; None if there is nothing."""
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in found["selection"].items()}
        return cls(**fields)


def top_per_class(classes: Sequence[int], confidences: Sequence[float], count: int) -> list[int]:
    """Numbers of the `count` entries of each class with the highest confidence, in order; of equal ones the first."""
    which, sure = np.asarray(classes, dtype=np.int64), np.asarray(confidences, dtype=np.float64)
    order = np.lexsort((np.arange(len(which)), -sure, which))
    starts = np.searchsorted(which[order], which[order], side="left")
    rank = np.arange(len(order)) - starts
    return sorted(order[rank < count].tolist())


@dataclass(frozen=True)
class Content:
    """What a row says, without its label.

    Attributes:
        digest: equal for copies: of the words of a text, of the pixels of an image.
        words: the triples of words of a text.
        grid: grey values of an image, (256,), of mean 0 and norm 1; zeros for one without contrast.
        shape: of an array of pixels, () for others.
    """

    digest: bytes
    words: frozenset[tuple[str, ...]] = frozenset()
    grid: Tensor | None = None
    shape: tuple[int, ...] = ()


def content_of(row: Row, columns: DataOptions, home: Path) -> Content:
    """What a row says: its array of pixels, else its image, else its text.

    Raises:
        UserError: RG601 for a row without any of these, or with one that is damaged.
    """
    if row.values.get(columns.pixel_values) is not None:
        values = torch.from_numpy(images.array_of(row, columns.pixel_values))
        if values.ndim not in (2, 3) or not values.numel():
            what = f"{columns.pixel_values!r} has shape {tuple(values.shape)}, which is no image"
            raise UserError("RG601", what, where=row.where, fix="give lists of channels, rows and columns")
        pixels = values[None] if values.ndim == 2 else values
        return Content(_digest(pixels.numpy().tobytes()), grid=_grid(pixels), shape=tuple(pixels.shape))
    if row.values.get(columns.image) is not None:
        pixels = torch.from_numpy(np.array(images.picture(row, columns.image, home), dtype=np.float32)).permute(2, 0, 1)
        return Content(_digest(pixels.contiguous().numpy().tobytes()), grid=_grid(pixels))
    texts = [row.text(columns.text)] + ([row.text(columns.text_pair)] if columns.text_pair else [])
    words = re.findall(r"\w+", " ".join(texts).lower())
    starts = range(max(1, len(words) - _WORDS + 1)) if words else ()
    triples = {tuple(words[i : i + _WORDS]) for i in starts}
    return Content(_digest("\0".join(words or texts).encode("utf-8", "surrogatepass")), words=frozenset(triples))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _grid(pixels: Tensor) -> Tensor:
    grey = functional.adaptive_avg_pool2d(pixels.mean(0, keepdim=True)[None], (_GRID, _GRID)).flatten()
    grey = grey - grey.mean()
    norm = grey.norm()
    return grey / norm if float(norm) > 1e-6 else torch.zeros_like(grey)


@dataclass
class HeldOut:
    """Held-out rows, to be recognised.

    Attributes:
        contents: of these rows.
        similarity: from which on another row counts as one of them; None for the usual of its kind.
    """

    contents: Sequence[Content]
    similarity: float | None = None
    _digests: set[bytes] = field(default_factory=set, init=False)
    _sharing: dict[tuple[str, ...], list[int]] = field(default_factory=dict, init=False)
    _grids: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._digests = {one.digest for one in self.contents}
        for number, one in enumerate(self.contents):
            for triple in one.words:
                self._sharing.setdefault(triple, []).append(number)
        grids = [one.grid for one in self.contents if one.grid is not None]
        self._grids = torch.stack(grids) if grids else None

    def has(self, content: Content) -> bool:
        """Whether a row is one of these, or nearly."""
        if content.digest in self._digests:
            return True
        if content.grid is not None:
            least = SIMILARITY["image"] if self.similarity is None else self.similarity
            return self._grids is not None and float((self._grids @ content.grid).max()) >= least
        least = SIMILARITY["text"] if self.similarity is None else self.similarity
        shared = Counter(number for triple in content.words for number in self._sharing.get(triple, ()))
        total = {number: len(content.words | self.contents[number].words) for number in shared}
        return any(count / total[number] >= least for number, count in shared.items())


@dataclass(frozen=True)
class Pool:
    """Unlabelled rows to choose from: all of them, the file or folder that they are in, and what its columns are."""

    data: Sequence[Mapping[str, Any]]
    path: Path
    columns: DataOptions

    @property
    def home(self) -> Path:
        return home_of(self.path)

    def row(self, number: int) -> Row:
        return Row(f"{self.path}, row {number + 1}", self.data[number])

    def content(self, number: int) -> Content:
        return content_of(self.row(number), self.columns, self.home)

    def contents(self) -> list[Content]:
        """What each row says."""
        return [self.content(number) for number in range(len(self.data))]


def select(
    teacher: Teacher,
    collate: Collate,
    pool: Pool,
    per_class: int,
    *,
    seen: Pool | None = None,
    held_out: HeldOut | None = None,
    batch_size: int = 64,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Selection:
    """The rows of a pool that a teacher is surest of; see the module's docstring.

    Args:
        teacher: a classifier.
        collate: makes its batches, and nothing random in them.
        per_class: rows of each class at most.
        seen: rows that are trained on anyway.
        held_out: rows that must not be trained on.
        batch_size: rows per pass; changes nothing else.
        tell: called after each pass with (rows, rows of the pool).

    Raises:
        UserError: RG601 for a row that is not like those that are seen, RG602 for a teacher whose outputs are not
            finite.
    """
    known: set[bytes] = set()
    shape: tuple[int, ...] | None = None
    for content in seen.contents() if seen is not None else ():
        shape = content.shape if shape is None else shape
        known.add(content.digest)
    numbers: list[int] = []
    classes: list[int] = []
    confidences: list[float] = []
    copies = withheld = 0
    for first in range(0, len(pool.data), batch_size):
        kept = []
        for number in range(first, min(first + batch_size, len(pool.data))):
            content = pool.content(number)
            shape = content.shape if shape is None else shape
            if content.shape != shape:
                what = f"the image is an array of {_size(content.shape)} and others are of {_size(shape)}"
                raise UserError("RG601", what, where=pool.row(number).where, fix="give images of one size")
            if content.digest in known:
                copies += 1
                continue
            known.add(content.digest)
            if held_out is not None and held_out.has(content):
                withheld += 1
                continue
            kept.append(number)
        if kept:
            best = _asked(teacher, collate, pool, kept)
            numbers += kept
            classes += best.indices.tolist()
            confidences += best.values.tolist()
        tell(min(first + batch_size, len(pool.data)), len(pool.data))
    chosen = top_per_class(classes, confidences, per_class)
    return Selection(
        tuple(numbers[i] for i in chosen),
        tuple(classes[i] for i in chosen),
        tuple(confidences[i] for i in chosen),
        tuple(names_by_number(teacher.model.config).values()),
        len(pool.data),
        copies,
        withheld,
    )


def survey(
    teacher: Teacher, collate: Collate, data: Iterable[Mapping[str, Any]], *, rows: int = 256, batch_size: int = 64
) -> dict[str, Any]:
    """What a classifier says of the first rows of some data: rows per class, and its mean entropy in nats.

    Raises:
        UserError: RG602 if its outputs are not finite.
    """
    counts: Counter[int] = Counter()
    entropy = 0.0
    first = list(itertools.islice(iter(data), rows))
    for start in range(0, len(first), batch_size):
        said = _said(teacher, collate, first[start : start + batch_size], f"the data, row {start + 1}")
        counts.update(said.argmax(-1).tolist())
        entropy -= float((said * said.clamp(min=1e-30).log()).sum())
    classes = {name: counts[number] for number, name in names_by_number(teacher.model.config).items()}
    return {"rows": len(first), "classes": classes, "entropy": entropy / max(1, len(first))}


def _asked(teacher: Teacher, collate: Collate, pool: Pool, numbers: Sequence[int]) -> Any:
    """The teacher's best class of some rows, and its probability."""
    part = Part(pool.data, numbers, pool.home, pool.columns.image)
    return _said(teacher, collate, [part[i] for i in range(len(part))], pool.row(numbers[0]).where).max(-1)


def _said(teacher: Teacher, collate: Collate, examples: Sequence[Mapping[str, Any]], where: str) -> Tensor:
    """The teacher's probabilities of its classes, (n, C)."""
    home = next(teacher.model.parameters()).device
    batch = collate(examples, [0] * len(examples))
    inputs = {name: value.to(home) if isinstance(value, Tensor) else value for name, value in batch.items()}
    logits: Tensor = teacher(inputs).output.logits.float().cpu()
    if not bool(torch.isfinite(logits).all()):
        what = "the teacher's outputs are not finite"
        raise UserError("RG602", what, where=where, fix="check the teacher with: regraft inspect")
    return logits.softmax(-1)


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "no fixed size"
