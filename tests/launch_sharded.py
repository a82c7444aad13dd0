"""What each process of a launched run does: train a low-rank image classifier next to its original, weights divided.

python -m torch.distributed.run --standalone --nproc_per_node 2 launch_sharded.py MODEL DATA FOLDER BATCH [KILL]

Alone, the same with whole weights. KILL is a step behind which the run dies.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

import regraft
from regraft.objectives.features import Features
from regraft.objectives.minilm import MiniLM
from regraft.objectives.own_loss import OwnLoss
from regraft.resize.factorise import LowRankOptions, factorise
from regraft.resize.surgery import save
from regraft.train.batches import batches_for
from regraft.train.data import open_data
from regraft.train.loop import train
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions
from regraft.train.teacher import Teacher


def main(model: Path, data: Path, folder: Path, batch: int, kill: int = 0) -> None:
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    whole = regraft.load(model)
    factorise(whole, LowRankOptions(ratio=2))
    rows = open_data(data)
    terms = [(0.1, OwnLoss()), (1.0, Features()), (1.0, MiniLM())]
    objective = Sum(batches_for(whole, model, rows[0]).collate, terms, Teacher(regraft.load(model)))
    options = TrainOptions(
        max_steps=4, per_device_train_batch_size=batch, logging_steps=1, learning_rate=1e-3, save_steps=2, ema=0.3,
        fsdp=processes > 1,
    )  # fmt: skip

    def tell(step: int, steps: int, figures: Mapping[str, float]) -> None:
        if step == kill:
            os._exit(7)

    result = train(whole, objective, rows, options, folder=folder / "checkpoints", device="cpu", tell=tell)
    if os.environ.get("RANK", "0") == "0":
        save(whole, folder / "model")
        facts = {"resumed": result.resumed_from, "history": result.history}
        (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int((*sys.argv, 0)[5]))
