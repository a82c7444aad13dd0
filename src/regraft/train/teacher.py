"""A frozen model that teaches: eval mode, no gradients, possibly on another device, its outputs kept on disk if wanted.

What a teacher says of an input is kept under the content of that input (and the teacher's own), example by example and
without padding, so that another order, another size of batches or another run finds it again. That pays where the data
is fixed; inputs that are augmented or masked anew each time are never found again, which is why it has to be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from regraft.checkpoint.device import usable_device
from regraft.methods import Options
from regraft.train.feature_cache import FeatureCache
from regraft.train.masks import mask_name
from regraft.train.tap import Seen, Signal, look

TEACHER = "teacher"  # the entry of a batch that only the teacher sees
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The modules whose outputs depend on the other examples of a batch, while they learn."""
    return [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]


class CacheOptions(Options):
    """Whether what frozen models say is kept."""

    cache_teacher: bool = Field(
        False, description="keep what frozen models say on disk; pays for fixed inputs over several epochs"
    )


class TeacherOptions(Options):
    """Where a teacher computes."""

    teacher_device: str | None = Field(
        None, description="device of the teacher, such as cpu or cuda:1, if not the student's"
    )


def device_of(options: TeacherOptions) -> torch.device | None:
    """The device that a teacher is wanted on; None for the student's.

    Raises:
        UserError: RG406 if torch does not know it, or cannot use it here.
    """
    if options.teacher_device is None:
        return None
    return usable_device(options.teacher_device, fix="change teacher_device, or leave it out", dtype="float32")


@dataclass
class Output:
    """What is kept of a teacher's output."""

    logits: Tensor | None


@dataclass
class Teacher:
    """Runs a frozen model on batches.

    Attributes:
        model: put into eval mode, its parameters frozen, moved to `device` if that is given.
        signals: what to look at inside it; set by the objective.
        device: where it computes; the batch's own device if None. What it says comes back to the batch's device.
        cache: where its outputs are kept, or None.
        batch_statistics: let batch norms use the statistics of the batch, as in training, instead of their running
            ones, which stay as they are. What the teacher says of an example then depends on its batch.
    """

    model: Any
    signals: Sequence[Signal] = ()
    device: torch.device | str | None = None
    cache: FeatureCache | None = None
    batch_statistics: bool = False
    passes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self._still()
        if getattr(self.model.config, "use_cache", False):
            self.model.config.use_cache = False  # keys and values of a pass are of no use after it
        if self.device is not None:
            self.model.to(self.device)

    def __call__(self, batch: Mapping[str, Any]) -> Seen:
        """What the teacher makes of a batch: logits, if it has a head, and the signals. Labels are not shown to it.

        A batch with an entry `teacher` holds a view of its own for the teacher, see `regraft.train.views`.
        """
        own = batch.get(TEACHER, batch)
        inputs = {name: value for name, value in own.items() if isinstance(value, Tensor) and name != "labels"}
        home = next(iter(inputs.values())).device
        if self.cache is None:
            return self._run(inputs, home)
        return self._cached(inputs, home)

    def _run(self, inputs: Mapping[str, Tensor], home: torch.device) -> Seen:
        self.passes += 1
        target = torch.device(self.device) if self.device is not None else home
        if next(self.model.parameters()).device != target:
            self.model.to(target)
        self._still()
        with torch.no_grad():
            seen = look(self.model, {name: value.to(target) for name, value in inputs.items()}, self.signals)
        logits = getattr(seen.output, "logits", None)
        output = Output(logits.to(home) if logits is not None else None)
        return Seen(self.model, output, {signal: value.to(home) for signal, value in seen.signals.items()})

    def _still(self) -> None:
        """Nothing is drawn and nothing is learnt in a pass."""
        self.model.eval()
        if self.batch_statistics:
            for module in batch_norms(self.model):
                module.train()
                module.momentum = 0.0  # type: ignore[assignment]  # the running statistics stay what they are

    def _cached(self, inputs: Mapping[str, Tensor], home: torch.device) -> Seen:
        assert self.cache is not None
        keys = self.cache.keys(inputs, [repr(signal) for signal in self.signals])
        found = [self.cache.read(key) for key in keys]
        if any(one is None for one in found):
            seen = self._run(inputs, home)
            parts = {repr(signal): value for signal, value in seen.signals.items()}
            if seen.output.logits is not None:
                parts["logits"] = seen.output.logits
            masks = self._masks(inputs)
            for i, key in enumerate(keys):
                if found[i] is None:
                    kept = {name: _kept(value[i], masks.get(name), i) for name, value in parts.items()}
                    self.cache.write(key, kept)
            return seen
        rows = [one for one in found if one is not None]
        masks = self._masks(inputs)
        whole = {
            name: torch.stack([_spread(row[name], masks.get(name), i) for i, row in enumerate(rows)])
            for name in rows[0]
        }
        logits = whole.pop("logits", None)
        signals = {signal: whole[repr(signal)].to(home) for signal in self.signals}
        return Seen(self.model, Output(logits.to(home) if logits is not None else None), signals)

    def _masks(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which positions are real (B, T), by the name of what is kept; logits are about what the last stack reads."""
        names = {repr(signal): mask_name(signal.stack) for signal in self.signals}
        names["logits"] = "decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask"
        return {name: inputs[mask].bool().cpu() for name, mask in names.items() if mask in inputs}


def _kept(value: Tensor, mask: Tensor | None, row: int) -> Tensor:
    """One example's part of an output (T, ...) without its padding."""
    padded = mask is not None and value.ndim > 1 and value.shape[0] == mask.shape[1]
    return value.cpu()[mask[row]] if padded and mask is not None else value.cpu()


def _spread(value: Tensor, mask: Tensor | None, row: int) -> Tensor:
    """The inverse: zeros where padding was."""
    if mask is None or value.ndim < 2 or value.shape[0] != int(mask[row].sum()):
        return value
    whole = value.new_zeros((mask.shape[1], *value.shape[1:]))
    whole[mask[row]] = value
    return whole
