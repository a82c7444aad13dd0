"""Asking transformers what a foreign config.json means, without trusting it.

A config names a class, and counts of things that the class makes lists of or builds: a number of layers of 10^9 is a
hang, and a name such as "Trainer" is something else than a model. Both are looked at before transformers sees them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
