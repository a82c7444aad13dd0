"""The cards of a delta and of a model that was made with one: Hub metadata, and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from regraft.checkpoint import Checkpoint
from regraft.checkpoint.delta_record import Delta
from regraft.checkpoint.licences import on_hub, short_name

_WHAT = {
    "dense": "all differences; added to the base they give the fine-tune back",
    "sparse": "the largest differences of each tensor",
    "bits": "the signs of the differences and one scale per matrix (BitDelta, <https://arxiv.org/abs/2402.10193>)",
}


def write_delta_card(folder: Path, delta: Delta, *, name: str) -> None:
    """Write README.md of a delta."""
    base = delta.base.repo_id or f"path/to/{delta.base.name}"
    share = f", {delta.density:.3g} of the entries" if delta.density is not None else ""
    text = f"""# {name}

What fine-tuning changed in `{delta.base.name}` to make `{delta.model.name}`, as a `{delta.kind}` delta:
{_WHAT[delta.kind]}{share}.

| | |
|---|---|
{_row("base", _parent(delta.base.name, delta.base.digest))}
{_row("fine-tune", _parent(delta.model.name, delta.model.digest))}
{_row("relative error of the changes", f"{delta.relative_error:.4g}")}
{_row("entries that come back bit for bit", f"{delta.exact:.4%}")}

## Use

```sh
regraft delta apply path/to/this/folder out/ --base {base}
```

In recipes, `{base}+path/to/this/folder` is a model like any other.

`delta.json` holds the digests, and the errors of every tensor. Made with regraft {delta.regraft}.
"""
    _write(folder, _metadata(delta, delta.base.repo_id, "adapter", ["delta", delta.kind, "regraft"]), text)


def write_model_card(
    folder: Path, delta: Delta, base: Checkpoint, scale: float, remarks: list[str], *, name: str
) -> None:
    """Write README.md of a base with a delta added to it."""
    notes = "".join(f"\nNote: {remark}.\n" for remark in remarks)
    text = f"""# {name}

`{short_name(base)}` with {scale:g} times what fine-tuning changed in `{delta.base.name}` to make `{delta.model.name}`,
from a `{delta.kind}` delta whose changes have the relative error {delta.relative_error:.4g}.

Limits and biases of the models that it was made from may remain. Made with regraft {delta.regraft}.
{notes}"""
    data = _metadata(delta, base.repo_id, "finetune", ["regraft", "delta"])
    _write(folder, data | {"library_name": "transformers"}, text)


def _metadata(delta: Delta, base: str, relation: str, tags: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = {"base_model": [base]} if base else {}
    data |= {"base_model_relation": relation, "tags": tags}
    if delta.licence and on_hub(delta.licence):
        data["license"] = delta.licence
    elif delta.licence:
        data |= {"license": "other", "license_name": delta.licence}
    return data


def _write(folder: Path, data: dict[str, Any], text: str) -> None:
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=False)
    (folder / "README.md").write_text(f"---\n{head}---\n\n{text}", encoding="utf-8", errors="replace")


def _row(title: str, value: str) -> str:
    return f"| {title} | {value} |"


def _parent(name: str, digest: str) -> str:
    return f"`{name}`, digest `{digest[:16]}`"
