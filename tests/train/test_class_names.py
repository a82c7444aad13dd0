"""Classes matched by name: the numbers that the student's classes have in the teacher, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PretrainedConfig

from regraft.errors import UserError
from regraft.train.class_names import class_names, class_order

NAMES = [f"class {i}" for i in range(12)]  # with numbers that sort otherwise as words


def config(names: list[str]) -> PretrainedConfig:
    return PretrainedConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


@given(st.permutations(NAMES), st.permutations(NAMES))
def test_the_order_leads_from_names_to_names(own: list[str], other: list[str]) -> None:
    found = class_order(config(own), config(other))
    numbers = list(range(len(own))) if found is None else found.tolist()
    assert [other[number] for number in numbers] == own
    assert (found is None) == (own == other)


def test_names_that_are_made_up_say_nothing() -> None:
    assert class_names(config(NAMES)) == NAMES
    assert class_names(PretrainedConfig(num_labels=12)) is None
    assert class_order(PretrainedConfig(num_labels=12), PretrainedConfig(num_labels=12)) is None


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        (NAMES, NAMES[:3], "tells 12 classes apart and the teacher 3"),
        (["a", "b"], ["LABEL_0", "LABEL_1"], "the teacher's classes have no names"),
        (["LABEL_0", "LABEL_1"], ["a", "b"], "the student's classes have no names"),
        (["a", "b"], ["a", "c"], "a class 'b', and the teacher has none of that name"),
        (["a", "b"], ["b", "b"], "two classes of the teacher have one name"),
    ],
)
def test_classes_that_differ(own: list[str], other: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        class_order(config(own), config(other))
    assert caught.value.code == "RG207"
