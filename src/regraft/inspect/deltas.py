"""What fine-tuning changed."""

from __future__ import annotations

from regraft.inspect.distance import Distance, check_base, rank_bases, relative_distance

__all__ = ["Distance", "check_base", "rank_bases", "relative_distance"]
