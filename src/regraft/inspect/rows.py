"""Rows of a data file, one at a time, each with a name for messages ("test.jsonl, line 12").

JSON Lines, CSV, plain text (a row per line) and NumPy archives are read here, for they need no package and a broken
line can be named; Parquet, Arrow, JSON arrays and folders go through `datasets` (extra `eval`) as a stream.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import UserError, nearest

LINE_LIMIT = 1 << 26  # characters in one line
_BY_DATASETS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json"}
FORMATS = ".jsonl, .ndjson, .csv, .tsv, .txt, .npz, .json, .parquet, .arrow, or a folder that `datasets` can load"


@dataclass(frozen=True)
class Row:
    """One row: its fields, and where it stands."""

    where: str
    values: Mapping[str, Any]

    def get(self, column: str) -> Any:
        """A field. Raises RG601 with the nearest column where the row has none, or holds nothing in it."""
        if column not in self.values:
            fix = nearest(column, map(str, self.values)) or "check the data"
            raise UserError("RG601", f"there is no column {column!r}", where=self.where, fix=fix)
        value = self.values[column]
        if value is None:
            raise UserError("RG601", f"the column {column!r} is empty", where=self.where, fix="fill or remove the row")
        return value

    def text(self, column: str) -> str:
        """A field that must be text."""
        value = self.get(column)
        if not isinstance(value, str):
            what = f"the column {column!r} holds {type(value).__name__}, not text"
            raise UserError("RG601", what, where=self.where, fix="name the column that holds text")
        return value


def read_rows(path: Path, *, split: str | None = None, limit: int | None = None) -> Iterator[Row]:
    """The rows of a file or folder, in order.

    Args:
        path: a data file, or a folder that `datasets` can load.
        split: which split of a folder; may be left out where there is only one.
        limit: stop after this many rows.

    Raises:
        UserError: RG601 if the data is missing, of an unknown format, empty or damaged; RG602 without `datasets`.
    """
    if not path.exists():
        raise UserError("RG601", "the data does not exist", where=str(path), fix="give the path of a data file")
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in _BY_DATASETS:
        rows = _from_datasets(path, _BY_DATASETS.get(suffix), split)
    elif split is not None:
        raise UserError("RG601", "a single file has no splits", where=str(path), fix="leave out split")
    elif suffix in (".jsonl", ".ndjson"):
        rows = _json_lines(path)
    elif suffix in (".csv", ".tsv"):
        rows = _csv(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".txt":
        rows = (Row(where, {"text": line.rstrip("\r\n")}) for where, line in _lines(path))
    elif suffix == ".npz":
        rows = _npz(path)
    else:
        raise UserError("RG601", f"unknown data format {suffix!r}", where=str(path), fix=f"use {FORMATS}")
    rows = itertools.islice(rows, limit)
    first = next(rows, None)
    if first is None:
        raise UserError("RG601", "the data is empty", where=str(path), fix="give data with at least one row")
    return itertools.chain([first], rows)


def home_of(data: Path) -> Path:
    """The folder that the file names in some data are relative to."""
    return data if data.is_dir() else data.parent


def group_of(row: Row, column: str | None) -> str | None:
    """A row's group: of the column that was named, else of `group` where there is one."""
    if column is None:
        return None if row.values.get("group") is None else str(row.values["group"])
    return str(row.get(column))


def in_batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Lists of up to `size` rows."""
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as stream:
            while line := stream.readline(LINE_LIMIT):
                number += 1
                where = f"{path}, line {number}"
                if len(line) == LINE_LIMIT:
                    raise UserError("RG601", "the line is longer than 64 MiB", where=where, fix="use Parquet")
                if line.strip():
                    yield where, line
    except UnicodeDecodeError:
        fix = "save the file as UTF-8"
        raise UserError("RG601", "the text is not UTF-8", where=f"{path}, after line {number}", fix=fix) from None
    except OSError as error:
        raise UserError("RG601", f"cannot be read: {error.strerror}", where=str(path), fix="check the file") from None


def _json_lines(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply or too long"
            raise UserError("RG601", f"not JSON: {problem}", where=where, fix="mend or remove the line") from None
        if not isinstance(values, dict):
            what = f"the line is {type(values).__name__}, not an object with columns"
            raise UserError("RG601", what, where=where, fix='write {"column": value, ...} on each line')
        yield Row(where, values)


def _csv(path: Path, delimiter: str) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            for values in reader:
                where = f"{path}, line {reader.line_num}"
                if None in values:
                    raise UserError("RG601", "more fields than columns", where=where, fix="quote the separators")
                yield Row(where, {k: v for k, v in values.items() if k is not None})
    except UnicodeDecodeError:
        raise UserError("RG601", "the text is not UTF-8", where=str(path), fix="save the file as UTF-8") from None
    except (csv.Error, OSError) as error:
        raise UserError("RG601", f"cannot be read as CSV: {error}", where=str(path), fix="mend the file") from None


def _npz(path: Path) -> Iterator[Row]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        what = f"cannot be read as a NumPy archive: {error}"
        raise UserError("RG601", what, where=str(path), fix="save plain arrays with numpy.savez") from None
    lengths = {name: len(values) if values.ndim else -1 for name, values in columns.items()}
    if len(set(lengths.values())) > 1 or -1 in lengths.values():
        what = f"the arrays have different lengths ({lengths})"
        raise UserError("RG601", what, where=str(path), fix="give every array one entry per row")
    for i in range(next(iter(lengths.values()), 0)):
        fields = {name: v[i].item() if v.ndim == 1 else v[i] for name, v in columns.items()}
        yield Row(f"{path}, row {i + 1}", fields)


def _from_datasets(path: Path, builder: str | None, split: str | None) -> Iterator[Row]:
    datasets = need("datasets", "eval", f"reading {path.name}")
    failures = (OSError, ValueError, datasets.exceptions.DatasetsError)
    try:
        if builder:
            loaded = datasets.load_dataset(builder, data_files=str(path), streaming=True)
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path), streaming=True)
    except failures as error:
        raise _unreadable(path, error) from None
    if isinstance(loaded, Mapping):
        loaded = loaded[_split(path, list(loaded), split if builder is None else None)]
    # Class labels are stored as numbers; a model may number its labels in another order, so the names are compared.
    named = {k: f for k, f in (loaded.features or {}).items() if isinstance(f, datasets.ClassLabel)}
    try:
        for number, values in enumerate(loaded, 1):
            where = f"{path}, row {number}"
            names = {k: f.int2str(values[k]) for k, f in named.items() if values[k] is not None and values[k] >= 0}
            yield Row(where, values | names)
    except failures as error:
        raise _unreadable(path, error) from None


def _split(path: Path, splits: Collection[str], wanted: str | None) -> str:
    if wanted is None and len(splits) == 1:
        return next(iter(splits))
    if wanted is None or wanted not in splits:
        what = f"there is no split {wanted!r}" if wanted else f"the folder holds {len(splits)} splits"
        raise UserError("RG601", what, where=str(path), fix=f"set split to one of {', '.join(splits)}")
    return wanted


def _unreadable(path: Path, error: BaseException) -> UserError:
    first = str(error).strip().splitlines()[:1]
    what = f"the data cannot be read: {first[0] if first else type(error).__name__}"
    return UserError("RG601", what, where=str(path), fix="check the file, or use JSON Lines")


def need(package: str, extra: str, purpose: str) -> Any:
    """Import an optional package, or raise RG602 with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        fix = f"pip install 'regraft[{extra}]'"
        raise UserError("RG602", f"{purpose} needs the package {package!r}", fix=fix) from None
