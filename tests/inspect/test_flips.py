"""Prediction flips, against counts made one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from regraft.errors import UserError
from regraft.inspect.flips import classes_holding, flips, similarity, transferred

CLASSES = st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=1, max_size=60)


@given(CLASSES)
def test_flips(rows: list[tuple[int, int, int, int]]) -> None:
    s, t, y, _ = (list(column) for column in zip(*rows, strict=True))
    found = flips(s, t, y, {i: f"c{i}" for i in range(5)})
    n = len(y)
    up = [y[i] for i in range(n) if s[i] != y[i] and t[i] == y[i]]
    down = [y[i] for i in range(n) if s[i] == y[i] and t[i] != y[i]]
    assert found.n == n
    assert found.student == pytest.approx(sum(a == b for a, b in zip(s, y, strict=True)) / n)
    assert found.teacher == pytest.approx(sum(a == b for a, b in zip(t, y, strict=True)) / n)
    assert found.positive == pytest.approx(len(up) / n)
    assert found.negative == pytest.approx(len(down) / n)
    assert found.ceiling == pytest.approx(found.student + found.positive)
    assert found.teacher - found.student == pytest.approx(found.positive - found.negative)
    assert found.positive_per_class == {f"c{c}": up.count(c) for c in range(5)}
    assert found.negative_per_class == {f"c{c}": down.count(c) for c in range(5)}
    for counted, entropy in ((up, found.positive_entropy), (down, found.negative_entropy)):
        if counted:
            assert entropy == pytest.approx(float(stats.entropy([counted.count(c) for c in range(5)])), abs=1e-12)
        else:
            assert entropy is None
    assert bool(found.classes_holding) == bool(up)


@given(CLASSES)
def test_what_a_transfer_did(rows: list[tuple[int, int, int, int]]) -> None:
    before, after, teacher, y = (list(column) for column in zip(*rows, strict=True))
    found = transferred(before, after, teacher, y)
    n = len(y)
    gained = [y[i] for i in range(n) if before[i] != y[i] and after[i] == y[i]]
    lost = [y[i] for i in range(n) if before[i] == y[i] and after[i] != y[i]]
    taught = [y[i] for i in range(n) if before[i] != y[i] and teacher[i] == y[i]]
    assert (found.gain, found.loss) == (pytest.approx(len(gained) / n), pytest.approx(len(lost) / n))
    assert found.delta == pytest.approx(found.gain - found.loss)
    assert found.delta == pytest.approx(found.after - found.before)
    if taught:
        assert found.transfer_rate == pytest.approx(sum(c in taught for c in gained) / len(taught))
    else:
        assert found.transfer_rate is None


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.sampled_from([0.02, 0.05, 0.2, 0.5, 1.0]))
def test_the_fewest_classes_that_hold_a_share(counts: list[int], share: float) -> None:
    found = classes_holding(counts, share)
    ranked = sorted(counts, reverse=True)
    if not sum(counts):
        assert found == 0
        return
    assert sum(ranked[:found]) >= share * sum(counts) - 1e-9
    assert sum(ranked[: found - 1]) < share * sum(counts)


def test_similarity_of_expert_classes() -> None:
    embeddings = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [5.0, 0.0]])
    assert similarity([4, 0, 4, 0], embeddings, 1.0) == pytest.approx(math.sqrt(0.5))
    cosines = [0.0, math.sqrt(0.5), math.sqrt(0.5)]
    assert similarity([4, 3, 2, 0], embeddings, 1.0) == pytest.approx(sum(cosines) / 3)
    assert similarity([4, 0, 0, 0], embeddings, 1.0) is None


def test_predictions_of_other_examples_are_refused() -> None:
    for student, labels in (([1, 2], [1]), ([], [])):
        with pytest.raises(UserError, match="predictions and labels are of") as caught:
            flips(student, student, labels)
        assert caught.value.code == "RG601"
