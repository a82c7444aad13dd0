"""The model card: the Hub's metadata, facts only, no path of this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import transformers as hf
import yaml
from huggingface_hub import ModelCard

import models
from regraft.checkpoint.card import _AUTO, _auto_class, write_card
from regraft.checkpoint.lineage import InputRecord, Lineage, Output, Score
from regraft.checkpoint.model import Checkpoint, open_checkpoint
from regraft.checkpoint.private_paths import PrivatePaths
from regraft.errors import UserError
from regraft.methods import Method, Options, Paper

METHOD = Method(
    name="capped",
    room="merge",
    summary="move along the difference, capped",
    options=Options,
    papers=(Paper("A Title", "A. Author, B. Author", "Venue 2023", arxiv="2306.01708"),),
)


@pytest.fixture
def parents(tmp_path: Path) -> list[Checkpoint]:
    cards = {
        "base": "license: apache-2.0\nlanguage: [en, no]\npipeline_tag: text-generation\ndatasets: org/web",
        "maths": "license: apache-2.0\nlanguage: de\npipeline_tag: text-generation",
    }
    opened = []
    for name, text in cards.items():
        folder = models.save_model(tmp_path / name, "llama")
        (folder / "README.md").write_text(f"---\n{text}\n---\n# {name}\n")
        opened.append(open_checkpoint(str(folder)))
    opened[0] = dataclasses.replace(opened[0], repo_id="org/base", revision="0123456789abcdef", ref="org/base")
    return opened


def lineage_of(parents: list[Checkpoint]) -> Lineage:
    roles = ["base", *["model"] * (len(parents) - 1)]
    lineage = Lineage(
        method="capped",
        inputs=[InputRecord.of(p, f"m{i}", role=roles[i], digest="f" * 64) for i, p in enumerate(parents)],
        output=Output(tensors=21, parameters=12345, bytes=49380, dtype="float32"),
        seeds={"merged": 7},
        warnings=["two tokenizers differ"],
        diagnostics={"sign_conflict_rate": 0.25, "per_tensor": {"x": 1}},
    )
    lineage.finish()
    return lineage


def card_of(
    tmp_path: Path, parents: list[Checkpoint], recipe: str = "merge: capped\n", **settings: object
) -> ModelCard:
    staging = tmp_path / ".mixed.regraft-partial"
    staging.mkdir(exist_ok=True)
    path = write_card(staging, lineage_of(parents), parents, recipe=recipe, registered=METHOD, **settings)  # type: ignore[arg-type]
    return ModelCard.load(path)


def test_the_hub_reads_the_metadata(tmp_path: Path, parents: list[Checkpoint]) -> None:
    data = card_of(tmp_path, parents).data.to_dict()
    assert data == {
        "base_model": ["org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "regraft", "capped"],
        "license": "apache-2.0",
        "language": ["de", "en", "no"],
        "datasets": ["org/web"],
        "pipeline_tag": "text-generation",
    }


def test_the_text_states_the_facts(tmp_path: Path, parents: list[Checkpoint]) -> None:
    text = card_of(tmp_path, parents, recipe="merge: capped\nmodels: [org/base, ./maths]\n").text
    for fact in (
        "# mixed",
        "A merge of 1 model and a base by `capped`: move along the difference, capped.",
        "12,345 parameters in 21 tensors, 49,380 bytes, float32.",
        'A. Author, B. Author, "A Title", Venue 2023, arXiv:2306.01708. <https://arxiv.org/abs/2306.01708>',
        "| m0 | base | org/base | `0123456789ab` | `ffffffffffffffff` | apache-2.0 |",
        "| m1 | model | maths | local | `ffffffffffffffff` | apache-2.0 |",
        "```yaml\nmerge: capped\nmodels: [org/base, ./maths]\n```",
        "AutoModelForCausalLM.from_pretrained(",
        "| sign conflict rate | 0.25 |",
        "- two tokenizers differ",
        "Not stated: evaluation of the result, intended use.",
        "seeds merged 7",
    ):
        assert fact in text


def test_no_path_of_the_machine(tmp_path: Path, parents: list[Checkpoint]) -> None:
    model = parents[1]
    spaced = dataclasses.replace(model, ref="/home/me/my models/code", adapters=("/home/me/lora",))
    recipe = (
        f"models: {{a: {model.ref}, b: '/home/me/my models/code', c: ~/x/y, d: /a/base+/b/lora}}\nout: C:\\me\\out\n"
    )
    staging = tmp_path / "out"
    staging.mkdir()
    everyone = [*parents, spaced]
    lineage = lineage_of(everyone)
    lineage.warnings.append(f"{model.path}/tokenizer.json differs")
    text = write_card(staging, lineage, everyone, recipe=recipe, registered=METHOD).read_text()
    assert "models: {a: maths, b: 'code', c: y, d: base+lora}\nout: out" in text
    for forbidden in ("/home", str(tmp_path), "~/", "C:\\", "my models"):
        assert forbidden not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://arxiv.org/abs/1 and org/model", "see https://arxiv.org/abs/1 and org/model"),
        ("a ratio of 1/2, and ./rel/path or ../up/there", "a ratio of 1/2, and ./rel/path or ../up/there"),
        ("file:///home/me/x", "x"),
        ("path:/home/me/x.yaml, next", "path:x.yaml, next"),
        ("(/home/me/x/)", "(x)"),
        ("~/x", "x"),
        ("D:/models/x", "x"),
    ],
)
def test_paths_are_told_from_what_looks_like_them(text: str, expected: str) -> None:
    assert PrivatePaths()(text) == expected


def test_what_is_unknown_is_listed_as_such(tmp_path: Path, parents: list[Checkpoint]) -> None:
    (parents[1].path / "README.md").unlink()
    bare = open_checkpoint(str(parents[1].path))
    card = card_of(tmp_path, [bare, bare])
    assert set(card.data.to_dict()) == {"base_model_relation", "library_name", "tags"}
    assert "- Licence: not stated." in card.text
    assert "- Unknown: maths: it has no card." in card.text
    missing = "licence, languages, training data of the parents, task, evaluation of the result, Hub ids of the parents"
    assert f"Not stated: {missing}, intended use." in card.text


def test_conflicts_are_in_the_card(tmp_path: Path, parents: list[Checkpoint]) -> None:
    card = "---\nlicense: other\nlicense_name: acme\nlicense_link: https://example.org/acme\n---\n"
    (parents[1].path / "README.md").write_text(card)
    found = card_of(tmp_path, parents)
    assert found.data.license == "other"
    assert found.data.to_dict()["license_name"] == "acme"
    assert found.data.to_dict()["license_link"] == "https://example.org/acme"
    assert "- Conflict: the terms of acme (maths) are not known here" in found.text


def test_measured_values_become_a_model_index(tmp_path: Path, parents: list[Checkpoint]) -> None:
    scores = [
        Score(metric="accuracy", data="/home/me/test.parquet", before={"base": 0.5, "maths": 0.625}, after=0.75),
        Score(metric="perplexity", data="corpus.txt", before={"base": 9.0}, after=8.0, higher_is_better=False),
    ]
    card = card_of(tmp_path, parents, before_after=scores)
    assert card.data.model_name == "mixed"
    results = [(r.task_type, r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert results == [
        ("text-generation", "test.parquet", "accuracy", 0.75),
        ("text-generation", "corpus.txt", "perplexity", 8.0),
    ]
    assert "| test.parquet | accuracy (higher is better) | 0.5 | 0.625 | **0.75** |" in card.text
    assert "| corpus.txt | perplexity (lower is better) | 9 |  | **8** |" in card.text


def test_a_sentence_encoder_says_how_to_load_it(tmp_path: Path, parents: list[Checkpoint]) -> None:
    (tmp_path / ".mixed.regraft-partial").mkdir()
    (tmp_path / ".mixed.regraft-partial" / "modules.json").write_text("[]")
    card = card_of(tmp_path, parents)
    assert card.data.library_name == "sentence-transformers"
    assert "SentenceTransformer(" in card.text


def test_a_recipe_cannot_break_out_of_its_block(tmp_path: Path, parents: list[Checkpoint]) -> None:
    text = card_of(tmp_path, parents, recipe="a: 1\n# ```\n# ````\n").text
    assert "`````yaml\na: 1\n# ```\n# ````\n`````" in text


def test_front_matter_is_plain_yaml(tmp_path: Path, parents: list[Checkpoint]) -> None:
    card_of(tmp_path, parents)
    text = (tmp_path / ".mixed.regraft-partial" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["language"] == ["de", "en", "no"]


def test_an_unknown_method(tmp_path: Path, parents: list[Checkpoint]) -> None:
    lineage = lineage_of(parents)
    lineage.method = "nonsense"
    with pytest.raises(UserError) as caught:
        write_card(tmp_path, lineage, parents, recipe="")
    assert caught.value.code == "RG301"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_class_that_the_card_names_loads_the_model(tmp_path: Path, family: str) -> None:
    folder = models.save_model(tmp_path / family, family)
    opened = open_checkpoint(str(folder))
    name = _auto_class(opened.architectures[0], opened.model_type)
    loaded = getattr(hf, name).from_pretrained(folder)
    assert type(loaded) is models.CLASSES[family]


def test_the_class_of_an_unknown_architecture() -> None:
    assert _auto_class("", "") == "AutoModel"
    assert _auto_class("AcmeForWonders", "acme") == "AutoModel"
    assert _auto_class("GPT2LMHeadModel", "../gpt2") == "AutoModel"
    assert _auto_class("GPT2LMHeadModel(", "gpt2") == "AutoModel"


def test_the_auto_classes_that_cards_name_are_those_of_transformers() -> None:
    ours = {f"AutoModelFor{name}" for name in _AUTO}
    theirs = {name for name in dir(hf) if name.startswith("AutoModelFor")}
    assert len(ours - theirs) < 3  # an earlier transformers lacks the newest
    assert len(theirs - ours) < 10  # a later one may have more
