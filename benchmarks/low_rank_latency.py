"""How long a pass of a model takes whose linear layers are low-rank, beside the original: one run, taking turns.

    python benchmarks/low_rank_latency.py --layers 12 --rounds 5 --out benchmarks/results/low_rank_latency.json

The blocks are those of ViT-base (224 x 224 pixels, 197 tokens) and BERT-base (128 tokens), twelve of them unless told
otherwise, with random weights, which a pass takes as long for as any. The vision transformer keeps half of all its
parameters, the encoder of text half of its linear layers, for many of its parameters are embeddings. Of each round the
share of the original's time is taken, and of these shares the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from machine import describe

from regraft.resize.cost import flops, parameters
from regraft.resize.factorise import LowRankOptions, factorise

LIMIT = 0.65  # the share of the original's time that half of the parameters may take
BATCHES = (1, 32)
WARM_UP = 1


def vit(width: int, layers: int) -> tuple[Any, Any, Callable[[int], dict[str, torch.Tensor]]]:
    """The original, a low-rank copy, and what makes a batch."""
    config = hf.ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    batch = {"pixel_values": torch.rand(max(BATCHES), 3, 224, 224)}
    return *_pair(hf.ViTModel, config, LowRankOptions(target_parameters=0.5, svd="randomized")), _first(batch)


def bert(width: int, layers: int) -> tuple[Any, Any, Callable[[int], dict[str, torch.Tensor]]]:
    config = hf.BertConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    ids = torch.randint(config.vocab_size, (max(BATCHES), 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return *_pair(hf.BertModel, config, LowRankOptions(ratio=2, svd="randomized")), _first(batch)


SHAPES = {"ViT": vit, "BERT": bert}


def _pair(kind: Any, config: Any, options: LowRankOptions) -> tuple[Any, Any]:
    original, small = kind(config).eval(), kind(config).eval()
    factorise(small, options)
    return original, small


def _first(batch: dict[str, torch.Tensor]) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda count: {name: value[:count] for name, value in batch.items()}


def measured(name: str, width: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each size of a batch."""
    torch.manual_seed(0)
    original, small, batch = SHAPES[name](width, layers)
    rows = []
    for count in BATCHES:
        inputs = batch(count)
        row: dict[str, Any] = {
            "model": f"{name}, width {width}, {layers} layers",
            "batch": count,
            "parameters": [parameters(original), parameters(small)],
            "flops": [flops(original, inputs), flops(small, inputs)],
            "wall": [[], []],
            "cpu": [[], []],
        }
        for turn in range(WARM_UP + rounds):
            for i, model in enumerate((original, small)):
                begun = time.perf_counter(), time.process_time()
                with torch.inference_mode():
                    model(**inputs)
                spent = time.perf_counter() - begun[0], time.process_time() - begun[1]
                if turn >= WARM_UP:
                    row["wall"][i].append(spent[0])
                    row["cpu"][i].append(spent[1])
        for kind in ("wall", "cpu"):
            row[f"{kind}_share"] = statistics.median(b / a for a, b in zip(*row[kind], strict=True))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = os.getloadavg()[0]
    rows = [row for name in SHAPES for row in measured(name, options.width, options.layers, options.rounds)]
    for row in rows:
        print(
            f"{row['model']}, batch of {row['batch']}: {row['wall_share']:.2f} of the time, {row['cpu_share']:.2f} of "
            f"the processor's, {row['parameters'][1] / row['parameters'][0]:.2f} of the parameters, "
            f"{row['flops'][1] / row['flops'][0]:.2f} of the operations"
        )
    if options.out is not None:
        sizes = f"--width {options.width} --layers {options.layers} --threads {options.threads}"
        command = f"python benchmarks/low_rank_latency.py {sizes} --rounds {options.rounds}"
        results = {
            "benchmark": "low_rank_latency",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": describe(Path.cwd(), None),
            "load": [round(before, 2), round(os.getloadavg()[0], 2)],
            "settings": {"rounds": options.rounds, "threads": options.threads, "limit": LIMIT, "command": command},
            "rows": rows,
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
