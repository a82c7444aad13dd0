"""Several models side by side."""

from __future__ import annotations

from regraft.inspect.config_keys import Difference, config_differences

__all__ = ["Difference", "config_differences"]
