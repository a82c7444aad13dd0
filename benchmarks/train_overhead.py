"""What the training loop costs beside the computation: regraft's loop and a hand-written one, on one model and data.

    python benchmarks/train_overhead.py --steps 40 --rounds 5 --out benchmarks/results/train_overhead.json

Both run AdamW with clipping, a cosine schedule and the same masked language model on the same batches, and take turns.
What is compared is the processor's time, which a busy machine does not change much, and the time on the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from machine import describe

from regraft.objectives.own_loss import OwnLoss
from regraft.train.loop import train
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions

TOKENS, BATCH, VOCABULARY = 64, 16, 2000


def build(width: int, layers: int) -> Any:
    torch.manual_seed(0)
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // 32,
        )
    )  # fmt: skip


def batch_of(examples: Any, seeds: Any = None) -> dict[str, Any]:
    ids = torch.stack(list(examples))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def with_regraft(model: Any, data: Any, steps: int, folder: Path) -> None:
    options = TrainOptions(max_steps=steps, per_device_train_batch_size=BATCH, shuffle=False, save_steps=0)
    train(model, Sum(batch_of, [(1.0, OwnLoss())]), data, options, folder=folder, device="cpu")


def by_hand(model: Any, data: Any, steps: int) -> None:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    for step in range(steps):
        first = step * BATCH % len(data)
        loss = model(**batch_of(data[first : first + BATCH])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    generator = torch.Generator().manual_seed(0)
    data = list(torch.randint(VOCABULARY, (4 * BATCH, TOKENS), generator=generator))
    ratios: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        with_regraft(build(64, 1), data, 2, Path(folder) / "first")  # imports are no part of it
        for turn in range(options.rounds):
            spent = []
            for own in (True, False):
                model = build(options.width, options.layers)
                begun = time.process_time(), time.perf_counter()
                if own:
                    with_regraft(model, data, options.steps, Path(folder) / str(turn))
                else:
                    by_hand(model, data, options.steps)
                spent.append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
            ratios.append((spent[0][0] / spent[1][0], spent[0][1] / spent[1][1]))
    processor, clock = (statistics.median(part) for part in zip(*ratios, strict=True))
    print(json.dumps({"processor_time_ratio": processor, "clock_ratio": clock, "steps": options.steps}))
    if options.out is not None:
        row = {
            "model": f"BERT, width {options.width}, {options.layers} layers, batches of {BATCH} x {TOKENS} tokens",
            "steps": options.steps,
            "processor": [ratio[0] for ratio in ratios],
            "clock": [ratio[1] for ratio in ratios],
        }
        command = f"python benchmarks/train_overhead.py --steps {options.steps} --rounds {options.rounds}"
        results = {
            "benchmark": "train_overhead",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": describe(Path.cwd(), None),
            "load": [round(load, 2), round(os.getloadavg()[0], 2)],
            "settings": {"rounds": options.rounds, "threads": 1, "command": command},
            "rows": [row],
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
