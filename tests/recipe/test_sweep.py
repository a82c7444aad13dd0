"""Sweeps: one step, several models, each with a name of its own."""

from __future__ import annotations

import pytest

from regraft.errors import UserError
from regraft.recipe import EvaluateStep, MergeStep, Recipe, parse_recipe

HEAD = "models: {base: org/base, a: org/a, b: org/b}\nsteps:\n"


def parse(*steps: str) -> Recipe:
    return parse_recipe(HEAD + "".join(f"  {s}\n" for s in steps))


def refused(*steps: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse(*steps)
    return caught.value


def merges(recipe: Recipe) -> list[MergeStep]:
    return [s for s in recipe.steps if isinstance(s, MergeStep)]


MERGED = "merged: {merge: sce, base: base, models: [a, b], select_topk: 0.3, sweep: {select_topk: [0.1, 2e-1]}}"


def test_one_model_per_value_replacing_the_step_s_own() -> None:
    members = merges(parse(MERGED))
    assert [s.name for s in members] == ["merged@select_topk=0.1", "merged@select_topk=2e-1"]
    assert [s.settings["select_topk"][0].value for s in members] == [0.1, 0.2]
    assert [s.sweep for s in members] == [{"select_topk": 0.1}, {"select_topk": 0.2}]


def test_several_options_give_all_combinations_in_order() -> None:
    step = "m: {merge: linear, models: [a, b], sweep: {weight: [1, [0, 1]], normalize: [true, false], seed: [4]}}"
    members = merges(parse(step))
    assert [s.name for s in members] == [
        "m@weight=1,normalize=true,seed=4",
        "m@weight=1,normalize=false,seed=4",
        "m@weight=0_1,normalize=true,seed=4",
        "m@weight=0_1,normalize=false,seed=4",
    ]
    assert {s.seed for s in members} == {4}
    assert members[2].settings["weight"][0].value == [0, 1]
    assert members[3].sweep == {"weight": [0, 1], "normalize": False, "seed": 4}


def test_conditions_can_be_swept() -> None:
    (member,) = merges(parse("m: {merge: linear, models: [a, b], sweep: {weight: [{filter: mlp, value: 2}]}}"))
    assert member.name == "m@weight=mlp_2"
    assert (member.settings["weight"][0].filter, member.settings["weight"][0].value) == ("mlp", 2)


def test_later_steps_name_one_member_and_measurements_may_name_all() -> None:
    recipe = parse(
        MERGED,
        "next: {merge: linear, models: [a, merged@select_topk=0.1]}",
        "score: {evaluate: accuracy, models: [base, merged, next], data: d}",
        "one: {evaluate: accuracy, models: merged@select_topk=2e-1, data: d}",
    )
    assert merges(recipe)[-1].inputs[1].model == "merged@select_topk=0.1"
    scores = [s.models for s in recipe.steps if isinstance(s, EvaluateStep)]
    assert scores[0] == ("base", "merged@select_topk=0.1", "merged@select_topk=2e-1", "next")
    assert scores[1] == ("merged@select_topk=2e-1",)


def test_a_merge_of_a_whole_sweep_is_ambiguous() -> None:
    error = refused(MERGED, "next: {merge: linear, models: [a, merged]}")
    assert error.code == "RG307"
    assert "merged@select_topk=0.1" in error.fix
    error = refused(MERGED, "next: {merge: linear, models: [a, merged@select_topk=0.2]}")
    assert error.code == "RG307"
    assert "did you mean 'merged@select_topk=" in error.fix


@pytest.mark.parametrize(
    ("sweep", "code", "says"),
    [
        ("{densty: [1]}", "RG302", "densty"),
        ("{wieght: [1]}", "RG302", "'weight'"),
        ("{weight: [x]}", "RG303", "'x'"),
        ("{weight: 3}", "RG303", "list of values"),
        ("{weight: []}", "RG303", "empty"),
        ("{weight: [1, 1]}", "RG303", "twice"),
        ("{seed: [-1]}", "RG303", "whole number"),
        ("{}", "RG303", "no option"),
        ("[1]", "RG303", "mapping"),
        (f"{{weight: {list(range(40))}, seed: {list(range(40))}}}", "RG303", "1,600 members"),
    ],
)
def test_mistakes(sweep: str, code: str, says: str) -> None:
    error = refused(f"m: {{merge: linear, models: [a, b], sweep: {sweep}}}")
    assert error.code == code, str(error)
    assert says in str(error)
    assert "recipe, line 3, step m, sweep" in error.where


def test_a_sweep_that_would_change_nothing_is_refused() -> None:
    error = refused("m: {merge: linear, models: {a: {weight: 1}, b: {weight: 2}}, sweep: {weight: [1, 2]}}")
    assert error.code == "RG303"
    assert "changes nothing" in error.what
    partly = merges(parse("m: {merge: linear, models: {a: {weight: 1}, b: }, sweep: {weight: [1, 2]}}"))
    assert len(partly) == 2
