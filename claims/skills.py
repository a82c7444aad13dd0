"""Merging experts of vision skills, tuned on validation images and scored on test images: what claims share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from claims import vision
from claims.shared import State, best

Merge = Callable[..., State]


class Experts:
    """A base and its fine-tunes in memory."""

    def __init__(
        self, seed: int, scale: str, skills: Sequence[str], *, width: int = 0, optimizer: str = "adamw"
    ) -> None:
        base = vision.digits_vit(seed=seed, scale=scale, width=width)
        how = {"seed": seed, "scale": scale, "width": width, "optimizer": optimizer}
        paths = [vision.digits_skill(skill=skill, **how) for skill in skills]
        self.skills = list(skills)
        self.base = vision.state_of(base)
        self.states = [vision.state_of(path) for path in paths]
        self._model = vision.load(base)
        self._data = {
            part: {skill: vision.SKILLS[skill](split.images) for skill in skills}
            for part, split in vision.splits(seed, scale).items()
            if part != "train"
        }
        self._labels = {part: split.labels for part, split in vision.splits(seed, scale).items()}

    def score(self, state: State, part: str, n: int | None = None) -> float:
        """Mean accuracy over the first `n` skills."""
        skills = self.skills[:n]
        return sum(self.on(state, part, skill) for skill in skills) / len(skills)

    def on(self, state: State, part: str, skill: str) -> float:
        """Accuracy on one skill."""
        self._model.load_state_dict(state)
        return vision.accuracy(self._model, self._data[part][skill], self._labels[part])

    def own(self, states: Sequence[State], part: str) -> float:
        """Mean accuracy of each model on the skill of its place."""
        scores = [self.on(state, part, skill) for state, skill in zip(states, self.skills, strict=False)]
        return sum(scores) / len(scores)

    def tuned(self, merge: Merge, tries: Sequence[dict[str, Any]], n: int) -> tuple[float, dict[str, Any]]:
        """Test score of the first `n` experts merged with the options that are best on validation images."""

        def merged(**options: Any) -> State:
            return merge(self.states[:n], base=self.base, **options)

        options, _ = best(tries, lambda **o: self.score(merged(**o), "validation", n))
        return self.score(merged(**options), "test", n), options


def all_floats(state: State) -> list[str]:
    return [name for name, value in state.items() if value.is_floating_point()]


def with_signs(states: Sequence[State], base: State, signs: State, density: float, scale: float) -> State:
    """TIES with given signs instead of elected ones: trim over the whole model, then the mean of what agrees."""
    names = all_floats(base)
    vectors = torch.stack([torch.cat([(s[n] - base[n]).flatten() for n in names]) for s in states])
    kept = round(density * vectors.shape[1])
    limits = vectors.abs().topk(kept, dim=1).values[:, -1:]
    trimmed = torch.where(vectors.abs() >= limits, vectors, torch.zeros_like(vectors))
    sign = torch.cat([signs[n].flatten() for n in names])
    agree = (trimmed != 0) & (trimmed.sign() == sign)
    mean = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    merged, start = dict(base), 0
    for name in names:
        merged[name] = base[name] + scale * mean[start : start + base[name].numel()].view_as(base[name])
        start += base[name].numel()
    return merged
