"""Synthetic checkpoints: a Llama-shaped base and fine-tunes of it, of any size, made in little memory.

The base is what initialisation gives: N(0, 0.02) in matrices, 1 with the same noise in norms. A fine-tune adds noise of
1 % of that to every matrix, in float32, and rounds once. Norms and one matrix in sixteen (another one in each
fine-tune) stay as they are, as fine-tuning leaves some tensors alone, but so few that no tool gains much by noticing.
All numbers are functions of (tensor, model, place), so the files are the same for any number of threads.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from regraft.checkpoint.dtypes import DTYPES as STORED
from regraft.checkpoint.dtypes import dtype_name
from regraft.checkpoint.writer import ModelWriter, TensorSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPREAD = 0.02  # of the base's weights
RELATIVE_CHANGE = 0.01  # of a fine-tune, in units of SPREAD
UNCHANGED = 16  # one matrix in so many is left alone by a fine-tune
CHUNK = 1 << 22
STAMP = "checkpoints.json"
_VERSION = 2  # of what is made: a cache that another version made is not used


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, in the words of its configuration. Embedding and head are not tied."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def parameters(self) -> int:
        kv = self.hidden_size * self.num_key_value_heads // self.num_attention_heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * kv
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_hidden_layers * layer + self.hidden_size * (2 * self.vocab_size + 1)


TINY_LLAMA = Shape(2048, 22, 32, 4, 5632, 32000)


def shape_of(parameters: float) -> Shape:
    """The shape whose size is nearest to `parameters`; for 1.1e9 that of TinyLlama.

    Heads are 64 wide, four of them share keys and values, feed-forward layers are 2.75 times as wide, and depth grows
    with width as it does in published models.
    """
    if abs(parameters / TINY_LLAMA.parameters - 1) < 0.005:
        return TINY_LLAMA
    vocab, head = (32000, 64) if parameters >= 5e7 else (512, 16)

    def candidates() -> Iterator[tuple[float, Shape]]:
        for heads in range(4, 129, 4):
            hidden, kv = heads * head, heads // 4
            wide = round(hidden * 2.75 / head) * head
            one = Shape(hidden, 1, heads, kv, wide, vocab)
            layer = one.parameters - hidden * (2 * vocab + 1)
            layers = max(1, round((parameters - hidden * (2 * vocab + 1)) / layer))
            shape = Shape(hidden, layers, heads, kv, wide, vocab)
            miss = abs(math.log(shape.parameters / parameters))
            yield miss + 0.05 * abs(math.log(hidden / layers / 93)), shape

    return min(candidates(), key=lambda c: c[0])[1]


def parse_parameters(text: str) -> float:
    """`1.1b`, `350m`, `20k` or a plain number.

    Raises:
        ValueError: it is none of these, or too small to be a model.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([kmb]?)", text.strip().lower())
    value = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]] if match else 0
    if value < 1e5:
        raise ValueError(f"{text!r} is no number of parameters from 100k on, such as 1.1b")
    return value


@dataclass(frozen=True)
class Checkpoints:
    """A base and fine-tunes of it, side by side in the folder `models` of `folder`."""

    folder: Path
    names: tuple[str, ...]  # the base comes first
    shape: Shape
    tensors: int
    bytes_each: int  # of all tensors of one model

    @property
    def parameters(self) -> int:
        return self.shape.parameters

    def weights(self, *names: str) -> list[Path]:
        """The weight files of these models, or of all."""
        folders = [self.folder / "models" / name for name in names or self.names]
        return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def make_checkpoints(
    work: Path, shape: Shape, models: int, dtype: str, tell: Callable[[str, float], None] = lambda what, share: None
) -> Checkpoints:
    """Make a base and `models` fine-tunes below `work`, or take what an earlier call has made there.

    Args:
        work: an existing folder.
        dtype: a key of `DTYPES`.
        tell: called with what is being done and the share of it that is done.

    Raises:
        UserError: the disk is too small.
    """
    names = ("base", *(f"tuned-{i + 1}" for i in range(models)))
    folder = work / f"{shape.parameters / 1e6:.0f}m-{shape.num_hidden_layers}-layers-{models}-models-{dtype}"
    facts = {"version": _VERSION, "shape": asdict(shape), "names": list(names), "dtype": dtype}
    specs = _specs(shape, dtype_name(DTYPES[dtype]))
    made = Checkpoints(folder, names, shape, len(specs), sum(s.nbytes for s in specs))
    stamp = folder / STAMP
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == facts:
        return made
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "models").mkdir(parents=True)
    with ExitStack() as stack:
        writers = [stack.enter_context(ModelWriter(folder / "models" / name, specs)) for name in names]
        pieces = [(number, spec, start) for number, spec in enumerate(specs) for start in range(0, spec.numel, CHUNK)]
        pool = ThreadPoolExecutor(os.cpu_count())
        stack.callback(pool.shutdown, cancel_futures=True)  # Ctrl-C and errors wait for no further piece
        done = pool.map(lambda piece: _write_piece(writers, *piece), pieces)
        for count, _ in enumerate(done, 1):
            tell(f"making {len(names)} checkpoints", count / len(pieces))
        for writer in writers:
            _write_sidecars(writer.staging, shape, DTYPES[dtype])
            writer.publish()
    stamp.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return made


def _specs(shape: Shape, dtype: str) -> list[TensorSpec]:
    """Names and shapes as transformers has them, without weights."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        state = LlamaForCausalLM(_config(shape)).state_dict()
    return [TensorSpec(name, tuple(tensor.shape), dtype) for name, tensor in state.items()]


def _config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**asdict(shape), max_position_embeddings=2048, tie_word_embeddings=False)


def _write_piece(writers: list[ModelWriter], number: int, spec: TensorSpec, start: int) -> None:
    """The same slice of one tensor in all models."""
    length = min(CHUNK, spec.numel - start)
    matrix = len(spec.shape) > 1
    base = _noise(spec.name, 0, start, length).mul_(SPREAD)
    if not matrix:
        base += 1
    stored = base.to(STORED[spec.dtype])
    writers[0].write(spec.name, start, stored)
    base.copy_(stored)  # a fine-tune begins at what was stored
    for model, writer in enumerate(writers[1:], 1):
        if not matrix or (number + model) % UNCHANGED == 0:
            writer.write(spec.name, start, stored)
        else:
            changed = _noise(spec.name, model, start, length).mul_(SPREAD * RELATIVE_CHANGE).add_(base)
            writer.write(spec.name, start, changed.to(STORED[spec.dtype]))


def _noise(name: str, model: int, start: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(crc32(f"{name} {model} {start}".encode()))
    return torch.randn(length, generator=generator)


def _write_sidecars(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """What real checkpoints have beside their weights: a configuration, and a tokenizer of the same vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    config = _config(shape)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"word{i}": i for i in range(3, shape.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
