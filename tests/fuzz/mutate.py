"""Damage: to bytes, and to one place of a tree of JSON or YAML values. Everything is a function of the generator."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

_TEXTS = (
    "",
    " ",
    "x",
    "a",
    "..",
    "/etc/passwd",
    "../../x",
    "~a\0b",
    "\0",
    "\ud800",
    "\udcff",
    "\u202e\x1b[31m\n",
    "NaN",
    "1e999",
    "float32",
    "F32",
    "llama",
    "bert",
    "BertModel",
    "__name__",
    "Trainer",
    "pipeline",
    "(a+)+$",
    "(.*.*)*#",
    "[",
    "*",
    "{{",
    "union",
    "9" * 400,
    "k" * 300,
    "./" + "n" * 300 + "/x",
)
_NUMBERS = (
    *(0, 1, -1, 2, 3, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**6, 10**9, 10**12, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
)


def value(rng: Random, depth: int = 0) -> Any:
    """Anything that JSON can say."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(_NUMBERS)
    if kind < 4:
        return rng.choice(_TEXTS)
    if kind < 6:
        return rng.choice((None, True, False, {}, [], [[]], {"": None}, [None], "é"))
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.choice((1, 2, 3, 40)))]
    if kind == 7:
        return {str(rng.choice((*_TEXTS, "content", "type", "0"))): value(rng, depth + 1) for _ in range(3)}
    return nested(rng.choice((50, 90, 110, 400, 900)), rng.random() < 0.5)


def nested(depth: int, mappings: bool) -> Any:
    """Lists within lists, or mappings within mappings."""
    found: Any = 1
    for _ in range(depth):
        found = {"x": found} if mappings else [found]
    return found


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a tree that are not very deep, the root's () first."""
    if len(path) > 40:
        return [path]
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, child in inner for place in places(child, (*path, key)))]


def tree(rng: Random, data: Any) -> Any:
    """A copy of `data` with one to three places changed, removed, renamed or repeated."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(places(data))
        if not path:
            if rng.random() < 0.1:
                return value(rng)
            continue
        parent = data
        for part in path[:-1]:
            parent = parent[part]
        kind = rng.randrange(8)
        if kind < 5:
            parent[path[-1]] = value(rng)
        elif kind == 5:
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[str(rng.choice((*_TEXTS, "extra")))] = parent.pop(path[-1]) if kind == 6 else parent[path[-1]]
        else:
            parent.extend(parent[path[-1]] for _ in range(rng.choice((1, 5))))
    return data


def json_text(rng: Random, data: Any) -> bytes:
    """A tree as JSON, now and then with what no `json.dumps` writes."""
    text = json.dumps(data, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.7)
    raw = text.encode("utf-8", "surrogatepass")
    kind = rng.randrange(30)
    if kind == 0:
        return raw[: rng.randrange(len(raw) + 1)]
    if kind == 1:
        return b"\xef\xbb\xbf" + raw
    if kind == 2:
        return text.encode("utf-16", "surrogatepass")
    if kind == 3:
        return raw.replace(b"1", b"1" * rng.choice((400, 4000, 5000)), 1)
    if kind == 4:
        return raw.replace(b"{", b"{" + raw[1:40].partition(b",")[0] + b",", 1)
    if kind == 5:
        return b"[" * rng.choice((100, 1000, 100_000)) + rng.choice((b"", raw))
    if kind == 6:
        return b'{"a":' * rng.choice((150, 990, 50_000))
    return flipped(rng, raw) if kind < 10 else raw


def flipped(rng: Random, raw: bytes) -> bytes:
    """Some bytes changed, cut out, repeated or moved."""
    content = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not content:
            break
        at = rng.randrange(len(content))
        kind = rng.randrange(7)
        if kind < 3:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            content[at] = rng.choice((0, 0x20, 0x7B, 0x80, 0xFF, *b'0123456789-.[]{}",:'))
        elif kind == 4:
            del content[at : at + rng.choice((1, 8, 100))]
        elif kind == 5:
            content[at:at] = content[at : at + rng.choice((1, 8, 100))]
        else:
            content[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, (1 << 62).to_bytes(8, "little")))
    return bytes(content)


def cut(rng: Random, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw))]
