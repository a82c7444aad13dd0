"""regraft: reuse pre-trained models. `load`, `save` and `export` are for what it compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.resize.surgery import export, load, save

__all__ = ["export", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from regraft.resize import surgery

    return getattr(surgery, name)
