"""A base and a fine-tune on disk, and the way there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from models import save_fine_tune, save_model
from regraft.checkpoint import open_checkpoint
from regraft.deltas.apply import apply, open_delta
from regraft.deltas.extract import extract


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, its fine-tune `tuned`, and `stranger`."""
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder / "base", "llama")
    save_fine_tune(folder / "tuned", folder / "base", 1)
    save_model(folder / "stranger", "llama", seed=7)
    return folder


@pytest.fixture
def there_and_back(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`there_and_back(base, tuned, kind, density=..., scale=...)`: the tensors of base plus delta."""

    def go(base: Path, tuned: Path, kind: Any = "dense", scale: float = 1.0, **options: Any) -> dict[str, Any]:
        origin = open_checkpoint(str(base))
        extract(open_checkpoint(str(tuned)), origin, tmp_path / "delta", kind, **options)
        apply(open_delta(tmp_path / "delta"), origin, tmp_path / "back", scale=scale)
        return load_file(tmp_path / "back" / "model.safetensors")

    return go
