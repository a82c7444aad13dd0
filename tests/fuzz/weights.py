"""Damaged weight files: safetensors, indices of shards, pickles."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz import mutate, seeds
from fuzz.targets import given, linked, target
from fuzz.world import Input, World


def _header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


_SIZES = (0, 1, -1, 3, 7, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, 1.0, 8.5, True, "8", None, [], 10**30)
_DTYPES = ("F64", "F16", "BF16", "I8", "BOOL", "U64", "C64", "F8_E4M3", "F4", "F8_E8M0", "f32", "", None, 3, ["F32"])


def _lies(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    """One or two entries that say something else."""
    names = [name for name in header if name != "__metadata__"]
    honest = copy.deepcopy(header)
    for name in rng.sample(names, rng.choice((1, 1, 2))):
        entry, other = header[name], honest[rng.choice(names)]
        kind = rng.randrange(13)
        if kind == 0:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(_SIZES)
        elif kind == 1:
            entry["data_offsets"] = list(other["data_offsets"])
        elif kind == 2:
            by = rng.choice((-8, -4, 1, 4, 2**40))
            entry["data_offsets"] = [n + by for n in entry["data_offsets"]]
        elif kind == 3:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(_SIZES)
        elif kind == 4:
            entry["shape"] = rng.choice(
                ([2**32, 2**32], [2**21] * 3, [2**63, 2], [0, 2**63], [0] * 50, [1] * 100, [], {})
            )
        elif kind == 5:
            entry["shape"] = entry["shape"] + rng.choice(([1], [0], [-1], [1] * 70))
        elif kind == 6:
            entry["dtype"] = rng.choice(_DTYPES)
        elif kind == 7:
            del entry[rng.choice(list(entry))]
        elif kind == 8:
            header[name] = mutate.value(rng)
        elif kind == 9:
            header["__metadata__"] = rng.choice((1, [], {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"é": "\ud800"}))
        elif kind == 10:
            new = rng.choice(
                ("", "\ud800", "\0", "n" * 70_000, "a.b\n\x1b[2J", f"model.layers.{'9' * 5000}.x", "./../x")
            )
            header[new] = header.pop(name)
        elif kind == 11:  # an honest file of another make: scalars and vectors where matrices belong
            count = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 4
            entry["shape"] = rng.choice(([count], [1, count], [count, 1, 1], [2, count // 2], [count, 1]))
        else:
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            dtype, shape = rng.choice(
                (("U8", [size]), ("C64", [size // 8]), ("I32", [size // 4]), ("F16", [2, size // 4]))
            )
            dtype, shape = rng.choice(((dtype, shape), ("F8_E5M2", [size]), ("BOOL", [size])))
            entry |= {"dtype": dtype, "shape": shape}
    return header


def _scalar_model(rng: Random, header: dict[str, Any]) -> bytes:
    """Whole files of true headers, with shapes that no model has: (), (0,), names of the table with strange numbers."""
    shapes = rng.choice(([], [1], [0], [1, 1], [0, 8], [3]))
    count = 1
    for n in shapes:
        count *= n
    names = [n for n in header if n != "__metadata__" and rng.random() < 0.8]
    new, at = {}, 0
    for name in names:
        if rng.random() < 0.2:
            name = name.replace(".1.", rng.choice((".7.", ".\u0663.", f".{10**17}.", ".01.")))
        new[name] = {"dtype": "F32", "shape": shapes, "data_offsets": [at, at + 4 * count]}
        at += 4 * count
    text = json.dumps(new).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def _bad_safetensors(rng: Random, raw: bytes) -> bytes:
    kind = rng.randrange(10)
    if kind < 4:
        header, data = _header(raw)
        text = json.dumps(_lies(rng, header), ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + data
    if kind == 4:
        return mutate.cut(rng, raw)
    if kind == 5:
        return mutate.flipped(rng, raw)
    if kind == 6:
        length = rng.choice(
            (0, 1, 2, len(raw), 2**31, 2**40, 2**63, 2**64 - 1, 10**8, 10**8 + 1, rng.randrange(len(raw)))
        )
        return struct.pack("<Q", length) + raw[8:]
    header, data = _header(raw)
    if kind == 7:
        return _scalar_model(rng, header)
    text = json.dumps(header).encode()
    if kind == 8:
        entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        extra = rng.choice(
            (
                b'"model.norm.weight":' + entry,
                b'"__metadata__":{},"__metadata__":{}',
                b'"x":' + b"[" * 5000,
                b'"x":' + b'{"a":' * 3000,
                b'"x":{"dtype":"F32","dtype":"F64","shape":[0],"data_offsets":[0,0]}',
                b'"x":NaN',
                b'"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}',
                b'"\xff\xfe":' + entry,
                b",".join(b'"e%d":' % i + entry for i in range(300)),
            )
        )
        text = b"{" + extra + b"," + text[1:]
    else:
        text = mutate.json_text(rng, mutate.tree(rng, header))
    return len(text).to_bytes(8, "little") + text + data


@target
def safetensors(rng: Random, world: World) -> Input:
    folder = linked(world, seeds.WEIGHTS)
    path = folder / seeds.WEIGHTS
    path.write_bytes(_bad_safetensors(rng, (world.seed("a") / seeds.WEIGHTS).read_bytes()))
    return given(rng, world, str(path if rng.random() < 0.1 else folder))


_BAD_NAMES = (
    "../base/model.safetensors", "/etc/passwd", "..", ".", "", "a/../../x.safetensors", "C:\\x.safetensors", "a\\b",
    "\0", "\ud800.safetensors", "k" * 300 + ".safetensors", "d/" * 3000 + "x.safetensors", "link.safetensors",
    "loop.safetensors", "pipe.safetensors", "folder.safetensors", "missing.safetensors", "config.json", "./",
    "socket.safetensors", "away/model.safetensors", "model-00001-of-00002.safetensors/x.safetensors", "//etc/passwd",
    "device.safetensors", "~/x.safetensors", "model-00001-of-00002.safetensors/", "./model-00001-of-00002.safetensors",
)  # fmt: skip


def _strange_files(world: World, folder: Path, rng: Random) -> None:
    """Things that a folder can hold and that are no files."""
    secret = world.root / "secret" / "model" / seeds.WEIGHTS
    (folder / "link.safetensors").symlink_to(rng.choice((secret, Path("/etc/passwd"), Path("/dev/zero"), Path("gone"))))
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "away").symlink_to(world.root / "secret" / "model")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "device.safetensors").symlink_to("/dev/tty")


@target
def index(rng: Random, world: World) -> Input:
    folder = linked(world, seeds.WEIGHTS)
    data = seeds.save_shards(folder)
    names, shards = list(data["weight_map"]), sorted(set(data["weight_map"].values()))
    _strange_files(world, folder, rng)
    raw = b""
    kind = rng.randrange(9)
    if kind < 3:
        for _ in range(rng.choice((1, 1, 3))):
            data["weight_map"][rng.choice((*names, "extra"))] = rng.choice(_BAD_NAMES)
    elif kind == 3:
        data = mutate.tree(rng, data)
    elif kind == 4:
        data["weight_map"][rng.choice(names)] = rng.choice(shards)
    elif kind == 5:
        shard = folder / rng.choice(shards)
        content = shard.read_bytes()
        shard.unlink()
        what = rng.randrange(8)
        if what == 0:
            os.mkfifo(shard)
        elif what == 1:
            shard.mkdir()
        elif what == 2:
            shard.symlink_to(
                rng.choice(("/dev/zero", shard.name, "away/model.safetensors", "../model", "pipe.safetensors"))
            )
        elif what == 3:
            shard.write_bytes(_bad_safetensors(rng, content))
        elif what == 4:
            shutil.copyfile(folder / rng.choice([s for s in shards if s != shard.name]), shard)
        elif what == 5:
            shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        elif what == 6:
            shard.write_bytes(mutate.cut(rng, content))
    elif kind == 6:
        data["weight_map"] |= {f"x{i}": f"many-{i}.safetensors" for i in range(rng.choice((20, 200)))}
    elif kind == 7:
        raw = mutate.json_text(rng, data)
    else:
        name = rng.choice(
            (seeds.INDEX, "config.json", "tokenizer.json", "README.md", "additional_chat_templates", "LICENSE")
        )
        (folder / name).unlink(missing_ok=True)
        target_ = rng.choice(
            ("/etc/passwd", name, "away", "../../secret/model/config.json", "pipe.safetensors", "/dev/zero")
        )
        (folder / name).symlink_to(target_) if rng.random() < 0.8 else os.mkfifo(folder / name)
        return given(rng, world, str(folder))
    (folder / seeds.INDEX).unlink()
    (folder / seeds.INDEX).write_bytes(raw or json.dumps(data).encode())
    return given(rng, world, str(folder))


@lru_cache(2)
def _pickled(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    state = seeds.tensors(1)
    state["tied.weight"] = state["lm_head.weight"]
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


class _Call:
    """Pickles to a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


