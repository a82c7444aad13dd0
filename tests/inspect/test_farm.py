"""The farm of models: facts against the truth, parents found by their weights, and what can be combined with what."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import farm as models_farm
from regraft.checkpoint import Checkpoint, open_checkpoint
from regraft.errors import UserError
from regraft.inspect.compare import OPERATIONS, Comparison, compare
from regraft.inspect.deltas import rank_bases
from regraft.inspect.facts import Facts, look

ALL = ["linear", "slerp", "task_arithmetic", "model_stock", "layer_swap", "passthrough"]
BASES = ("llama-base", "llama-stranger", "bert-base", "gpt2", "roberta", "t5", "vit", "clip")


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> models_farm.Farm:
    return models_farm.make_farm(tmp_path_factory.mktemp("farm"))


@pytest.fixture(scope="module")
def opened(farm: models_farm.Farm) -> Any:
    @cache
    def one(name: str) -> Checkpoint:
        return open_checkpoint(str(farm[name].path))

    return one


def value_at(facts: Facts, path: str) -> Any:
    found: Any = facts
    for part in path.split("."):
        if found is None:
            return None
        found = (
            found[int(part)] if part.isdecimal() else (found[part] if isinstance(found, dict) else getattr(found, part))
        )
    if path in ("contradictions", "bases"):
        return [dataclasses.asdict(one) for one in found]
    return found


def test_facts_are_right_and_never_wrong(farm: models_farm.Farm) -> None:
    right, unknown, wrong = 0, [], []
    for name, entry in farm.items():
        facts = look(str(entry.path), stats=True, offline=True)
        for path, truth in entry.truth.items():
            found = value_at(facts, path)
            if found == truth:
                right += 1
            elif found is None:
                unknown.append(f"{name}: {path} is {truth!r}")
            else:
                wrong.append(f"{name}: {path} is {truth!r}, not {found!r}")
    assert not wrong, "\n".join(wrong)
    assert right >= 0.95 * (right + len(unknown)), "\n".join(unknown)
    assert len(farm) >= 24
    assert right > 500


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama-remote-code", "modeling_farm.py"),
        ("llama-pickle", "pickles"),
        ("lfs-stub", "git-LFS"),
        ("llama-quantised", "quantised"),
        ("bert-renamed-head", "my_output.weight"),
        ("bert-renamed-head", "start from random values"),
        ("bert-labels-swapped", "not valid YAML"),
        ("llama-without-config", "no config.json"),
        ("vit", "LABEL_0"),
    ],
)
def test_what_is_unusual_is_said(farm: models_farm.Farm, name: str, part: str) -> None:
    assert any(part in remark for remark in look(str(farm[name].path), offline=True).remarks)


def test_the_parent_is_ranked_first_for_every_child(farm: models_farm.Farm, opened: Any) -> None:
    candidates = [opened(name) for name in BASES]
    children = {name: entry.parent for name, entry in farm.items() if entry.parent}
    assert len(children) >= 15
    for name, parent in children.items():
        ranked = rank_bases(opened(name), candidates)
        assert ranked[0][0] is opened(parent), name
        assert len(ranked) == 1, name  # no stranger counts as related
    adapted = open_checkpoint(f"{farm['llama-base'].path}+{farm['llama-lora'].path}")
    assert rank_bases(adapted, candidates)[0][0] is opened("llama-base")


def test_strangers_and_bases_have_no_parent(opened: Any) -> None:
    for name in BASES:
        assert rank_bases(opened(name), [opened(other) for other in BASES if other != name]) == []


def yes(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "")


def no(code: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names or ALL, code)


NEED_BASE = ("task_arithmetic", "model_stock")
# Models, base, and per operation the code of what stands in the way ("" if nothing does).
CASES: list[tuple[str, str, dict[str, str]]] = [
    ("llama-a llama-b", "llama-base", yes(*ALL)),
    ("llama-a llama-b", "", yes(*ALL) | no("RG304", *NEED_BASE)),
    ("llama-a llama-b llama-bf16", "llama-base", yes(*ALL) | no("RG305", "slerp", "layer_swap")),
    ("llama-a llama-copy", "llama-base", yes(*ALL)),
    ("llama-a llama-bf16", "llama-base", yes(*ALL)),
    ("llama-sharded llama-pickle", "llama-base", yes(*ALL)),
    ("llama-merge llama-boasting", "llama-base", yes(*ALL)),
    ("llama-a llama-base", "llama-base", yes(*ALL) | no("RG305", *NEED_BASE)),
    ("llama-a llama-b", "llama-stranger", yes(*ALL) | no("RG205", *NEED_BASE)),
    ("llama-a llama-b", "gpt2", yes(*ALL) | no("RG203", *NEED_BASE)),
    ("llama-a llama-stranger", "llama-base", no("RG205")),
    ("llama-a llama-other-tokenizer", "llama-base", no("RG204")),
    ("llama-a llama-added-token", "llama-base", no("RG204") | yes("passthrough")),
    ("llama-a llama-wrong-vocabulary", "llama-base", no("RG207")),
    ("llama-a llama-rope", "llama-base", no("RG207")),
    ("llama-a llama-tied", "llama-base", no("RG209") | yes("passthrough")),
    ("llama-tied llama-a", "llama-base", no("RG209") | yes("passthrough")),
    ("llama-a llama-deep", "llama-base", no("RG203") | yes("passthrough")),
    ("llama-a gpt2", "llama-base", no("RG203")),
    ("bert-labels bert-labels-swapped", "", no("RG207")),
    ("bert-labels bert-renamed-head", "", no("RG202") | yes("passthrough")),
    ("bert-labels bert-base", "", no("RG202") | yes("passthrough")),
    ("t5 t5-tuned", "", yes("linear", "slerp", "layer_swap") | no("RG304", *NEED_BASE) | no("RG208", "passthrough")),
]


@pytest.fixture(scope="module")
def judged(opened: Any) -> list[tuple[str, Comparison, dict[str, str]]]:
    found = []
    for names, base, expected in CASES:
        comparison = compare([opened(n) for n in names.split()], opened(base) if base else None)
        found.append((f"{names} | {base}", comparison, expected))
    return found


def test_every_case_is_classified_and_the_cause_is_named(judged: Any) -> None:
    assert set(OPERATIONS) == set(ALL)
    wrong, other_cause, obstacles = [], [], 0
    for case, comparison, expected in judged:
        for name, code in expected.items():
            operation = comparison.operation(name)
            if operation.possible != (code == ""):
                wrong.append(f"{case}: {name}: {operation}")
            elif code:
                obstacles += 1
                if operation.code != code:
                    other_cause.append(f"{case}: {name}: {operation}, expected {code}")
                assert operation.reason
                assert operation.fix
    assert not wrong, "\n".join(wrong)
    assert obstacles > 60
    assert len(other_cause) <= 0.1 * obstacles, "\n".join(other_cause)


def test_reasons_name_the_culprit(opened: Any) -> None:
    def reason(a: str, b: str) -> str:
        return compare([opened(a), opened(b)]).operation("linear").reason

    assert "llama" in reason("llama-a", "gpt2")
    assert "gpt2" in reason("llama-a", "gpt2")
    assert "rope_parameters" in reason("llama-a", "llama-rope")
    assert "lm_head.weight" in reason("llama-a", "llama-tied")
    assert "96 tokens" in reason("llama-a", "llama-added-token")
    assert "2 layers" in reason("llama-a", "llama-deep")
    assert "id2label" in reason("bert-labels", "bert-labels-swapped")
    assert "classifier" in reason("bert-labels", "bert-renamed-head")
    assert "cosine" in reason("llama-a", "llama-stranger")


def test_identical_models_are_called_identical(opened: Any) -> None:
    same = compare([opened("llama-a"), opened("llama-copy")])
    assert same.pairs[0].identical
    assert "identical" in same.operation("linear").reason
    assert same.families == [[0, 1]]
    assert not compare([opened("llama-a"), opened("llama-b")]).pairs[0].identical


def test_families_are_those_that_share_a_start(opened: Any) -> None:
    names = ["llama-a", "llama-stranger", "llama-b", "llama-merge"]
    assert compare([opened(n) for n in names]).families == [[0, 2, 3], [1]]


def test_values_that_are_not_finite_are_an_obstacle_once_they_were_read(opened: Any) -> None:
    models = [opened("llama-a"), opened("llama-nan")]
    assert compare(models).operation("linear").possible
    found = compare(models, stats=True).operation("linear")
    assert (found.possible, found.code) == (False, "RG206")
    assert "model.layers.0.self_attn.q_proj.weight" in found.reason


def test_a_folder_without_anything_to_tell_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        look(str(tmp_path), offline=True)
    assert error.value.code == "RG102"
