"""Asking transformers what a foreign config.json means, without trusting it.

A config names a class, and counts of things that the class makes lists of or builds: a number of layers of 10^9 is a
hang, and a name such as "Trainer" is something else than a model. Both are looked at before transformers sees them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

# What configuration classes and constructors raise for values that they do not expect. Their checks differ by class.
REFUSALS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
)
# Keys of which classes make that many entries, layers or labels; sizes and positions may be large.
_COUNTS = re.compile(r"^(num|n)_|layer|label|depth|stage|block|expert|index|indices|interval|pattern")
MOST = 1 << 16


def bounded(config: Mapping[str, Any], most: int = MOST) -> bool:
    """Whether no count in a config, or in one nested in it, is larger than `most`."""
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        counts = _COUNTS.search(str(key)) is not None
        for one in values:
            if isinstance(one, Mapping):
                if not bounded(one, most):
                    return False
            elif counts and isinstance(one, (int, float)) and not abs(one) <= most:
                return False
    return True


def model_class(name: str) -> Any:
    """The class of models that transformers has under a name; None if that is something else, or needs a package."""
    import transformers

    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):
        return None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def without_weights(kind: Any, config: Mapping[str, Any]) -> Any:
    """A model of a class on the meta device; the config must be `bounded`.

    Raises:
        one of `REFUSALS`: the class refuses the config.
    """
    import transformers

    with torch.device("meta"):
        return kind(transformers.AutoConfig.for_model(**config))


def loaded_names(model: Any, stored: Collection[str]) -> dict[str, str]:
    """Name in a file -> name in the model that transformers loads the tensor into.

    Tensors that loading splits, joins or leaves out are not in it. If this transformers cannot tell how it renames
    tensors, none is renamed.
    """
    state = model.state_dict()
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before 5.0, or moved since
        return {name: name for name in stored if name in state}
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    others = [step for step in steps if not isinstance(step, WeightRenaming)]
    names = {}
    for name in stored:
        loaded, converted = rename_source_key(name, renamings, others, model.base_model_prefix, state)
        if loaded in state and converted is None:
            names[name] = loaded
    return names