def _gadgets(marker: str) -> list[Any]:
    import builtins
    import codecs
    import subprocess

    return [
        _Call(os.system, f"touch '{marker}'"),
        _Call(builtins.eval, f"open({marker!r}, 'w')"),
        _Call(builtins.exec, f"open({marker!r}, 'w')"),
        _Call(builtins.open, marker, "w"),
        _Call(os.mkdir, marker),
        _Call(subprocess.Popen, ["touch", marker]),
        _Call(torch.load, marker),
        _Call(torch.hub.load, "x", "y"),
        _Call(bytearray, 2 * 10**9),
        _Call(codecs.encode, _Call(codecs.encode, "0" * 50_000_000, "utf-16"), "hex"),
        _Call(torch.Tensor, 10**9),
        _Call(torch.FloatTensor, 10**9),
        _Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**9, 10**9), (1, 1), False),
        _Call(set, [1]),
        _Call(torch.device, "cuda"),
        _Call(complex, 1, 2),
    ]


# (size, stride, offset) of views that name more, or other, elements than a storage of 64 has: only forgers write them.
_VIEWS: tuple[tuple[Any, Any, Any], ...] = (
    ((10**9, 10**9), (0, 0), 0),
    ((10**6, 10**6), (0, 0), 0),
    ((4096, 4096, 64), (0, 0, 1), 0),
    ((2**62, 4), (0, 0), 0),
    ((64,), (2,), 0),
    ((8, 8), (8, 1), 60),
    ((8, 8), (-8, 1), 63),
    ((8, 8), (8, 1), -1),
    ((8, 8), (8, 1), 2**62),
    ((-1, 8), (8, 1), 0),
    ((2**33, 2**33), (1, 1), 0),
    ((64, 64), (1, 1), 0),
    ((8, 8), (1, 8), 0),
    (("8", 8), (8, 1), 0),
    ((8, 8), (8,), 0),
)


