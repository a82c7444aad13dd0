"""Data to train on: `datasets` objects as they are, files and folders as examples with numbers, or as streams.

A file of JSON Lines, CSV, text or arrays is held in memory as rows; Parquet, Arrow and folders (of images, too) are
memory-mapped by `datasets`. As a stream, anything that `regraft evaluate` reads is read row by row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import UserError
from regraft.inspect import images
from regraft.inspect.rows import Row, need, read_rows
from regraft.train.batches import DataOptions

_MAPPED = (".parquet", ".arrow")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class RowStream:
    """The rows of a file or folder, read anew each time they are iterated."""

    def __init__(self, path: Path, split: str | None = None, limit: int | None = None) -> None:
        self._path, self._split, self._limit = path, split, limit

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (row.values for row in read_rows(self._path, split=self._split, limit=self._limit))


def open_data(path: Path, *, split: str | None = None, stream: bool = False, limit: int | None = None) -> Any:
    """Examples of a data file or folder.

    Args:
        path: what to read.
        split: of a folder that holds several.
        stream: read it row by row, in its order, instead of holding or mapping it.
        limit: the first rows only.

    Raises:
        UserError: RG601 for data that is missing, damaged or of an unknown format, RG602 without the package datasets.
    """
    if stream:
        next(read_rows(path, split=split, limit=1))  # so that what is wrong is said now
        return RowStream(path, split, limit)
    if path.is_dir() or path.suffix.lower() in _MAPPED:
        mapped = _mapped(path, split)
        return mapped if limit is None else mapped.select(range(min(limit, len(mapped))))
    return [row.values for row in read_rows(path, split=split, limit=limit)]


def opened(path: Path, options: DataOptions) -> Any:
    """`open_data` as the options of a method say."""
    return open_data(path, split=options.split, stream=options.stream, limit=options.limit)


def _mapped(path: Path, split: str | None) -> Any:
    datasets = need("datasets", "data", f"reading {path.name}")
    try:
        if not path.is_dir():
            loaded = datasets.load_dataset(path.suffix.lower()[1:], data_files=str(path))
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif any(p.suffix.lower() in _PICTURES for p in path.rglob("*")):
            loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"the data cannot be read: {first}"
        raise UserError("RG601", what, where=str(path), fix="check the file, or use JSON Lines") from None
    if not isinstance(loaded, Mapping):
        return _Named(loaded, datasets)
    wanted = split if path.is_dir() else None
    if wanted is None and len(loaded) == 1:
        return _Named(next(iter(loaded.values())), datasets)
    if wanted not in loaded:
        what = f"there is no split {wanted!r}" if wanted else f"the folder holds {len(loaded)} splits"
        raise UserError("RG601", what, where=str(path), fix=f"set split to one of {', '.join(loaded)}")
    return _Named(loaded[wanted], datasets)


def values_of(data: Any, column: str) -> Iterator[Any]:
    """One column of all examples, in order, None where an example has none; of mapped data nothing else is read."""
    if isinstance(data, _Named):
        return data.column(column)
    return (example.get(column) for example in data)


class _Named(Sequence[Mapping[str, Any]]):
    """A dataset whose class labels are names, as they are elsewhere: models may number classes in another order."""

    def __init__(self, data: Any, datasets: Any) -> None:
        self._data, self._datasets = data, datasets
        self._labels = {k: f for k, f in (data.features or {}).items() if isinstance(f, datasets.ClassLabel)}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, number: Any) -> Any:
        values = dict(self._data[number])
        for name, feature in self._labels.items():
            if values[name] is not None and values[name] >= 0:
                values[name] = feature.int2str(values[name])
        return values

    def column(self, name: str) -> Iterator[Any]:
        if name not in self._data.column_names:
            return iter([None] * len(self._data))
        return (row[name] for row in self._data.select_columns([name]))

    def select(self, numbers: range) -> _Named:
        return _Named(self._data.select(numbers), self._datasets)


@dataclass(frozen=True)
class Part:
    """Some rows of one data file or folder.

    Attributes:
        data: all of its rows.
        numbers: those that count, in this order; all if None.
        home: what the file names of its images are relative to, where that is not the folder of the run's own data.
        image: the column that holds them.
    """

    data: Sequence[Mapping[str, Any]]
    numbers: Sequence[int] | None = None
    home: Path | None = None
    image: str = "image"

    def __len__(self) -> int:
        return len(self.data) if self.numbers is None else len(self.numbers)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        row = self.data[number if self.numbers is None else self.numbers[number]]
        value = row.get(self.image)
        if self.home is not None and isinstance(value, str) and not value.lstrip().startswith("["):
            return {**row, self.image: images.picture(Row(f"row {number + 1}", row), self.image, self.home)}
        return row


class Joined(Sequence[Mapping[str, Any]]):
    """Parts one behind the other, as one sequence of rows."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = bisect.bisect_right(self._ends, number)
        return self._parts[which][number - (self._ends[which - 1] if which else 0)]
