"""mergekit's recipes: read as they are, and refused by name where regraft does something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regraft.errors import UserError
from regraft.merge.rule import Rule
from regraft.methods import method, methods
from regraft.recipe import MergeStep, parse_recipe
from regraft.recipe.document import Input
from regraft.recipe.resolve import Resolver

TIES = """
merge_method: ties
base_model: org/base@v1
models:
  - model: org/base@v1
  - model: org/math+org/math-lora
    parameters: {weight: 0.5, density: [1, 0.7, 0.1]}
  - model: org/code
    parameters:
      weight:
        - {filter: mlp, value: [0.2, 0.8]}
        - {value: 0.4}
parameters: {normalize: false, lambda: 1.5, int8_mask: true}
dtype: torch.bfloat16
out_dtype: float16
tokenizer_source: base
chat_template: auto
"""
SLERP = """
slices:
  - sources:
      - {model: org/a, layer_range: [0, 4]}
      - {model: org/b, layer_range: [0, 4]}
    parameters: {t: 0.1}
merge_method: slerp
base_model: org/b
parameters:
  t: [{filter: attn, value: [0, 0.5, 1]}, {value: 0.5}]
"""


def parse(text: str) -> MergeStep:
    (step,) = parse_recipe(text, path=Path("m.yaml")).steps
    assert isinstance(step, MergeStep)
    return step


def refused(text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse(text)
    return caught.value


def flow(method: str = "linear", **keys: str) -> str:
    """A recipe of one line per key, with two weighted models unless others are given."""
    models = "[{model: org/a, parameters: {weight: 1}}, {model: org/b, parameters: {weight: 2}}]"
    lines = {"merge_method": method, **({} if "slices" in keys else {"models": models}), **keys}
    return "".join(f"{k}: {v}\n" for k, v in lines.items() if v)


def test_a_task_vector_merge() -> None:
    step = parse(TIES)
    assert (step.name, step.method, step.dialect, step.base) == ("merged", "ties", "mergekit", "org/base@v1")
    assert [i.model for i in step.inputs] == ["org/base@v1", "org/math+org/math-lora", "org/code"]
    assert step.inputs[1].settings["density"][0].value == [1, 0.7, 0.1]
    assert [(c.value, c.filter) for c in step.inputs[2].settings["weight"]] == [([0.2, 0.8], "mlp"), (0.4, None)]
    assert step.settings["lambda"][0].value == 1.5
    assert (step.dtype, step.out_dtype) == ("bfloat16", "float16")
    assert (step.tokenizer_from, step.chat_template) == ("org/base@v1", None)
    assert step.where == "m.yaml, line 2, merge_method ties"


def test_every_method_of_mergekit_is_a_rule() -> None:
    """Those that mergekit 0.1.5 registers."""
    names = (
        "arcee_fusion breadcrumbs breadcrumbs_ties dare_linear dare_ties della della_linear karcher linear model_stock"
        " multislerp nearswap nuslerp passthrough ram ramplus_tl sce slerp task_arithmetic ties"
    )
    assert [rule.name for rule in methods("merge") if rule.in_mergekit] == names.split()


def test_the_options_mean_what_mergekit_means() -> None:
    step = parse(TIES)
    rule: Rule[Any] = method("merge", "ties")
    inputs = [i for i in step.inputs if i.model != step.base]
    options: Any = Resolver(rule, dialect="mergekit", where="", seed=0).options(
        "layers.1.mlp.up", 0.5, inputs, [step.settings]
    )
    assert options.weight == (0.5, 0.5)
    assert options.density == (0.7, 1.0)
    assert (options.normalize, options.trim_scope) == (False, "tensor")


def test_slices_and_the_precedence_of_their_parameters() -> None:
    step = parse(SLERP)
    (piece,) = step.slices
    assert [(i.model, i.layers) for i in piece.inputs] == [("org/b", (0, 4)), ("org/a", (0, 4))]
    resolver = Resolver(method("merge", "slerp"), dialect="mergekit", where="", seed=0)
    levels = [piece.settings, step.settings]
    options: Any = resolver.options("x.attn", 1.0, list(piece.inputs), levels)
    assert options.t == 0.1
    options = resolver.options("x.attn", 1.0, list(piece.inputs), [step.settings])
    assert options.t == 1


def test_layers_are_stacked_by_passthrough() -> None:
    first = "{sources: [{model: org/a, layer_range: [0, 4]}]}"
    second = "{sources: [{model: org/b, layer_range: [2, 4], parameters: {scale: 0.5}}], base_model: org/b}"
    step = parse(flow("passthrough", slices=f"[{first}, {second}]"))
    assert [i.layers for s in step.slices for i in s.inputs] == [(0, 4), (2, 4)]
    assert step.slices[1].inputs[0].settings["scale"][0].value == 0.5
    assert step.base == "org/b"


@pytest.mark.parametrize("models", ["[{model: org/a}]", "[{model: org/a}, {model: org/b}]"])
def test_slerp_starts_at_the_base_wherever_it_is_listed(models: str) -> None:
    step = parse(flow("slerp", models=models, base_model="org/b", parameters="{t: 0.3}"))
    assert [i.model for i in step.inputs] == ["org/b", "org/a"]


@pytest.mark.parametrize("models", ["{model: org/a}, {model: org/b}", "{model: org/c}, {model: org/a}, {model: org/b}"])
def test_a_base_that_a_rule_can_do_without_may_be_listed_or_not(models: str) -> None:
    step = parse(flow("nuslerp", models=f"[{models}]", base_model="org/c", parameters="{weight: 1}"))
    assert step.base == "org/c"
    assert refused(flow("nuslerp", models=f"[{models}, {{model: org/d}}]", base_model="org/c")).code == "RG305"
    assert parse(flow("nuslerp")).base is None


def test_each_slice_may_have_a_base() -> None:
    both = "sources: [{model: org/a, layer_range: [0, 1]}, {model: org/b, layer_range: [0, 1]}]"
    slices = f"[{{base_model: org/a, {both}}}, {{base_model: org/b, {both}}}, {{{both}, residual_weight: null}}]"
    step = parse(flow("task_arithmetic", slices=slices, base_model="org/c", parameters="{weight: 1}"))
    assert [piece.base for piece in step.slices] == ["org/a", "org/b", "org/c"]
    assert step.base == "org/c"
    assert step.references == ["org/a", "org/b", "org/c"]
    step = parse(flow("slerp", slices=slices.rpartition(", {sources")[0] + "]", parameters="{t: 0}"))
    assert [[i.model for i in piece.inputs] for piece in step.slices] == [["org/a", "org/b"], ["org/b", "org/a"]]
    assert step.base is None


def test_the_long_form_of_a_reference() -> None:
    model = "{model: {path: org/a, revision: v2}, lora: {path: ./lora}}"
    step = parse(flow(models=f"[{{model: {model}, parameters: {{weight: 1}}}}]"))
    assert step.inputs[0].model == "org/a@v2+./lora"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tokenizer_source": "org/a"}, "org/a"),
        ({"tokenizer": "{source: org/b}"}, "org/b"),
        ({"tokenizer": "{source: base}", "base_model": "org/b"}, "org/b"),
        ({"tokenizer_source": "null"}, None),
    ],
)
def test_the_tokenizer_of_one_model(keys: dict[str, str], expected: str | None) -> None:
    assert parse(flow(**keys)).tokenizer_from == expected


def test_a_literal_chat_template() -> None:
    assert parse(flow(chat_template="'{{ messages }}'")).chat_template == "{{ messages }}"


def test_options_that_mergekit_takes_without_using_them() -> None:
    step = parse(flow("task_arithmetic", base_model="org/c", parameters="{int8_mask: true, density: 0.3}"))
    assert "density" not in step.settings


def test_filters_after_one_that_holds_for_all_are_as_mergekit_reads_them() -> None:
    step = parse(flow("slerp", base_model="org/a", parameters="{t: [{value: 0.5}, {filter: mlp, value: 1}]}"
                      , models="[{model: org/a}, {model: org/b}]"))  # fmt: skip
    assert len(step.settings["t"]) == 2


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (flow("tise"), "RG301", "'ties'"),
        (flow("pcb", base_model="org/c"), "RG309", "write a regraft recipe"),
        (flow(base="org/c"), "RG302", "'base_model'"),
        (flow(modules="{default: {}}"), "RG303", "both models and modules"),
        (flow(models="", modules="{default: {sources: []}}"), "RG302", "a module has no key 'sources'"),
        (flow(parameters="{densty: 1}"), "RG302", "densty"),
        (flow(parameters="{density: 1}"), "RG302", "linear has no option 'density'"),
        (flow(parameters="{normalize: maybe}"), "RG303", "maybe"),
        (flow(models="[{model: org/a, weight: 1}]"), "RG302", "'weight'"),
        (flow(models="[{model: org/a, layer_range: [0, 1]}]"), "RG302", "'layer_range'"),
        (flow(models="[{parameters: {weight: 1}}]"), "RG303", "names no model"),
        (flow(models="[org/a]"), "RG303", "mapping"),
        (flow(models="[]"), "RG303", "empty"),
        (flow(models=""), "RG303", "neither models nor slices"),
        (flow() + "slices: [{sources: [{model: org/a, layer_range: [0, 1]}]}]\n", "RG303", "both"),
        (flow(models="[{model: org/a}, {model: org/a}]"), "RG305", "twice"),
        (flow(models="[{model: org/a, parameters: {normalize: true}}]"), "RG302", "top-level parameters"),
        (flow(models="[{model: org/a, parameters: {weight: [x, 1]}}]"), "RG303", "weight[0]"),
        (flow(base_model="org/c"), "RG305", "not among its models"),
        (flow("ties"), "RG304", "base_model"),
        (flow("slerp", models="[{model: org/a}, {model: org/b}]"), "RG304", "base_model"),
        (flow("slerp", models="[{model: a}, {model: b}]", base_model="c"), "RG305", "not 3"),
        (flow("sce", models="[{model: a}, {model: b}]", base_model="b"), "RG305", "not 1"),
        (flow(dtype="int8"), "RG303", "int8"),
        (flow(dtype="bflot16"), "RG303", "'bfloat16'"),
        (flow(tokenizer="union"), "RG303", "mapping"),
        (flow(tokenizer="{source: org/a, pad_to_multiple_of: 0}"), "RG303", "pad_to_multiple_of"),
        (flow(tokenizer_source="base"), "RG304", "base_model"),
        (flow(tokenizer_source="org/a", tokenizer="{source: org/a}"), "RG303", "one of them"),
        (flow(chat_template="nonsense"), "RG303", "write auto, one of alpaca, chatml"),
        (flow(models="[{model: {model: org/a, override_architecture: X}}]"), "RG309", "override_architecture"),
        (flow(slices="[{sources: [{model: org/a}]}]"), "RG303", "layer_range"),
        (flow(slices="[{sources: [{model: org/a, layer_range: [3, 1]}]}]"), "RG303", "[first, last]"),
        (flow(slices="[{model: org/a}]"), "RG302", "'model'"),
        (flow(slices="[{parameters: {}}]"), "RG303", "no sources"),
        (flow(slices="[{sources: [{model: org/a, layer_range: [0, 1]}], residual_weight: 1}]"), "RG309", "residual"),
        (
            flow(slices="[{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 2]}]}]"),
            "RG303",
            "1, 2",
        ),
        (
            flow(
                "ties",
                slices="[{sources: [{model: a, layer_range: [0, 1]}], base_model: b}, "
                "{sources: [{model: a, layer_range: [0, 1]}]}]",
            ),
            "RG304",
            "ties needs a base model",
        ),
        (
            flow(slices="[{sources: [{model: org/a, layer_range: [0, 1]}], merge_method: slerp}]"),
            "RG309",
            "one merge_method",
        ),
        (flow(slices="[{sources: [{model: org/a, layer_range: [0, 1]}], residual: 1}]"), "RG302", "'residual'"),
        (flow(tokenizer="{source: org/a, tokens: {x: {source: org/b, forced: true}}}"), "RG302", "'forced'"),
    ],
)
def test_mistakes(text: str, code: str, says: str) -> None:
    error = refused(text)
    assert error.code == code, str(error)
    assert says in str(error), str(error)
    assert error.where.startswith("m.yaml, line ")


ONE = (
    "merge_method: linear\nmodels: [{model: org/a, parameters: {weight: 1}}, {model: org/b, parameters: {weight: 1}}]\n"
)
BOTH = "merge_method: slerp\nbase_model: one\nmodels: [{model: one}, {model: two}]\nparameters: {t: 0.5}\n"


def documents(*texts: str) -> str:
    return "---\n".join(texts)


def test_documents_are_steps_in_the_order_in_which_they_need_one_another() -> None:
    recipe = parse_recipe(documents(BOTH, f"name: two\n{ONE}", f"name: one\n{ONE}") + "---\n")
    assert [step.name for step in recipe.steps] == ["two", "one", "merged"]
    final = recipe.steps[-1]
    assert isinstance(final, MergeStep)
    assert [i.model for i in final.inputs] == ["one", "two"]
    chain = documents(
        f"name: c\n{ONE.replace('org/a', 'b')}", f"name: b\n{ONE.replace('org/a', 'a')}", f"name: a\n{ONE}"
    )
    assert [step.name for step in parse_recipe(chain).steps] == ["a", "b", "c"]


def test_a_document_alone_may_have_a_name() -> None:
    assert parse(f"name: mine\n{ONE}").name == "mine"


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (documents(ONE, ONE), "RG307", "have no name"),
        (documents(ONE, f"name: merged\n{ONE}"), "RG307", "merged"),
        (documents(f"name: x\n{ONE}", f"name: x\n{ONE}"), "RG307", "x is the name of two documents"),
        (documents(f"name: a/b\n{ONE}", ONE), "RG303", "'a/b' cannot be the name"),
        (documents(f"name: x\n{ONE.replace('org/a', 'x')}", ONE), "RG307", "refers to itself"),
        (documents(f"name: x\n{ONE}", ONE.replace("org/a", "x+org/lora")), "RG309", "what the document x makes"),
        (documents(f"name: x\n{ONE}", ONE.replace("org/a", "x@main")), "RG309", "what the document x makes"),
        (
            documents(*(f"name: {a}\n{ONE.replace('org/a', b)}" for a, b in ("xy", "yx"))),
            "RG307",
            "x, y need one another in a circle",
        ),
        (documents(ONE, "models: {}\nsteps: {}\n"), "RG309", "only mergekit's recipes may share a file"),
    ],
)
def test_mistakes_in_files_of_several_documents(text: str, code: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, path=Path("m.yaml"))
    assert caught.value.code == code, str(caught.value)
    assert says in str(caught.value), str(caught.value)


def test_documents_cannot_be_changed_from_the_command_line() -> None:
    with pytest.raises(UserError, match="--set changes files of one"):
        parse_recipe(documents(f"name: x\n{ONE}", ONE), changes=["dtype=float16"])


def test_a_required_weight_is_missed_when_it_is_resolved() -> None:
    step = parse(flow(models="[{model: org/a, parameters: {weight: 1}}, {model: org/b}]"))
    resolver = Resolver(method("merge", "linear"), dialect="mergekit", where=step.where, seed=0)
    with pytest.raises(UserError, match=r"linear needs 'weight' for org/b \(m.yaml, line 1") as caught:
        resolver.options("x", 0, list[Input](step.inputs), [step.settings])
    assert caught.value.code == "RG303"
