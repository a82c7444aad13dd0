"""Low-rank layers: the algebra of the factors, which layers are chosen, saving, loading and folding back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

import regraft
from models import FAMILIES, model
from regraft.axes.module_map import modules_of
from regraft.errors import UserError
from regraft.resize.factorise import LowRankOptions, factorise, plan, rank_of
from regraft.resize.low_rank import LowRankLinear
from regraft.resize.surgery import export, save, surgeries_of
from regraft.resize.svd import truncated, whitened
from regraft.resize.whitening import input_moments
from tiny import output_of


def full_rank(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs before and after every chosen layer is factorised without loss."""
    whole = model(family)
    before = output_of(whole, family)
    for name in modules_of(whole).find("attention") + modules_of(whole).find("ffn"):
        module = whole.get_submodule(name)
        if type(module).__name__ in ("Linear", "Conv1D"):
            from regraft.resize.low_rank import factorised, replace, weight_of

            factors = truncated(weight_of(module), min(weight_of(module).shape))
            replace(whole, name, factorised(module, factors.up, factors.down))
    return before, output_of(whole, family)


@pytest.mark.parametrize("family", [*FAMILIES, "swin"])
def test_full_rank_is_the_identity(family: str) -> None:
    before, after = full_rank(family)
    assert (before - after).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_the_error_is_that_of_the_values_left_out(rank: int, seed: int) -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factors = truncated(weight, rank)
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert np.allclose((factors.up @ factors.down).numpy(), best)
    expected = math.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
    assert factors.error == pytest.approx(expected, abs=1e-12)
    assert factors.best == pytest.approx(expected, abs=1e-12)
    # The singular values are split evenly: both factors have the same Gram matrix of values.
    assert torch.allclose(factors.up.T @ factors.up, factors.down @ factors.down.T)


