"""What an adapter's config says, checked: which kinds of PEFT adapters are a change of weights, and how large it is.

Only what can be folded into weights exactly is accepted. Kinds that act on the input (prompts), depend on it (routers,
activated LoRA) or were trained on a base that their own start had changed (PiSSA and its relatives) are refused by
name: applying them as a plain LoRA would give a wrong model without a sign of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]  # re has no time limit; a dependency of transformers

from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.paths import inside, shown
from regraft.checkpoint.weights import ADAPTER_CONFIG
from regraft.errors import UserError

MERGE_FIRST = "merge it into the base with peft's merge_and_unload first, and name the result"
_NO_DELTA = {
    "target_parameters": "adapters on bare parameters (target_parameters)",
    "layer_replication": "adapters with layer_replication",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routers",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
_LARGEST = 3.4e38
_SECONDS = 1.0  # for one pattern and one module, where microseconds are usual
# Their start subtracts the first low-rank step from the base, which the adapter alone does not tell.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterConfig:
    """adapter_config.json of a folder.

    Raises:
        UserError: RG105 if it cannot be read, RG108 if there is none or it is of a kind that is no change of weights.
    """

    def __init__(self, folder: Path) -> None:
        self.path = inside(folder, ADAPTER_CONFIG, where=folder)
        if not self.path.is_file():
            what = f"the folder has no {ADAPTER_CONFIG}, so it is no PEFT adapter"
            fix = "name an adapter after the +; to combine whole models, merge them by a recipe"
            raise UserError("RG108", what, where=str(folder), fix=fix)
        self.values: Mapping[str, Any] = read_json(self.path)
        self.kind = str(self.values.get("peft_type", ""))
        if self.kind not in ("LORA", "IA3"):
            raise self.refused(f"adapters of type {shown(self.values.get('peft_type'))} cannot be applied")
        for key, name in _NO_DELTA.items():
            if self.values.get(key):
                raise self.refused(f"{name} cannot be applied")
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
            what = f"the adapter was trained on a base that its start ({start}) had changed"
            fix = "save it with path_initial_model_for_weight_conversion, or " + MERGE_FIRST
            raise UserError("RG108", what, where=str(self.path), fix=fix)
        self.dora = bool(self.values.get("use_dora"))
        self.transposed = bool(self.values.get("fan_in_fan_out"))

    @property
    def base(self) -> str:
        """The base as it was called when the adapter was saved, "" if it is not told."""
        return str(self.values.get("base_model_name_or_path") or "")

    @property
    def task(self) -> str:
        """What the model was adapted for, as "SEQ_CLS"; "" if it is not told."""
        return str(self.values.get("task_type") or "")

    @property
    def trained_class(self) -> str:
        """Class of the model that was adapted, if the config tells it."""
        mapping = self.values.get("auto_mapping")
        return str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""

    def names(self, key: str) -> list[str]:
        """A list of module names; [] if the config has something else there, such as a regular expression."""
        value = self.values.get(key)
        return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []

    def rank(self, module: str) -> int:
        """r of a module, from rank_pattern or the config.

        Raises:
            UserError: RG108 if it is no positive integer.
        """
        value = self._of(module, "rank_pattern", "r", 8)
        if type(value) is not int or value < 1:
            raise self.refused(f"r is {shown(value)} for {module}", "repair the file")
        return value

    def scaling(self, module: str) -> float:
        """The factor of a module's change: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.

        Raises:
            UserError: RG108 if r is no positive integer, or alpha no number that float32 can hold.
        """
        alpha = self._of(module, "alpha_pattern", "lora_alpha", 8)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= _LARGEST:
            raise self.refused(f"lora_alpha is {shown(alpha)} for {module}", "repair the file")
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.values.get("use_rslora") else alpha / rank

    def indices(self, module: str, rows: int, tokens: int) -> list[int]:
        """Token ids that the rows of `module` belong to.

        Raises:
            UserError: RG108 if they are not `rows` different integers below `tokens`.
        """
        given = self.values.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((ids for name, ids in given.items() if _ends(module, name)), None)
        good = isinstance(given, list) and all(type(i) is int and 0 <= i < tokens for i in given)
        if not good or len(set(given)) != len(given) or len(given) != rows:  # type: ignore[arg-type]
            what = f"trainable_token_indices are not {rows} different tokens below {tokens} for {module}"
            raise self.refused(what, "repair the file")
        return given  # type: ignore[return-value]

    def saved(self, name: str) -> bool:
        """Whether a parameter belongs to a module that modules_to_save names, by the end of its path as in peft."""
        module = name.rpartition(".")[0]
        parents = [module] + [module[: match.start()] for match in re.finditer(r"\.", module)]
        return any(parent.endswith(wanted) for wanted in self.names("modules_to_save") for parent in parents)

    def targets(self, module: str) -> str:
        """The entry of target_modules that names a module, "" if none does or if they are a regular expression."""
        return next((wanted for wanted in self.names("target_modules") if _ends(module, wanted)), "")

    def refused(self, what: str, fix: str = MERGE_FIRST) -> UserError:
        """RG108 at this file."""
        return UserError("RG108", what, where=str(self.path), fix=fix)

    def _of(self, module: str, patterns: str, key: str, default: int) -> Any:
        given = self.values.get(patterns) or {}
        if not isinstance(given, dict):
            raise self.refused(f"{patterns} is {shown(given)} and no mapping", "repair the file")
        for pattern, value in given.items():
            try:
                # As peft does it, with an end: there are patterns that take years.
                if regex.fullmatch(rf"(.*\.)?({pattern})", module, timeout=_SECONDS):
                    return value
            except (regex.error, RecursionError) as error:
                raise self.refused(f"{shown(pattern)} in {patterns} is no pattern: {error}", "repair it") from None
            except TimeoutError:
                raise self.refused(f"{shown(pattern)} in {patterns} takes too long to match", "repair it") from None
        return self.values.get(key, default)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
