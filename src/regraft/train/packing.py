"""Texts of a pass joined into one row, without padding and without seeing one another.

Positions begin anew with each text, and no attention mask is given: from these two transformers' attention kernels
know where a text ends, and attend within it only. The first token of a text is no target, so that nothing is predicted
across a border. The loss of a pass is that of the padded batch; what padding would have cost is saved.

Whether a model does keep the texts of a row apart is tried before the first step, since a model that ignores positions
would mix them without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regraft.errors import UserError
from regraft.train.order import generator
from regraft.train.tap import look

TOLERANCE = 1e-4  # of the largest logit; rounding gives about 1e-6


def packed(texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One row of all texts (lists of tokens): input_ids, labels and position_ids, (1, T) each.

    The cache of keys and values is switched off, since with it positions do not tell texts apart.
    """
    from transformers import DataCollatorWithFlattening

    batch: dict[str, Any] = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": list(t)} for t in texts])
    return {**batch, "use_cache": False}


def check_cache(packing: bool, cache_teacher: bool) -> None:
    """Raise RG303 for a cache of what a teacher says of packed rows."""
    if packing and cache_teacher:
        what = "what a teacher says of rows that are packed anew in each epoch would never be found again"
        raise UserError("RG303", what, fix="set packing or cache_teacher to false")


def check_packing(model: Any, *, who: str = "the model") -> None:
    """Raise RG309 if the logits of a text depend on what stands before it in a row."""
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(size, (7,), generator=generator(0))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            rows = [packed([ids[:3].tolist(), ids[3:].tolist()]), packed([ids[3:].tolist()])]
            rows = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows]
            both, alone = (look(model, {k: v for k, v in row.items() if k != "labels"}).logits[0] for row in rows)
    finally:
        model.train(training)
    apart = float((both[3:].float() - alone.float()).abs().max())
    if not apart <= TOLERANCE * float(alone.float().abs().max()):
        what = f"{who}, a {type(model).__name__}, does not keep the texts of one row apart"
        raise UserError("RG309", what, fix="set packing to false")
