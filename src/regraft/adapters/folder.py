"""A LoRA adapter as PEFT saves it: adapter_config.json and adapter_model.safetensors.

The scaling is folded into the factors, so that alpha equals the rank everywhere and tools that know nothing of
`rank_pattern` still see a factor of 1. Modules are named by the shortest ends of their paths that mean these modules
and no other ones, as people write them. The factors are in memory until the file is written; tensors that are saved
whole are read when it is.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from regraft.adapters.factors import Factors
from regraft.adapters.skeleton import CONVOLUTION, EMBEDDING, TRANSPOSED, Parameter, Skeleton
from regraft.checkpoint import Checkpoint, MemoryTensor, TensorSource, TensorSpec, numel
from regraft.checkpoint.adapter_keys import PREFIX
from regraft.checkpoint.shards import Shard, layout
from regraft.checkpoint.tensor import stored_dtype
from regraft.checkpoint.weights import ADAPTER_CONFIG

WEIGHTS = "adapter_model.safetensors"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_PIECE = 1 << 22


def task_of(class_name: str) -> str | None:
    """What PEFT calls the task of a class of models; None for those that it has no name for."""
    return next((task for end, task in _TASKS.items() if class_name.endswith(end)), None)


class Adapter:
    """An adapter in the making.

    Args:
        skeleton: the model that it is for.
        dtype: of the factors.

    Attributes:
        ranks: module -> rank.
    """

    def __init__(self, skeleton: Skeleton, dtype: torch.dtype) -> None:
        self.skeleton, self.dtype = skeleton, dtype
        self.ranks: dict[str, int] = {}
        self._kinds: set[str] = set()
        self._saved: list[str] = []
        self._biases: dict[str, TensorSource] = {}
        self._tensors: dict[str, TensorSource] = {}

    def add(self, parameter: Parameter, factors: Factors) -> Factors:
        """Adapt the module of a parameter, and of what is tied to it; returns the factors as they are stored."""
        stored = factors.to(self.dtype)
        for one in self.skeleton.all_of(parameter):
            # An embedding's matrix is the transpose of its tensor, and a head's is not.
            same = (one.kind == EMBEDDING) == (parameter.kind == EMBEDDING)
            for name, tensor in one.tensors(stored if same else stored.turned).items():
                self._tensors[name] = MemoryTensor(name, tensor.contiguous())
            self.ranks[one.module] = stored.rank
            self._kinds.add(one.kind)
        return stored

    def save(self, module: str, sources: dict[str, TensorSource]) -> None:
        """Replace a module as a whole by these tensors, named by the entries of the model's state."""
        self._saved.append(module)
        self._tensors |= sources

    def replace_bias(self, parameter: Parameter, source: TensorSource) -> None:
        """Replace a bias, and what is tied to it."""
        for one in self.skeleton.all_of(parameter):
            self._biases[one.name] = source

    @property
    def empty(self) -> bool:
        return not (self._tensors or self._biases)

    @property
    def tensors(self) -> dict[str, TensorSource]:
        """Everything by its key in the file."""
        found = {PREFIX + name: source for name, source in self._tensors.items()}
        for name, source in self._biases.items():
            module, _, leaf = name.rpartition(".")
            inner = "base_layer." if module in self.ranks else ""
            found[f"{PREFIX}{module}.{inner}{leaf}"] = source
        return found

    @property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(key, source.shape, stored_dtype(source)) for key, source in self.tensors.items()]

    def config(self, base: Checkpoint) -> dict[str, Any]:
        """What adapter_config.json says; names the base as the user did, or by its id on the Hub."""
        counts = Counter(self.ranks.values())
        rank = max(counts, key=lambda r: (counts[r], r), default=8)
        pattern = {self._pattern(module): r for module, r in self.ranks.items() if r != rank}
        linear = self._kinds - {EMBEDDING, CONVOLUTION}
        return {
            "peft_type": "LORA",
            "task_type": task_of(self.skeleton.class_name),
            "auto_mapping": None,
            "base_model_name_or_path": base.repo_id or base.ref,
            "revision": base.revision or None,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(self.skeleton.shortest(self.ranks, _is_target)),
            "modules_to_save": sorted(self.skeleton.shortest(self._saved, str.endswith)) or None,
            "fan_in_fan_out": linear == {TRANSPOSED},
            "bias": "all" if self._biases else "none",
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def write(self, staging: Path, base: Checkpoint) -> None:
        """Write both files into a folder."""
        text = json.dumps(self.config(base), indent=2, ensure_ascii=False) + "\n"
        (staging / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        tensors = self.tensors
        shard = self._shard()
        with (staging / WEIGHTS).open("wb") as file:
            file.write(shard.header)
            for key, offset in shard.offsets.items():
                file.seek(offset)
                for start in range(0, numel(tensors[key]), _PIECE):
                    piece = tensors[key].read(start, start + _PIECE)
                    file.write(memoryview(piece.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _shard(self) -> Shard:
        specs = self.specs
        return layout(specs, sum(spec.nbytes for spec in specs) + 1)[0]

    def _pattern(self, module: str) -> str:
        """A module in a pattern, which PEFT matches at the end of names."""
        ambiguous = any(other.endswith(f".{module}") for other in self.skeleton.modules)
        return f"^{module}" if ambiguous else module


def named_modules(skeleton: Skeleton, name: str) -> list[str]:
    """The modules whose paths end in a name."""
    return [module for module in skeleton.modules if _is_target(module, name)]


def _is_target(module: str, end: str) -> bool:
    return module == end or module.endswith(f".{end}")