class _Forged:
    """Pickles to such a view."""

    def __init__(self, size: Any, stride: Any, offset: Any) -> None:
        self._storage, self._view = torch.arange(64.0), (offset, size, stride)

    def __reduce__(self) -> Any:
        untyped, dtype = self._storage.untyped_storage(), self._storage.dtype
        typed = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, *self._view, False, {})


def _dag(rng: Random, marker: str) -> bytes:
    """Tuples that hold the one before twice, sixty deep, where something may hash, compare or print them."""
    pairs = b"K\x01" + b"2\x86" * 60
    return rng.choice(
        (
            b"\x80\x02}" + pairs + b"K\x01s.",
            b"\x80\x02" + pairs + b"Q.",
            b"\x80\x02" + pairs + b")R.",
            b"\x80\x02ccollections\nOrderedDict\n]" + pairs + b"K\x01\x86a\x85R.",
            b"\x80\x02cbuiltins\nset\n]" + pairs + b"a\x85R.",
            b"\x80\x02(" + b"(" * 5000 + b"t" * 5000 + b".",
            b"\x80\x02" + b"]" + b"]a" * 5000 + b".",
            f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(),
        )
    )


def _save(content: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _archive(rng: Random, raw: bytes) -> bytes:
    """The records of a zip file, put together again: compressed, bigger than said, twice, without some, renamed."""
    target_ = io.BytesIO()
    kind = rng.randrange(8)
    with zipfile.ZipFile(io.BytesIO(raw)) as source, zipfile.ZipFile(target_, "w") as archive:
        for record in source.infolist():
            content, name = source.read(record), record.filename
            if kind == 0 and rng.random() < 0.5:
                archive.writestr(name, bytes(rng.choice((10**4, 10**6))) + content, zipfile.ZIP_DEFLATED)
                continue
            if kind == 1 and rng.random() < 0.2:
                continue
            if kind == 2 and rng.random() < 0.3:
                content = rng.choice((b"", content[:3], content + bytes(100)))
            if kind == 3 and rng.random() < 0.3:
                name = rng.choice(("../../escaped", "/tmp/escaped", name + "x", "archive/data/0", "a/b", "\ud7ff"))
            if kind == 4 and name.endswith("data.pkl"):
                content = mutate.flipped(rng, content)
            if kind == 5 and name.endswith("data.pkl"):
                content = content.replace(b"K\x10", b"M\xff\xff").replace(b"K\x08", b"J\xff\xff\xff\x7f")
            if kind == 6 and name.endswith("byteorder"):
                content = rng.choice((b"big", b"x", b""))
            archive.writestr(name, content, zipfile.ZIP_STORED)
    result = bytearray(target_.getvalue())
    if kind == 7:  # sizes in the central directory that are lies
        at = result.rfind(b"PK\x01\x02")
        for _ in range(rng.choice((1, 3))):
            if at > 0:
                field = rng.choice((20, 24, 28, 42))
                result[at + field : at + field + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\xff" * 4, bytes(4)))
                at = result.rfind(b"PK\x01\x02", 0, at)
    return bytes(result)


@target
def pickles(rng: Random, world: World) -> Input:
    folder = linked(world, seeds.WEIGHTS)
    marker, zipped = str(world.root / "cwd" / "marker"), rng.random() < 0.6
    kind = rng.randrange(10)
    if kind == 0:
        evil: Any = {"w": torch.ones(2), "x": rng.choice(_gadgets(marker))}
        evil = rng.choice((evil, {"state_dict": evil}, [evil], evil["x"]))
        raw = _save(evil, zipped) if rng.random() < 0.8 else pickle.dumps(evil, protocol=rng.choice((2, 4, 5)))
    elif kind == 1:
        raw = _save({"w": torch.ones(3), "odd": _Forged(*rng.choice(_VIEWS))}, zipped)
    elif kind == 2:
        raw = mutate.cut(rng, _pickled(zipped))
    elif kind in (3, 4):
        raw = mutate.flipped(rng, _pickled(zipped))
    elif kind in (5, 6):
        raw = _archive(rng, _pickled(True))
    elif kind == 7:
        names = rng.choice(
            ("", "__metadata__", "\ud800", "n" * 70_000, "a\nb", "model.layers." + "9" * 5000 + ".w", b"b", 3)
        )
        raw = _save({**seeds.tensors(0), names: rng.choice((torch.ones(2), torch.ones(()), 1, None, [], {}))}, zipped)
    elif kind == 8:
        raw = _dag(rng, marker)
        if zipped:
            with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
                archive.writestr("archive/data.pkl", raw)
                archive.writestr("archive/version", b"3\n")
            raw = (folder / "archive.zip").read_bytes()
    else:
        content = rng.choice(([], {}, None, 1, "x", torch.ones(2), {"model": {}}, {"state_dict": 3}, {"a": {"b": {}}}))
        raw = rng.choice(
            (_save(content, zipped), b"", b"\x80\x02", b"\x80\x02.", b"PK\x03\x04", b"PK\x05\x06" + bytes(18))
        )
    name = rng.choice((seeds.PICKLE, seeds.PICKLE, "x.pt"))
    (folder / name).write_bytes(raw)
    return given(rng, world, str(folder / name if name == "x.pt" else folder))
