"""What the rules over matrices share: which tensors are matrices, the polar factor, and how memory is foretold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regraft.merge as merge
from regraft.checkpoint.tensor import BLOCK
from regraft.merge.jobs import predict_memory
from regraft.merge.memory import as_jobs
from regraft.merge.rule import Rule, TensorInfo
from regraft.merge.spectral import leading, polar
from regraft.methods import methods

RULES: list[Rule] = [rule for rule in methods("merge") if rule.span(rule.options()) == "matrices"]
GENERATOR = torch.Generator().manual_seed(45)


def test_these_are_the_rules() -> None:
    assert [rule.name for rule in RULES] == ["iso_c", "iso_cts", "tsvm", "wudi"]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_what_is_no_matrix_gets_the_mean(rule: Rule) -> None:
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.conv.weight": (4, 2, 3),
        "model.layers.1.self_attn.q_proj.weight": (8, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (12, 8),
    }
    base = {name: torch.randn(shape, generator=GENERATOR) for name, shape in shapes.items()}
    models = [{k: v + 0.1 * torch.randn(v.shape, generator=GENERATOR) for k, v in base.items()} for _ in range(3)]
    found = rule(models, base=base, weight=[1, 2, -1], **{"lambda": 0.5})
    for name, value in base.items():
        a, b, c = (m[name].double() - value.double() for m in models)
        mean = value.double() + 0.5 * (a + 2 * b - c) / 3
        assert torch.allclose(found[name].double(), mean, rtol=0, atol=1e-6) == ("q_proj.weight" not in name), name


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_matrix_with_values_that_are_not_finite_is_lost_as_a_whole(rule: Rule) -> None:
    base, model = torch.zeros(4, 4), torch.ones(4, 4)
    model[1, 2] = float("nan")
    assert rule([model, torch.ones(4, 4)], base=base, allow_nan=True).isnan().all()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_layer_that_is_stored_transposed_gives_the_transposed_result(rule: Rule) -> None:
    """GPT-2 stores its matrices (inputs, outputs); a merge must not depend on that."""
    there, here = "transformer.h.0.mlp.c_fc.weight", "model.layers.0.mlp.up_proj.weight"
    base, *models = torch.randn(4, 14, 20, generator=GENERATOR)
    models = [base + 0.05 * model for model in models]
    straight = rule([{here: m} for m in models], base={here: base})[here]
    turned = rule([{there: m.T} for m in models], base={there: base.T})[there]
    assert torch.equal(turned, straight.T)
    # What is stored transposed without being known to: two of the rules do not mind, up to rounding.
    unknown = rule([{here: m.T} for m in models], base={here: base.T})[here]
    assert torch.allclose(unknown, straight.T, rtol=0, atol=1e-4) == (rule.name in ("iso_c", "tsvm"))


def test_matrices_are_whole_chunks_and_memory_says_so() -> None:
    matrix, vector = torch.zeros(8 * BLOCK, 2), torch.zeros(16 * BLOCK)
    jobs, _ = as_jobs(merge.tsvm, [matrix] * 3, matrix, {})
    others, _ = as_jobs(merge.tsvm, [vector] * 3, vector, {})
    assert jobs[0].chunk(BLOCK) == jobs[0].block == 16 * BLOCK
    assert others[0].chunk(BLOCK) == others[0].block == BLOCK
    # A decomposition holds its input, both sides and a workspace of about four such matrices, beside the task vectors.
    assert predict_memory(jobs, 2, BLOCK) >= 2 * (4 + 3 + 7) * 16 * BLOCK * 4
    assert predict_memory(jobs, 2, BLOCK) == 16 * predict_memory(others, 2, BLOCK)


def test_roles_are_no_matrices() -> None:
    assert TensorInfo("w", (3, 4)).is_matrix
    assert not TensorInfo("w", (12,)).is_matrix
    assert not TensorInfo("w", (3, 2, 2)).is_matrix
    assert not any(TensorInfo("w", (3, 4), role=role).is_matrix for role in ("embedding", "head", "norm", "buffer"))


def test_the_polar_factor_is_the_nearest_orthonormal_matrix() -> None:
    matrix = torch.randn(9, 5, generator=GENERATOR, dtype=torch.float64)
    factor, sizes = polar(matrix)
    torch.testing.assert_close(factor.T @ factor, torch.eye(5, dtype=torch.float64))
    np.testing.assert_allclose(sizes.numpy(), np.linalg.svd(matrix.numpy())[1])
    symmetric = factor.T @ matrix
    torch.testing.assert_close(symmetric, symmetric.T)
    assert torch.linalg.eigvalsh(symmetric).min() > 0


def test_directions_without_a_singular_value_are_left_out() -> None:
    thin = torch.randn(9, 2, generator=GENERATOR)
    matrix = thin @ torch.randn(2, 7, generator=GENERATOR)
    found = leading(matrix, 5)
    assert [part.shape for part in found] == [(9, 2), (2,), (2, 7)]
    torch.testing.assert_close((found.left * found.sizes) @ found.right, matrix)
    assert torch.linalg.matrix_rank(polar(matrix)[0]) == 2
    assert leading(matrix, 5, floor=matrix.norm() * 2).left.shape == (9, 0)
    assert not polar(torch.zeros(3, 4))[0].any()
    assert polar(torch.zeros(3, 0))[0].shape == (3, 0)
