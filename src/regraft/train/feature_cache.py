"""Tensors on disk under content keys: one file that only grows, with an index beside it.

A record is appended in one piece before its line of the index, and a line that is not whole is passed over, so that a
process that dies leaves nothing that is wrong, and several processes may write at once. Records are read through a
memory map: others are not touched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.errors import UserError

_MASKS = ("attention_mask", "decoder_attention_mask")


class FeatureCache:
    """A cache of what one model says of inputs.

    Args:
        folder: made if it does not exist.
        model_key: names the model's content (a digest); it is part of every key.
        dtype: what floats are kept as; float32 gives the same losses as without a cache, float16 takes half the room.
    """

    def __init__(self, folder: Path, model_key: str, *, dtype: torch.dtype = torch.float32) -> None:
        self._data, self._index = folder / "features.bin", folder / "features.jsonl"
        self._model_key, self._dtype = model_key, dtype
        self._known: dict[str, tuple[int, list[Any]]] = {}
        self._memory: Any = np.empty(0, np.uint8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._data.touch()
            self._index.touch()
            self._load()
        except OSError as error:
            what = f"the cache of features cannot be used: {error.strerror}"
            raise UserError("RG405", what, where=str(folder), fix="name another folder") from None

    def __len__(self) -> int:
        return len(self._known)

    def keys(self, inputs: Mapping[str, Tensor], asked: Sequence[str]) -> list[str]:
        """A key for each example of a batch: of the model, of what is asked for, and of its input without padding."""
        rows = len(next(iter(inputs.values())))
        head = json.dumps([self._model_key, str(self._dtype), sorted(asked)]).encode()
        masks = {name: inputs[name].bool().cpu() for name in _MASKS if name in inputs}
        keys = []
        for i in range(rows):
            digest = hashlib.blake2b(head, digest_size=16)
            for name in sorted(inputs):
                value = inputs[name][i].cpu()
                mask = masks.get(_MASKS[name.startswith("decoder_")])
                if mask is not None and value.ndim == 1 and value.shape[0] == mask.shape[1]:
                    value = value[mask[i]]
                digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
                digest.update(_bytes(value))
            keys.append(digest.hexdigest())
        return keys

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under a key; None if there are none."""
        if key not in self._known:
            return None
        offset, parts = self._known[key]
        if offset + sum(part[3] for part in parts) > len(self._memory):
            self._memory = np.memmap(self._data, dtype=np.uint8, mode="r")  # the file has grown
        found = {}
        for name, dtype, shape, size in parts:
            raw = torch.from_numpy(np.array(self._memory[offset : offset + size]))
            found[name] = raw.view(getattr(torch, dtype)).reshape(shape)
            offset += size
        return found

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key that is not there yet."""
        parts, pieces = [], []
        for name, tensor in tensors.items():
            value = tensor.detach().cpu().to(self._dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            piece = _bytes(value)
            parts.append([name, str(value.dtype).removeprefix("torch."), list(value.shape), len(piece)])
            pieces.append(piece)
        offset = _append(self._data, b"".join(pieces))
        _append(self._index, (json.dumps([key, offset, parts]) + "\n").encode())
        self._known[key] = (offset, parts)

    def _load(self) -> None:
        size = self._data.stat().st_size
        text = self._index.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):  # a process died while it wrote the last line
            _append(self._index, b"\n")
        for line in text.split("\n"):
            try:
                key, offset, parts = json.loads(line)
            except (ValueError, TypeError):
                continue  # empty, or not whole
            if offset + sum(part[3] for part in parts) <= size:
                self._known[key] = (offset, parts)


def _append(path: Path, content: bytes) -> int:
    """Add to the end of a file in one piece, whoever else does; where the piece begins."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError("the disk is full")
        return os.lseek(descriptor, 0, os.SEEK_CUR) - len(content)
    finally:
        os.close(descriptor)


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
