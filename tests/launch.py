"""What each process of a launched run does: train an image classifier, and leave losses and weights in a folder.

Where the data has texts, these are taken for descriptions of the images.

python -m torch.distributed.run --standalone --nproc_per_node 2 launch.py MODEL DATA FOLDER BATCH
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import regraft
from regraft.objectives.descriptions import Descriptions, with_descriptions
from regraft.objectives.own_loss import OwnLoss
from regraft.train.batches import batches_for
from regraft.train.data import open_data
from regraft.train.loop import train
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions

# Gradients near zero, which AdamW makes as large as any other, depend on how a batch is divided.
EPSILON = 1e-4


def embeddings(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A vector that depends on the text alone."""
    numbers = [sum(map(ord, text)) for text in texts]
    vectors = [torch.randn(8, generator=torch.Generator().manual_seed(number)) for number in numbers]
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1), torch.tensor(numbers)


def main(model: Path, data: Path, folder: Path, batch: int) -> None:
    torch.set_num_threads(1)
    whole = regraft.load(model)
    rows = open_data(data)
    collate = batches_for(whole, model, rows[0]).collate
    objective = Sum(collate, [(1.0, OwnLoss())])
    if "text" in rows[0]:
        aligned = with_descriptions(collate, embeddings)  # type: ignore[arg-type]
        objective = Sum(aligned, [(1.0, OwnLoss()), (0.3, Descriptions(8))])
    options = TrainOptions(
        max_steps=4,
        per_device_train_batch_size=batch,
        logging_steps=1,
        learning_rate=1e-3,
        adam_epsilon=EPSILON,
    )
    result = train(whole, objective, rows, options, folder=folder / "checkpoints", device="cpu")
    if os.environ.get("RANK", "0") == "0":
        whole.save_pretrained(folder / "model")
        (folder / "losses.json").write_text(json.dumps([h["loss"] for h in result.history]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
