"""The modules of a model as PEFT will find them: its class is built without weights, and asked.

An adapter names modules of the loaded model, not tensors of a file. Which module is a linear layer, a transposed one, a
convolution or an embedding, which tensors are tied, and under which name a stored tensor is loaded stands in no file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from regraft.adapters.factors import Factors
from regraft.checkpoint import Checkpoint, TensorSource
from regraft.checkpoint.model_class import REFUSALS, bounded, loaded_names, model_class, without_weights
from regraft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LINEAR, TRANSPOSED, CONVOLUTION, EMBEDDING, OTHER = "linear", "transposed", "convolution", "embedding", "other"


@dataclass(frozen=True)
class Parameter:
    """An entry of the model's state.

    Attributes:
        name: in the loaded model; `module` and `leaf` are its two parts.
        kind: of the module: "linear", "transposed" (weights stored (in, out)), "convolution", "embedding", "other".
        shape: of the tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def factorable(self) -> bool:
        """Whether PEFT has a product of factors for it."""
        return self.leaf == "weight" and self.kind != OTHER

    @property
    def bias(self) -> bool:
        """Whether it is the bias of a layer that can have factors."""
        return self.leaf == "bias" and self.kind != OTHER

    def matrix(self, flat: Tensor) -> Tensor:
        """The tensor's values as the matrix (out, in) that the factors make."""
        two = flat.view(self.shape[0], -1)
        return two.T if self.kind in (TRANSPOSED, EMBEDDING) else two

    def tensors(self, factors: Factors) -> dict[str, Tensor]:
        """The factors under the names and in the shapes that PEFT gives them."""
        up, down = factors.up, factors.down
        if self.kind == EMBEDDING:
            return {f"{self.module}.lora_embedding_A": down, f"{self.module}.lora_embedding_B": up}
        if self.kind == CONVOLUTION:
            down = down.view(factors.rank, *self.shape[1:])
            up = up.view(*up.shape, *(1 for _ in self.shape[2:]))
        return {f"{self.module}.lora_A.weight": down, f"{self.module}.lora_B.weight": up}


class Skeleton:
    """The state of a model of one class and configuration.

    Attributes:
        class_name: of the model.
        parameters: every entry of the state by name, tied ones once.
        tied: other entries -> name in `parameters`.
        modules: all names of modules.

    Raises:
        UserError: RG309 if transformers has no such class, RG105 if the class refuses the configuration.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        name = "".join(checkpoint.architectures[:1])
        kind = model_class(name) if name else None
        if kind is None or not bounded(checkpoint.config):
            what = f"transformers has no class {name!r}" if name else "config.json names no class"
            fix = "use a model of a class that transformers has: PEFT finds modules by the class"
            raise UserError("RG309", what, where=checkpoint.ref, fix=fix)
        try:
            model = without_weights(kind, checkpoint.config)
        except REFUSALS as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            what = f"{name} cannot be built from its configuration: {reason}"
            raise UserError("RG105", what, where=checkpoint.ref, fix="repair config.json") from None
        self._model: Any = model
        self.class_name = name
        self.modules = [path for path, _ in model.named_modules() if path]
        self.tied = _tied(model)
        lists = [path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
        self._layers = [path for path in self.modules if any(path.startswith(f"{one}.") for one in lists)]
        kinds = _kinds(model)
        self.parameters: dict[str, Parameter] = {}
        self._aliases: dict[str, list[Parameter]] = {}
        for full, value in model.state_dict().items():
            found = Parameter(full, kinds.get(full.rpartition(".")[0], OTHER), tuple(value.shape))
            if full in self.tied:
                self._aliases.setdefault(self.tied[full], []).append(found)
            else:
                self.parameters[full] = found

    def sources(self, checkpoint: Checkpoint) -> tuple[dict[str, TensorSource], list[str]]:
        """The stored tensors by their names in the loaded model, and the stored names that have no place in it.

        Raises:
            UserError: RG209 if tensors differ that are one in the model.
        """
        names = loaded_names(self._model, checkpoint.tensors)
        found: dict[str, TensorSource] = {}
        homes: dict[str, str] = {}
        for stored, name in names.items():
            home = self.tied.get(name, name)
            if home in homes and not checkpoint.same_bytes(homes[home], stored):
                what = f"{homes[home]} and {stored} differ, and config.json makes them one tensor"
                raise UserError(
                    "RG209", what, where=checkpoint.ref, fix="set tie_word_embeddings to false in the model"
                )
            homes.setdefault(home, stored)
            found[home] = checkpoint.tensors[homes[home]]
        return found, [stored for stored in checkpoint.tensors if stored not in names]

    def all_of(self, parameter: Parameter) -> list[Parameter]:
        """The parameter, and what is tied to it."""
        return [parameter, *self._aliases.get(parameter.name, ())]

    def below(self, module: str) -> list[str]:
        """Names of everything that a module holds, its children's included."""
        return [name for name in (*self.parameters, *self.tied) if name.startswith(f"{module}.")]

    def savable(self, module: str) -> bool:
        """Whether a module can be replaced as a whole without replacing layers of the model with it."""
        return bool(module) and not any(path.startswith(f"{module}.") for path in self._layers)

    def shortest(self, chosen: Collection[str], matches: Callable[[str, str], bool]) -> list[str]:
        """The shortest ends of module names that match all of the chosen modules and no other one.

        Args:
            chosen: names of modules.
            matches: (module, end) -> whether PEFT takes the module for one that the end names.
        """
        others = [module for module in self.modules if module not in chosen]
        ends: list[str] = []
        for module in chosen:
            if any(matches(module, end) for end in ends):
                continue
            parts = module.split(".")
            candidates = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
            ends.append(next((end for end in candidates if not any(matches(m, end) for m in others)), module))
        return ends


def _kinds(model: Any) -> dict[str, str]:
    from transformers.pytorch_utils import Conv1D

    kinds: dict[str, str] = {}
    inside: list[str] = []  # its parts are used without being called, so that an adapter on them would do nothing
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            inside.append(f"{path}.")
        elif any(path.startswith(prefix) for prefix in inside):
            continue
        elif isinstance(module, torch.nn.Linear):
            kinds[path] = LINEAR
        elif isinstance(module, Conv1D):
            kinds[path] = TRANSPOSED
        elif isinstance(module, torch.nn.Embedding):
            kinds[path] = EMBEDDING
        elif isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) and module.groups == 1:
            kinds[path] = CONVOLUTION
    return kinds


def _tied(model: Any) -> dict[str, str]:
    """Entry of the state -> the one that it shares its tensor with."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    declared = getattr(model, "all_tied_weights_keys", None)
    for alias, name in (declared or {}).items():
        if name not in tied and alias != name and tied.get(alias) != name:
            tied = {a: n for a, n in tied.items() if n != alias} | {alias: name}
    return tied
