"""YAML with lines: what a recipe may hold, and where the message points when it holds something else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from regraft.errors import UserError
from regraft.recipe.yaml_file import MAX_BYTES, parse_yaml, read_text, scalar


def refused(text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "r.yaml")
    return caught.value


def test_every_key_knows_its_line() -> None:
    root = parse_yaml("# a comment\nsteps:\n  one:\n    merge:\n      ties\n  two: {models: [a,\n b]}\n")
    steps = root.value["steps"]
    assert (root.line, steps.line, steps.value["one"].line) == (2, 2, 3)
    assert steps.value["one"].value["merge"].line == 4
    assert [n.line for n in steps.value["two"].value["models"].value] == [6, 7]
    assert root.plain() == {"steps": {"one": {"merge": "ties"}, "two": {"models": ["a", "b"]}}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("-3", -3),
        ("0x1F", 31),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("e5", "e5"),
        ("-.inf", -math.inf),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_not_a_number_and_numbers_too_long_to_be_meant() -> None:
    assert math.isnan(scalar(".nan"))
    assert scalar("9" * 5000) == "9" * 5000


def test_quoted_scalars_are_texts() -> None:
    assert parse_yaml("a: '1'\nb: \"true\"\nc: |\n  x\n").plain() == {"a": "1", "b": "true", "c": "x\n"}


texts = st.text(st.characters(min_codepoint=32, max_codepoint=126))
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex("[a-z]{1,4}", fullmatch=True), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.from_regex("k[a-z]{0,3}", fullmatch=True), json_like, min_size=1, max_size=3))
def test_what_pyyaml_writes_is_read_back(data: dict[str, Any]) -> None:
    assert parse_yaml(yaml.safe_dump(data)).plain() == data


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a: 1\na: 2\n", "line 2, column 1", "'a' is there twice (first in line 1)"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4", "tag"),
        ("a: !include x\n", "line 1, column 4", "tag"),
        ("a: [1, 2\nb: 3\n", "line 2", ""),
        ("a:\n\t- 1\n", "line 2, column 1", "cannot start any token"),
        ("a: {b: *nothing}\n", "line 1, column 8", "*nothing"),
        ("a: &a [*a]\n", "line 1, column 8", "itself"),
        ("? [a, b]\n: 1\n", "line 1, column 3", "plain text"),
        ("<<: 3\n", "line 1, column 1", "<<"),
        ("a: \x07\n", "line 1, column 4", "not allowed"),
        ("- a\n- b\n", "line 1, column 1", "not a mapping"),
        ("just a text\n", "line 1, column 1", "not a mapping"),
        ("", "line 1", "empty"),
        ("# nothing\n", "line 1", "empty"),
        ("a: " + "[" * 60 + "]" * 60 + "\n", "line 1", "levels deep"),
    ],
)
def test_refusals_name_line_and_column(text: str, place: str, reason: str) -> None:
    error = refused(text)
    assert error.code == "RG306"
    assert f"r.yaml, {place}" in error.where
    assert reason in error.what


def test_several_documents_are_no_single_one() -> None:
    error = refused("merge_method: ties\n---\nmerge_method: linear\n")
    assert error.code == "RG309"
    assert "line 3" in error.what


def test_aliases_work_and_bombs_do_not() -> None:
    assert parse_yaml("a: &x {w: 1}\nb: *x\nc: {<<: *x, v: 2}\nd: {<<: *x, w: 3}\n").plain() == {
        "a": {"w": 1},
        "b": {"w": 1},
        "c": {"w": 1, "v": 2},
        "d": {"w": 3},
    }
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 10):
        bomb += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
    assert "aliases written out" in refused(bomb).what
    chain = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))
    assert "levels deep" in refused(chain).what


def test_an_alias_has_the_line_where_it_is_used() -> None:
    root = parse_yaml("a: &x {w: 1}\n\nb: *x\nc: [*x]\n")
    assert (root.value["b"].line, root.value["c"].value[0].line) == (3, 4)


def test_large_files_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    file.write_text("a: " + "x" * MAX_BYTES, encoding="utf-8")
    with pytest.raises(UserError, match="more than 1,000,000 bytes") as caught:
        read_text(file)
    assert caught.value.code == "RG306"
    assert refused("a: " + "x" * MAX_BYTES).code == "RG306"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(UserError, match=r"0xff is not UTF-8 \(r.yaml, line 2, column 4\)"):
        read_text(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert parse_yaml(read_text(file)).plain() == {"a": 1}
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(UserError) as caught:
            read_text(path)
        assert caught.value.code == "RG306"
