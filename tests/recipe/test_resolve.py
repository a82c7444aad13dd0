"""Which value an option has for which tensor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from regraft.errors import UserError
from regraft.merge.rule import REQUIRED, PerModel, Rule
from regraft.methods import Options
from regraft.recipe.document import Condition, Input
from regraft.recipe.resolve import Resolver, interpolate


class Knobs(Options):
    weight: PerModel[float] = (1.0,)
    t: float = Field(0.5, ge=0, le=1)
    rescale: str = "density"
    seed: int = 0


RULE = Rule(
    name="probe",
    room="merge",
    summary="",
    options=Knobs,
    function=lambda unit: None,
    mergekit_defaults={"weight": REQUIRED, "rescale": "l1"},
    mergekit_values={"rescale": {True: "l1", False: "none"}},
)


def resolver(dialect: str = "regraft") -> Resolver:
    return Resolver(RULE, dialect=dialect, where="recipe.yaml, step x", seed=7)


def conditions(*pairs: tuple[object, str | None]) -> tuple[Condition, ...]:
    return tuple(Condition(value, text) for value, text in pairs)


def test_gradients_are_piecewise_linear_between_evenly_spaced_anchors() -> None:
    anchors = [0.0, 0.5, 0.3, 0.7, 1.0]
    assert [interpolate(anchors, x / 4) for x in range(5)] == anchors
    assert interpolate(anchors, 0.125) == pytest.approx(0.25)
    assert interpolate(anchors, 0.625) == pytest.approx(0.5)
    third = 2 / 3 * 2 - 1
    assert interpolate([0.5, 0.5 / 3, 0.25], 2 / 3) == (1 - third) * (0.5 / 3) + third * 0.25  # to the last bit
    assert interpolate([0.3], 0.9) == 0.3
    assert interpolate(0.2, 0.9) == 0.2
    assert interpolate([True, False], 0.9) is True
    assert interpolate(["a", "b", "c"], 0.5) == "b"


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.floats(0, 1))
def test_gradients_stay_within_their_anchors(anchors: list[float], depth: float) -> None:
    assert min(anchors) - 1e-12 <= interpolate(anchors, depth) <= max(anchors) + 1e-12


def test_the_first_filter_that_matches_counts_and_closer_levels_win() -> None:
    a = Input("a", {"weight": conditions(([0.2, 0.8], "mlp"), (0.4, None))})
    b = Input("b", {"weight": conditions((0.9, "attn"))})
    step = {"weight": conditions((0.1, None)), "t": conditions((0.3, None))}
    r = resolver()
    assert r.options("layers.0.mlp.w", 0.0, [a, b], [{}, step]).weight == (0.2, 0.1)
    assert r.options("layers.1.mlp.w", 1.0, [a, b], [{}, step]).weight == (0.8, 0.1)
    assert r.options("layers.1.attn.w", 1.0, [a, b], [{}, step]).weight == (0.4, 0.9)
    inner = {"t": conditions((0.6, None))}
    assert r.options("layers.1.attn.w", 1.0, [a, b], [inner, step]).t == 0.6
    assert r.options("layers.1.attn.w", 1.0, [a, b], [{}, step]).t == 0.3
    r.check_filters("probe")


def test_defaults_differ_between_the_dialects() -> None:
    plain = Input("a", {})
    assert resolver().options("w", 0.0, [plain], []).rescale == "density"
    given = Input("a", {"weight": conditions((1.0, None))})
    theirs = resolver("mergekit")
    assert theirs.options("w", 0.0, [given], []).rescale == "l1"
    assert theirs.options("w", 0.0, [given], [{"rescale": conditions((False, None))}]).rescale == "none"
    with pytest.raises(UserError, match=r"probe needs 'weight' for a \(recipe.yaml, step x, w\)") as error:
        theirs.options("w", 0.0, [plain], [])
    assert error.value.code == "RG303"


def test_the_seed_of_the_step_is_used_unless_the_option_is_given() -> None:
    one = Input("a", {})
    assert resolver().options("w", 0.0, [one], []).seed == 7
    assert resolver().options("w", 0.0, [one], [{"seed": conditions((3, None))}]).seed == 3


def test_a_filter_that_selects_nothing_is_an_error_with_the_nearest_name() -> None:
    r = resolver()
    r.options("h.0.attn.w", 0.0, [Input("a", {"weight": conditions((0.5, "self_attn"), (1.0, None))})], [])
    with pytest.raises(UserError, match=r"'self_attn' selects no tensor of gpt2.*did you mean 'attn'") as error:
        r.check_filters("gpt2")
    assert error.value.code == "RG308"


def test_a_value_out_of_range_names_tensor_and_option() -> None:
    with pytest.raises(UserError, match=r"t is 1\.5: .*\(recipe.yaml, step x, layers.3.w\)") as error:
        resolver().options("layers.3.w", 0.0, [Input("a", {})], [{"t": conditions((1.5, None))}])
    assert error.value.code == "RG303"
