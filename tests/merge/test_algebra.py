"""What must hold for every registered rule, new ones included, and algebra that holds for some."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regraft.merge as merge
from regraft.checkpoint.tensor import BLOCK
from regraft.errors import UserError
from regraft.merge.rule import REQUIRED, Rule
from rule_cases import BRANCHES, NAMES, RULES, TASK_VECTOR_RULES, assert_alike, count, family, state

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_model_merged_with_itself_comes_back_bit_for_bit(rule: Rule, dtype: torch.dtype) -> None:
    model = state(torch.Generator().manual_seed(4), dtype)
    for value in model.values():
        value.view(-1)[::5] = -0.0  # equal to 0.0, but not the same bits
    for n in (2, 3):
        merged = rule([model] * count(rule, n), base=model if rule.needs_base else None)
        assert all(same_bits(merged[name], model[name]) for name in model)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_chunk_size_and_workers_never_change_a_byte(rule: Rule) -> None:
    # Nine models, and last chunks of a few elements: there torch adds rows and treats ends of vectors otherwise.
    n = count(rule, 9)
    generator = torch.Generator().manual_seed(1)
    sizes = [(5, BLOCK // 4 + 1), (2 * BLOCK + 3,), (BLOCK + 1,), (1,), (BLOCK + 9,)]
    base = {f"model.layers.{i}.w": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}
    models = [{k: v + 0.1 * torch.randn(v.shape, generator=generator) ** 3 for k, v in base.items()} for _ in range(n)]
    for options in ({}, *BRANCHES.get(rule.name, [])):
        reference = rule(models, base=base, workers=1, chunk=1 << 22, **options)
        for workers, chunk in ((1, BLOCK), (3, 2 * BLOCK)):
            assert equal(rule(models, base=base, workers=workers, chunk=chunk, **options), reference), options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_compiled_loops_and_torch_give_one_result(
    rule: Rule, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerators run the latter: up to the last bits of sums, on which few entries may then depend."""
    base, models = family(4, count(rule, 3), dtype)
    for options in ({}, *BRANCHES.get(rule.name, [])):
        found = rule(models, base=base, **options)
        with monkeypatch.context() as patched:
            for name, module in list(sys.modules.items()):
                if name.startswith("regraft.merge"):
                    for switch, answer in (("fused", False), ("stored", None)):
                        if hasattr(module, switch):
                            patched.setattr(module, switch, lambda *_, answer=answer: answer)
            expected = rule(models, base=base, **options)
        assert_alike(found, expected)


@pytest.mark.parametrize("rule", [r for r in RULES if r.in_mergekit], ids=lambda r: r.name)
def test_mergekits_meaning_is_one_that_the_rule_can_take(rule: Rule) -> None:
    n = count(rule, 2)
    defaults = {option: 0.5 if value is REQUIRED else value for option, value in rule.mergekit_defaults.items()}
    options = rule.resolve(n, defaults).model_dump(by_alias=True)
    assert all(options[name] in (value, (value,) * n) for name, value in defaults.items())
    for option, table in rule.mergekit_values.items():
        for ours in table.values():
            assert rule.resolve(n, {option: ours}).model_dump(by_alias=True)[option] == ours


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_inputs_are_left_alone_and_dtypes_kept(rule: Rule) -> None:
    base, models = family(2, count(rule, 2), torch.bfloat16)
    before = [{k: v.clone() for k, v in m.items()} for m in (base, *models)]
    out = rule(models, base=base)
    assert all(equal(m, b) for m, b in zip((base, *models), before, strict=True))
    assert all(v.dtype == torch.bfloat16 and v.shape == base[k].shape and v.isfinite().all() for k, v in out.items())


