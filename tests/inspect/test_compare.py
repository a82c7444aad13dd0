"""Which differences between configurations matter, and the table of several models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import models
from regraft.checkpoint import open_checkpoint
from regraft.errors import UserError
from regraft.inspect.compare import compare, config_differences
from regraft.inspect.facts import facts

LLAMA: dict[str, Any] = json.loads(models.config("llama").to_json_string(use_diff=False)) | {
    "architectures": ["LlamaForCausalLM"]
}


def changed(**changes: Any) -> dict[str, bool]:
    """Keys that differ from LLAMA after the changes -> whether they matter."""
    return {d.key: d.matters for d in config_differences(LLAMA, LLAMA | changes)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("rope_parameters", {"rope_theta": 500000.0, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}),
        ("attention_bias", True),
        ("vocab_size", 97),
        ("hidden_size", 64),
        ("head_dim", 16),
    ],
)
def test_what_changes_the_computation_matters(key: str, value: Any) -> None:
    assert changed(**{key: value}) == {key: True}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_name_or_path", "elsewhere"),
        ("transformers_version", "4.1.0"),
        ("dtype", "bfloat16"),
        ("torch_dtype", "float16"),
        ("use_cache", False),
        ("attention_dropout", 0.3),
        ("initializer_range", 0.5),
        ("pad_token_id", 3),
        ("eos_token_id", [1, 2]),
        ("tie_word_embeddings", True),
        ("max_position_embeddings", 4096),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("id2label", {"0": "a", "1": "b"}),
        ("a_note_that_no_class_reads", 7),
    ],
)
def test_what_does_not_change_the_computation_is_listed_and_does_not_matter(key: str, value: Any) -> None:
    assert changed(**{key: value}) == {key: False}


def test_spelling_of_an_older_version_is_no_difference_that_matters() -> None:
    old = {k: v for k, v in LLAMA.items() if k not in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias")}
    found = config_differences(LLAMA, old | {"rope_theta": 10000.0, "rope_scaling": None})
    assert found
    assert not any(d.matters for d in found)
    moved = config_differences(LLAMA, old | {"rope_theta": 500000.0})
    assert [d.key for d in moved if d.matters] == ["rope_parameters"]
    assert moved[0].b["rope_theta"] == 500000.0


def test_positions_matter_where_they_are_in_the_formula() -> None:
    dynamic = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}}
    found = config_differences(LLAMA | dynamic, LLAMA | dynamic | {"max_position_embeddings": 128})
    assert {d.key: d.matters for d in found} == {"max_position_embeddings": True}
    bert = {"model_type": "bert", "max_position_embeddings": 64}
    assert config_differences(bert, bert | {"max_position_embeddings": 128})[0].matters


def test_label_maps_matter_for_classifiers_and_their_order_counts() -> None:
    bert = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    other = bert | {"id2label": {"0": "b", "1": "a"}}
    assert [(d.key, d.matters) for d in config_differences(bert, other)] == [("id2label", True)]
    assert config_differences(bert, bert | {"id2label": {0: "a", 1: "b"}}) == []
    headless = other | {"architectures": ["BertModel"]}
    assert not any(d.matters for d in config_differences(bert, headless))
    unknown = config_differences({"id2label": {"0": "a"}}, {"id2label": {"0": "b"}})
    assert unknown[0].matters


def test_nested_configurations_have_dotted_keys() -> None:
    clip = json.loads(models.config("clip").to_json_string(use_diff=False))
    text = clip | {"text_config": clip["text_config"] | {"hidden_act": "relu", "dropout": 0.5}}
    assert {d.key: d.matters for d in config_differences(clip, text)} == {
        "text_config.hidden_act": True,
        "text_config.dropout": False,
    }


def test_unknown_types_keep_every_unknown_key_as_one_that_matters() -> None:
    a = {"model_type": "of-the-future", "warp": 1, "note": None}
    assert {d.key: d.matters for d in config_differences(a, a | {"warp": 2})} == {"warp": True}
    assert config_differences(a, {"model_type": "of-the-future", "warp": 1.0}) == []
    broken = LLAMA | {"hidden_size": "many"}
    assert {d.key: d.matters for d in config_differences(LLAMA, broken)} == {"hidden_size": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compare")
    base = models.save_model(root / "base", "gpt2", bos_token_id=1, eos_token_id=2)
    return {
        "base": base,
        "tuned": models.save_fine_tune(root / "tuned", base, 1),
        "bert": models.save_model(root / "bert", "bert"),
    }


def test_the_table_shows_what_is_equal(folders: dict[str, Path]) -> None:
    opened = [open_checkpoint(str(folders[n])) for n in ("base", "tuned", "bert")]
    found = compare(opened)
    rows = {row.key: row for row in found.rows}
    assert rows["type"].values == ("gpt2", "gpt2", "bert")
    assert not rows["type"].equal
    assert rows["layers"].values == (2, 2, 2)
    assert rows["layers"].equal
    assert [(p.a, p.b) for p in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert found.families == [[0, 1], [2]]
    assert found.pairs[0].only_a == found.pairs[0].only_b == []
    assert "wte.weight" in " ".join(found.pairs[1].only_a)
    assert found.pairs[0].tokenizers == "none"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["pairs"][0]["distance"]["sentence"]


def test_facts_that_are_known_are_used(folders: dict[str, Path]) -> None:
    opened = [open_checkpoint(str(folders[n])) for n in ("base", "tuned")]
    known = [facts(one, stats=True) for one in opened]
    found = compare(opened, known=known)
    assert found.facts[0] is known[0]
    assert found.operation("linear").possible


def test_a_single_model_cannot_be_compared(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError) as error:
        compare([open_checkpoint(str(folders["base"]))])
    assert error.value.code == "RG305"