@given(st.integers(1, 7), st.integers(0, 10**6))
def test_whitened_factors_are_best_for_outputs(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    inputs = torch.randn(500, 8, generator=generator, dtype=torch.float64) @ mixing * torch.logspace(0, -2, 8)
    found = whitened(weight, inputs.T @ inputs / len(inputs), rank)
    plain = truncated(weight, rank)
    errors = [float((inputs @ (weight - f.up @ f.down).T).norm()) for f in (found, plain)]
    # The least error of outputs is that of the values of W L that are left out, an independent computation.
    left = np.linalg.svd(weight.numpy() @ np.linalg.cholesky((inputs.T @ inputs).numpy()), compute_uv=False)[rank:]
    assert errors[0] == pytest.approx(math.sqrt((left**2).sum()), rel=1e-3, abs=1e-6)
    assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-9


def test_a_sketch_comes_near_the_best_and_says_how_near() -> None:
    generator = torch.Generator().manual_seed(0)
    decaying = torch.randn(300, 200, generator=generator) @ torch.diag(torch.logspace(0, -3, 200))
    exact, sketch = truncated(decaying, 20), truncated(decaying, 20, randomized=True)
    assert exact.error <= sketch.error <= exact.error * 1.02
    assert sketch.best is None
    product = sketch.up @ sketch.down
    assert sketch.error == pytest.approx(float((decaying - product).norm() / decaying.norm()), rel=1e-4)


def test_whitened_factors_of_a_sketch_come_near_and_say_how_near() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(120, 90, generator=generator) @ torch.diag(torch.logspace(0, -2, 90))
    inputs = torch.randn(400, 90, generator=generator) @ torch.diag(torch.logspace(-1, 0, 90))
    moments = inputs.T.double() @ inputs.double() / 400
    exact, sketch = (whitened(weight, moments, 12, randomized=one) for one in (False, True))
    assert (exact.randomized, sketch.randomized) == (False, True)
    for factors in (exact, sketch):
        outputs, own = inputs @ weight.T, inputs @ (factors.up @ factors.down).T
        assert factors.output_error == pytest.approx(float((outputs - own).norm() / outputs.norm()), rel=1e-3)
        left = float((weight - factors.up @ factors.down).norm() / weight.norm())
        assert factors.error == pytest.approx(left, rel=1e-4)
    assert exact.output_error is not None
    assert sketch.output_error is not None
    assert exact.output_error <= sketch.output_error * (1 + 1e-6) <= exact.output_error * 1.02
    assert truncated(weight, 12).output_error is None


def test_how_factors_were_found_is_told() -> None:
    name = "bert.encoder.layer.1.intermediate.dense"
    for options, randomized in ((LowRankOptions(), False), (LowRankOptions(svd="randomized"), True)):
        whole = model("bert")
        before = {n: m.weight.detach().clone() for n, m in whole.named_modules() if n == name}[name]
        moments = {name: torch.eye(32, dtype=torch.float64)}
        made = factorise(whole, options, moments=moments)
        layers = {layer["name"]: layer for layer in made.to_dict()["layers"]}
        assert {layer["randomized"] for layer in layers.values()} == {randomized}
        product = whole.get_submodule(name).dense()
        error = float((before - product).norm() / before.norm())
        assert layers[name]["error"] == pytest.approx(error, rel=1e-4)
        assert layers[name]["output_error"] == pytest.approx(error, rel=1e-4)  # inputs in all directions alike
        assert [n for n, layer in layers.items() if layer["output_error"] is not None] == [name]
        told = made.in_words()
        assert told.startswith("12 layers become low-rank")
        assert ("12 of them by a randomised decomposition" in told) == randomized
        worst = max(layers.values(), key=lambda layer: layer["error"])
        assert f"{worst['error']:.1%} at most ({worst['name']})" in told


def test_ranks() -> None:
    assert rank_of(768, 768, 2) == 192
    assert rank_of(3072, 768, 2) == 307
    whole = model("bert")
    found = plan(whole, LowRankOptions(ratio=2))
    assert {la.role for la in found.layers} == {
        "attention.query", "attention.key", "attention.value", "attention.output", "ffn.up", "ffn.down",
    }  # fmt: skip
    assert {(la.shape, la.rank) for la in found.layers} == {((32, 32), 8), ((64, 32), 10), ((32, 64), 10)}
    saved = sum(la.shape[0] * la.shape[1] - la.kept for la in found.layers)
    assert found.kept == sum(p.numel() for p in whole.parameters()) - saved


def test_energy_keeps_its_share_with_the_smallest_rank() -> None:
    whole = model("bert")
    found = plan(whole, LowRankOptions(energy=0.8))
    for layer in found.factorised:
        s = np.linalg.svd(whole.get_submodule(layer.name).weight.detach().numpy(), compute_uv=False) ** 2
        assert layer.rank is not None
        assert s[: layer.rank].sum() >= 0.8 * s.sum() > s[: layer.rank - 1].sum()


def test_a_budget_is_met_and_not_by_much() -> None:
    whole = model("bert", hidden_size=64, intermediate_size=256)
    found = plan(whole, LowRankOptions(target_parameters=0.6))
    assert 0.57 < found.kept / found.parameters <= 0.6
    factorise(whole, LowRankOptions(target_parameters=0.6))
    assert sum(p.numel() for p in whole.parameters()) == found.kept


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_and_folded_back(family: str, tmp_path: Path) -> None:
    whole = model(family)
    made = factorise(whole, LowRankOptions(ratio=1.5))
    names = [layer.name for layer in made.factorised]
    assert names
    assert all(isinstance(whole.get_submodule(name), LowRankLinear) for name in names)
    expected = output_of(whole, family)
    save(whole, tmp_path / "small")
    again = regraft.load(tmp_path / "small")
    assert type(again) is type(whole)
    assert torch.equal(output_of(again, family), expected)
    assert surgeries_of(again.config) == surgeries_of(whole.config)
    dense = regraft.export(again)
    save(dense, tmp_path / "dense")
    stock = type(whole).from_pretrained(tmp_path / "dense")
    assert (output_of(stock, family) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert sum(p.numel() for p in stock.parameters()) == made.parameters
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "regraft" not in config
    # A second round gives the same: what was loaded can be saved.
    save(again, tmp_path / "again")
    assert torch.equal(output_of(regraft.load(tmp_path / "again"), family), expected)


def test_stock_loaders_refuse_a_low_rank_model(tmp_path: Path) -> None:
    whole = model("bert")
    factorise(whole)
    save(whole, tmp_path)
    with pytest.raises(ValueError, match="regraft"):
        hf.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_stock_model_loads_as_ever(tmp_path: Path) -> None:
    whole = model("gpt2")
    whole.save_pretrained(tmp_path)
    assert torch.equal(output_of(regraft.load(tmp_path), "gpt2"), output_of(whole, "gpt2"))


def test_a_new_head_on_a_low_rank_body(tmp_path: Path) -> None:
    whole = model("bert")
    factorise(whole)
    save(whole, tmp_path)
    with pytest.raises(UserError, match="no weights for") as caught:
        regraft.load(tmp_path, "AutoModelForSequenceClassification")
    assert caught.value.code == "RG202"
    labels = {0: "no", 1: "maybe", 2: "yes"}
    other = regraft.load(tmp_path, "AutoModelForSequenceClassification", allow_missing=True, labels=labels)
    assert other.config.id2label == labels
    body = whole.bert.encoder(inputs_embeds := torch.ones(1, 3, 32))[0]
    assert torch.equal(other.bert.encoder(inputs_embeds)[0], body)
    again = regraft.load(tmp_path, "AutoModelForSequenceClassification", allow_missing=True, labels=labels)
    assert torch.equal(other.classifier.weight, again.classifier.weight)


def test_peft_takes_it_from_there(tmp_path: Path) -> None:
    import peft

    whole = model("bert")
    factorise(whole)
    save(whole, tmp_path)
    expected = output_of(whole, "bert")
    adapted = peft.get_peft_model(regraft.load(tmp_path), peft.LoraConfig(r=2, target_modules=["up"]))
    assert torch.allclose(output_of(adapted, "bert"), expected)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 12


def test_moments_leave_padding_out() -> None:
    whole = model("bert")
    name = "bert.encoder.layer.0.intermediate.dense"
    seen: list[torch.Tensor] = []
    whole.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    ids, mask = torch.arange(8).reshape(2, 4) + 5, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = input_moments(whole, [{"input_ids": ids, "attention_mask": mask}], [name])[name]
    rows = torch.cat([seen[0][0], seen[0][1, :2]]).double()
    assert torch.allclose(found, rows.T @ rows / 6)


def test_what_cannot_be_factorised_is_named(tmp_path: Path) -> None:
    for options, code, words in (
        (LowRankOptions(ratio=500), "RG303", "a ratio of 500 leaves .* a rank of 0"),
        (LowRankOptions(include=("cross",)), "RG308", "no linear layer has a role of cross"),
        (LowRankOptions(rank=32), "RG303", "no layer becomes smaller: two factors of rank 32"),
        (LowRankOptions(target_parameters=0.05), "RG303", "cannot bring the model down to 5%"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            plan(model("bert"), options)
        assert caught.value.code == code
    with pytest.raises(ValueError, match="ratio and rank both say"):
        LowRankOptions(ratio=2, rank=3)
    whole = model("bert")
    factorise(whole)
    with pytest.raises(UserError, match="low-rank already"):
        factorise(whole)
    broken = model("bert")
    with torch.no_grad():
        broken.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"not finite \(bert.encoder.layer.1.output.dense\)"):
        factorise(broken)
    save(whole, tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"kind": "low_rank"', '"kind": "sparse"'))
    with pytest.raises(UserError, match="a surgery of kind 'sparse'"):
        regraft.load(tmp_path)
    path.write_text(text.replace('"bert.encoder.layer.0.output.dense": 10', '"bert.encoder.layer.0.output.dense": 999'))
    with pytest.raises(UserError, match=r"names bert.encoder.layer.0.output.dense with rank 999"):
        regraft.load(tmp_path)
    path.write_text(text.replace('"surgeries": [', '"surgeries": [7, '))
    with pytest.raises(UserError, match="is malformed"):
        regraft.load(tmp_path)
    path.write_text(text.replace("bert.encoder.layer.0.output.dense", "bert.encoder.layer.7.output.dense"))
    with pytest.raises(UserError, match=r"the surgery names bert.encoder.layer.7.output.dense"):
        regraft.load(tmp_path)


def test_layers_that_share_a_matrix_stay_dense() -> None:
    whole = model("bert")
    whole.bert.encoder.layer[0].intermediate.dense.weight = whole.bert.encoder.layer[1].intermediate.dense.weight
    made = factorise(whole)
    dense = {la.name: la.why for la in made.layers if la.rank is None}
    assert list(dense) == [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
    assert "shared" in dense["bert.encoder.layer.0.intermediate.dense"]
    assert any("stay dense" in warning for warning in made.warnings)


def test_narrow_matrices_are_warned_of() -> None:
    assert any("narrower than 256" in warning for warning in plan(model("vit"), LowRankOptions()).warnings)


# Queries, keys and values in one matrix


def test_parts_of_one_matrix_are_factorised_each_by_itself(tmp_path: Path) -> None:
    whole = model("gpt2")
    name = "transformer.h.0.attn.c_attn"
    weight = whole.get_submodule(name).weight.detach().t().clone()
    made = factorise(whole, LowRankOptions(ratio=2, split_qkv=True, include=("attention",)))
    module = whole.get_submodule(name)
    rank = rank_of(32, 32, 2)
    assert (module.rank, module.parts) == (rank, 3)
    blocks = [truncated(block, rank) for block in weight.split(32)]
    best = torch.cat([one.up @ one.down for one in blocks])
    assert torch.allclose(module.dense(), best, atol=1e-6)
    layer = next(la for la in made.layers if la.name == name)
    assert layer.kept == sum(p.numel() for p in (module.up.weight, module.down.weight)) == 3 * rank * 64
    error = float((weight - best).norm() / weight.norm())
    assert layer.error == pytest.approx(error, rel=1e-4)
    assert layer.best == pytest.approx(error, rel=1e-4)
    assert made.kept == sum(p.numel() for p in whole.parameters())
    x = torch.randn(2, 5, 32)
    assert torch.allclose(module(x), x @ best.T + module.up.bias, atol=1e-5)
    save(whole, tmp_path)
    again = regraft.load(tmp_path)
    assert again.get_submodule(name).parts == 3
    assert torch.equal(output_of(again, "gpt2"), output_of(whole, "gpt2"))
    dense = export(whole)
    assert type(dense.get_submodule(name)).__name__ == "Conv1D"
    assert torch.allclose(output_of(dense, "gpt2"), output_of(whole, "gpt2"), atol=1e-5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text())).replace(f"[{rank}, 3]", f"[{rank}, 5]"))
    with pytest.raises(UserError, match=rf"names {name} with rank \[{rank}, 5\]"):
        regraft.load(tmp_path)


@pytest.mark.parametrize("options", [{"target_parameters": 0.7}, {"energy": 0.6}, {"rank": 5}])
def test_parts_follow_every_way_to_say_how_small(options: dict[str, float]) -> None:
    whole = model("gpt2")
    before = sum(p.numel() for p in whole.parameters())
    weight = whole.get_submodule("transformer.h.0.attn.c_attn").weight.detach().t().clone()
    made = factorise(whole, LowRankOptions(split_qkv=True, **options))
    after = sum(p.numel() for p in whole.parameters())
    assert made.kept == after
    module = whole.get_submodule("transformer.h.0.attn.c_attn")
    if "target_parameters" in options:
        assert 0.6 * before < after <= 0.7 * before
    if "energy" in options:
        for block, low in zip(weight.split(32), module.dense().split(32), strict=True):
            assert float((block - low).norm() / block.norm()) ** 2 <= 0.4 + 1e-5
    if "rank" in options:
        assert module.rank == 5
    assert LowRankOptions().split_qkv is False


def test_means_over_inputs_of_a_decoder_use_its_own_mask() -> None:
    whole = model("t5").eval()
    names = ["decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.k"]
    seen: list[torch.Tensor] = []
    for name in names:
        whole.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    mask, other = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids = torch.arange(8).reshape(2, 4) + 5
    batch = {
        "input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": other,
    }  # fmt: skip
    found = input_moments(whole, [batch], names)
    for name, x, real in zip(names, seen, (other, mask), strict=True):
        rows = x[real.bool()].double()
        assert torch.allclose(found[name], rows.T @ rows / len(rows)), name