@pytest.mark.parametrize("rule", [r for r in RULES if "seed" not in r.options.model_fields and r.max_models is None])
def test_the_order_of_models_does_not_matter(rule: Rule) -> None:
    base, models = family(3, 3)
    forward = rule(models, base=base)
    backward = rule(models[::-1], base=base)
    for name in forward:
        torch.testing.assert_close(forward[name], backward[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASK_VECTOR_RULES)
def test_task_vector_rules_need_a_base(name: str) -> None:
    rule = getattr(merge, name)
    with pytest.raises(UserError, match=f"{name} needs the base model") as error:
        rule([torch.ones(3)] * max(2, rule.min_models))
    assert error.value.code == "RG304"


@pytest.mark.parametrize("rule", [r for r in RULES if "lambda_" in r.options.model_fields], ids=lambda r: r.name)
def test_lambda_zero_is_the_base(rule: Rule) -> None:
    base, models = family(4, 2)
    assert equal(rule(models, base=base, **{"lambda": 0.0}), base)


tensors = st.integers(0, 2**32 - 1).map(lambda s: torch.randn(4, 6, generator=torch.Generator().manual_seed(s)))
weights = st.floats(-2, 2, width=32)


@given(tensors, tensors, weights, weights)
def test_linear_is_linear(x: torch.Tensor, y: torch.Tensor, a: float, b: float) -> None:
    found = merge.linear([x, y], weight=[a, b], normalize=False)
    torch.testing.assert_close(found, a * x + b * y, rtol=1e-5, atol=1e-6)


@given(tensors, tensors, st.floats(0.1, 3))
def test_normalised_weights_do_not_depend_on_their_scale(x: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    torch.testing.assert_close(merge.linear([x, y], weight=[scale, 3 * scale]), merge.linear([x, y], weight=[1, 3]))


@given(tensors, tensors, st.floats(0, 1))
def test_slerp_runs_backwards(x: torch.Tensor, y: torch.Tensor, t: float) -> None:
    torch.testing.assert_close(merge.slerp([x, y], t=t), merge.slerp([y, x], t=1 - t), rtol=1e-4, atol=1e-5)


@given(tensors, tensors, weights)
def test_subtracting_a_task_vector_undoes_adding_it(base: torch.Tensor, model: torch.Tensor, w: float) -> None:
    added = merge.task_arithmetic([model], base=base, weight=w)
    back = merge.task_arithmetic([model - base + added], base=added, weight=-w)
    torch.testing.assert_close(back, base, rtol=1e-4, atol=1e-4)


@given(tensors, tensors, tensors)
def test_ties_without_trim_follows_the_elected_sign(base: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    found = merge.ties([base + x, base + y], base=base, density=1.0) - base
    elected = torch.where(x + y >= 0, 1.0, -1.0)
    assert ((found * elected) > -1e-5).all()
    assert (found.abs() <= torch.maximum(x.abs(), y.abs()) + 1e-5).all()


@given(tensors, tensors)
def test_what_one_model_alone_has_survives_ties_and_dare(base: torch.Tensor, x: torch.Tensor) -> None:
    for rule in (merge.ties, merge.dare_ties, merge.dare_linear):
        torch.testing.assert_close(rule([base + x], base=base, density=1.0), base + x, rtol=1e-5, atol=1e-6)


@given(tensors, tensors, st.integers(2, 4))
def test_model_stock_follows_models_that_agree(base: torch.Tensor, x: torch.Tensor, n: int) -> None:
    torch.testing.assert_close(merge.model_stock([base + x] * n, base=base), base + x, rtol=1e-3, atol=1e-4)


@given(st.integers(0, 1000))
def test_pcb_never_lets_a_task_win_against_the_sum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y, z = (torch.randn(400, generator=generator) for _ in range(3))
    found = merge.pcb([x, y, z], base=torch.zeros(400), ratio=0.2, clip=0.0)
    for delta, others in ((x, y + z), (y, x + z), (z, x + y)):
        against = (delta * (delta + others) < 0) & (torch.sign(others) != torch.sign(delta))
        # Where a task opposes the sum of all, the result does not have that task's sign.
        assert (found[against] * delta[against] <= 1e-6).all()


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (lambda x: merge.ties([x], base=x, densty=0.5), "RG302", "no option 'densty'.*did you mean 'density'"),
        (lambda x: merge.ties([x], base=x, density=1.5), "RG303", "density is 1.5"),
        (lambda x: merge.ties([x], base=x, density=0.0), "RG303", "density is 0.0"),
        (lambda x: merge.linear([x, x], weight=[1, 2, 3]), "RG303", "weight has 3 values for 2 models"),
        (lambda x: merge.linear([x], weight="much"), "RG303", "weight is 'much'"),
        (lambda x: merge.slerp([x]), "RG305", "slerp takes 2 model"),
        (lambda x: merge.model_stock([x], base=x), "RG305", "takes 2 or more"),
        (lambda x: merge.linear([x, x[:1]]), "RG201", "shape"),
        (lambda x: merge.linear([x, x.to(torch.complex128)]), "RG109", r"dtype torch\.complex128, which no checkpoint"),
        (lambda x: merge.linear([{"a": x}, {"b": x}]), "RG202", "no tensor"),
        (lambda x: merge.linear([{"a": x}, {"a": x, "b": x}]), "RG202", "only model 2 has a tensor 'b'"),
        (lambda x: merge.linear([x, x * float("nan")]), "RG206", "NaN"),
    ],
)
def test_errors(call: Any, code: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call(torch.ones(3))
    assert error.value.code == code


def test_a_module_that_is_no_rule_is_named() -> None:
    with pytest.raises(AttributeError, match="no rule 'tiess'; there are arcee_fusion"):
        merge.tiess  # noqa: B018
    assert set(NAMES) <= set(dir(merge))


def test_options_must_be_finite() -> None:
    with pytest.raises(UserError, match="weight is nan: input should be a finite number") as error:
        merge.linear([torch.ones(3)], weight=float("nan"))
    assert error.value.code == "RG303"
