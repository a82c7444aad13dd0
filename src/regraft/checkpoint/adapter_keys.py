"""What the keys of a PEFT adapter file say, and which tensors of the base they mean.

An adapter names modules of the model it was trained on, as in `base_model.model.<module>.lora_A.weight`; the file is
the truth about what was adapted, whatever patterns the config has. The base may have been saved with another prefix
(as the bare model without its head, or the reverse). One such prefix is found for the whole adapter, and a key that
then fits nowhere is an error: guessing further could put a change into the wrong tower of a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from regraft.checkpoint.tensor import TensorSource
from regraft.errors import UserError

PREFIX = "base_model.model."
_PARTS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_embedding_A": "embedding down",
    "lora_embedding_B": "embedding up",
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "scale",
}
_PART = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(_PARTS)})(?P<tail>(\.[^.]+)*)")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?P<rest>.+)")


@dataclass
class AdapterKeys:
    """The tensors of an adapter, sorted by what they do.

    Attributes:
        modules: module -> part -> tensor, where a part is "down", "up", "magnitude", "scale", "up bias" and the like.
        tokens: embedding module -> rows for some of its tokens.
        whole: name of a parameter -> tensor that replaces it.
        keys: module or parameter -> the key as it stands in the file, for messages.
    """

    modules: dict[str, dict[str, TensorSource]] = field(default_factory=dict)
    tokens: dict[str, TensorSource] = field(default_factory=dict)
    whole: dict[str, TensorSource] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def sort_keys(sources: Mapping[str, TensorSource], path: Path) -> AdapterKeys:
    """Take the keys of an adapter file apart; they may hold the adapter's name or not.

    Raises:
        UserError: RG108 if the file holds several adapters.
    """
    found = AdapterKeys()
    adapters: set[str] = set()
    saved: dict[str, TensorSource] = {}
    for key, source in sources.items():
        name = key.removeprefix(PREFIX)
        if match := _PART.fullmatch(name):
            tail = match["tail"].split(".")[1:]
            leaf = tail.pop() if tail and tail[-1] in ("weight", "bias") else "weight"
            adapters.add(".".join(tail))
            module = match["module"]
            part = _PARTS[match["part"]] + (" bias" if leaf == "bias" else "")
            if part in found.modules.setdefault(module, {}):
                raise _several(adapters, path)
            found.modules[module][part] = source
            found.keys.setdefault(module, key)
        elif match := _TOKENS.fullmatch(name):
            found.tokens[match["module"]] = source
            found.keys[match["module"]] = key
        elif match := _SAVED.fullmatch(name):
            saved[key] = source
        elif ".original_module." not in name:
            name = name.replace(".base_layer.", ".")
            found.whole[name] = source
            found.keys[name] = key
    if len(adapters) > 1:
        raise _several(adapters, path)
    for key, source in saved.items():
        match = _SAVED.fullmatch(key.removeprefix(PREFIX))
        assert match is not None
        head, dot, rest = match["rest"].partition(".")
        name = f"{match['module']}.{rest if dot and head in {'default', *adapters} else match['rest']}"
        found.whole[name] = source
        found.keys[name] = key
    return found


def _several(adapters: Collection[str], path: Path) -> UserError:
    what = f"the file holds more than one adapter ({', '.join(sorted(name or 'unnamed' for name in adapters))})"
    return UserError("RG108", what, where=str(path), fix="save each of them by itself with peft's save_pretrained")


class Names:
    """Names of the adapted model -> names of the base, which differ by at most one prefix.

    Args:
        targets: parameters that the adapter changes, by their names in the model it was trained on.
        stored: names in the base.
        renames: name of a parameter in memory -> name in the base, where transformers loads the architecture under
            other names than those in its files; asked only for names that do not fit otherwise.
        where: the adapter, for messages.

    Raises:
        UserError: RG108 if no target is in the base, or if they could be in several places of it.
    """

    def __init__(
        self,
        targets: Iterable[str],
        stored: Collection[str],
        renames: Callable[[], Mapping[str, str]],
        where: str,
    ) -> None:
        self._stored = set(stored)
        self._renames = renames
        self.strip = self.add = ""
        wanted = list(targets)
        if not wanted or any(name in self._stored for name in wanted):
            return
        fits = [(strip, "") for strip in _leading(wanted) if not any(name.startswith(strip) for name in self._stored)]
        for probe in dict.fromkeys(wanted[:1] + wanted[-1:]):
            ending = f".{probe}"
            fits += [("", name[: -len(probe)]) for name in sorted(self._stored) if name.endswith(ending)]
        counts = {fit: sum(self._mapped(name, *fit) in self._stored for name in wanted) for fit in fits}
        best = max(counts.values(), default=0)
        chosen = [fit for fit, count in counts.items() if count == best and best]
        if not chosen and not any(name in self._renames() for name in wanted):
            what = f"the adapter changes {wanted[0]}, and the base has no such tensor, with or without a prefix"
            raise UserError("RG108", what, where=where, fix="apply it to the model that it was trained on")
        if len(chosen) > 1:
            places = " and ".join(repr(self._mapped(wanted[0], *fit)) for fit in chosen[:3])
            what = f"the adapter changes {wanted[0]}, which could be {places} of the base"
            raise UserError("RG108", what, where=where, fix="apply it to the model that it was trained on")
        if chosen:
            self.strip, self.add = chosen[0]

    def find(self, name: str) -> str | None:
        """The name that a tensor has in the base, None if it has none."""
        for candidate in (name, self.new(name)):
            if candidate in self._stored:
                return candidate
        return self._renames().get(name)

    def new(self, name: str) -> str:
        """The name that a tensor which the base lacks gets."""
        return self._mapped(name, self.strip, self.add)

    @staticmethod
    def _mapped(name: str, strip: str, add: str) -> str:
        return add + name.removeprefix(strip)


def _leading(names: list[str]) -> list[str]:
    """Prefixes of up to three parts, with their dots, that most names may have too much."""
    prefixes: dict[str, None] = {}
    for name in names[:1] + names[-1:]:
        parts = name.split(".")
        for count in range(1, min(4, len(parts) - 1)):
            prefixes[".".join(parts[:count]) + "."] = None
    return list(prefixes)
