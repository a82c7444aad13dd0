"""Where every tensor of a model lies in its safetensors shards, known before the first byte is written.

A shard's header is a function of names, shapes and dtypes only, so it can be written first and every slice of every
tensor has its final offset from the start. Within a shard wide dtypes come first (each tensor is then aligned to its
own item size, as the format asks) and otherwise the order given is kept; shards are filled in the order given.
The header is padded with spaces so that the data begin at a multiple of 8 bytes, in large files of a disk's block.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from regraft.checkpoint.dtypes import DTYPES, item_size
from regraft.checkpoint.open_files import ALIGNMENT, WORTHWHILE

SHARD_BYTES = 5 * 10**9
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSpec:
    """What is known of an output tensor before it is computed; `dtype` by its name in safetensors, such as "BF16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * item_size(self.dtype)


@dataclass(frozen=True)
class Shard:
    """One file: its name, its header (length prefix included) and each tensor's offset from the file's start."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


def layout(specs: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Shards that hold `specs`, at most `shard_bytes` of data each; a larger tensor has a shard to itself.

    Raises:
        ValueError: no tensor, a name twice, a negative size, a dtype that safetensors lacks, `shard_bytes` < 1.
    """
    _check(specs, shard_bytes)
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    n = len(groups)
    return [_shard(f"model-{i:05d}-of-{n:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def index(shards: Sequence[Shard], specs: Sequence[TensorSpec]) -> str | None:
    """The text of `model.safetensors.index.json`, or None where a single file needs no index."""
    if len(shards) == 1:
        return None
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    metadata = {"total_size": sum(spec.nbytes for spec in specs)}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def layout_digest(shards: Sequence[Shard]) -> str:
    """What names a layout: files, their headers (names, shapes, dtypes, offsets) and sizes; 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update(f"{shard.file}\0{shard.size}\0{len(shard.header)}\0".encode())
        digest.update(shard.header)
    return digest.hexdigest()


def size_on_disk(specs: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES) -> int:
    """Bytes of all shards, headers and index included."""
    shards = layout(specs, shard_bytes)
    return sum(shard.size for shard in shards) + len((index(shards, specs) or "").encode())


def _check(specs: Sequence[TensorSpec], shard_bytes: int) -> None:
    if not specs:
        raise ValueError("a model needs at least one tensor")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}")
    seen = set()
    for spec in specs:
        if spec.name in seen or spec.name == "__metadata__":
            raise ValueError(f"tensor {spec.name!r} is given twice, or its name is reserved")
        seen.add(spec.name)
        if min(spec.shape, default=0) < 0:
            raise ValueError(f"tensor {spec.name!r} has the shape {spec.shape}")
        if spec.dtype not in DTYPES:
            raise ValueError(f"tensor {spec.name!r} has the dtype {spec.dtype}, which safetensors cannot hold")


def _shard(file: str, specs: Sequence[TensorSpec]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: -item_size(spec.dtype)):
        begins[spec.name], end = end, end + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begins[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    alignment = ALIGNMENT if end >= WORTHWHILE else 8
    text += b" " * (-(8 + len(text)) % alignment)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end)
