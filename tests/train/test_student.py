"""Smaller models: which layers they are of, what sizes they have, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import model
from regraft.axes.module_map import modules_of
from regraft.errors import UserError
from regraft.resize.factorise import factorise
from regraft.train.student import SizeOptions, chosen_layers, student_of
from tiny import output_of


@given(st.integers(1, 40), st.integers(1, 40))
def test_layers_are_evenly_spaced_and_end_with_the_last(depth: int, layers: int) -> None:
    layers = min(depth, layers)
    chosen = chosen_layers(depth, layers)
    assert chosen[-1] == depth - 1
    steps = [b - a for a, b in zip([-1, *chosen], chosen, strict=False)]
    assert max(steps) - min(steps) <= 1
    assert min(steps) >= 1


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_layers_are_those_of_the_model(family: str) -> None:
    whole = model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    student = student_of(whole, SizeOptions(init="layers", num_layers=2), 0)
    # With the layers in between taken out, the model computes what the student computes.
    blocks = modules_of(whole).blocks[""]
    parent = whole.get_submodule(blocks[0].rpartition(".")[0])
    kept = [whole.get_submodule(blocks[i]) for i in (1, 3)]
    for i, block in enumerate(kept):
        parent[i] = block
        if family in ("llama", "gpt2"):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = i
    del parent[2:]
    whole.config.num_hidden_layers = 2
    assert torch.allclose(output_of(student, family), output_of(whole, family), atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mistral", "qwen2", "vit"])
def test_sizes_of_random_models(family: str) -> None:
    whole = model(family)
    student = student_of(whole, SizeOptions(init="random", num_layers=1, hidden_size=16), 5)
    again = student_of(whole, SizeOptions(init="random", num_layers=1, hidden_size=16), 5)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (1, 16)
    assert student.config.num_attention_heads == 2
    up = student.get_submodule(modules_of(student).find("ffn.up")[0])
    assert max(up.weight.shape) == (64 if family == "gpt2" else 32)  # 4 widths, or 64 of 32 in proportion
    assert torch.isfinite(output_of(student, family)).all()
    other = student_of(whole, SizeOptions(init="random", intermediate_size=24), 0)
    assert 24 in other.get_submodule(modules_of(other).find("ffn.up")[0]).weight.shape


def test_what_cannot_be() -> None:
    for values, words in (
        ({"num_layers": 2}, "num_layers has no place with init: weights"),
        ({"init": "layers", "hidden_size": 2}, "hidden_size has no place with init: layers"),
        ({"init": "layers"}, "needs num_layers"),
    ):
        with pytest.raises(ValueError, match=words):
            SizeOptions(**values)  # type: ignore[arg-type]
    bert = model("bert")
    assert student_of(bert, SizeOptions(), 0) is bert
    with pytest.raises(UserError, match="3 layers of a model that has 2"):
        student_of(bert, SizeOptions(init="layers", num_layers=3), 0)
    with pytest.raises(UserError, match="a width of 20 cannot be split into 3 heads"):
        student_of(bert, SizeOptions(init="random", hidden_size=20, num_attention_heads=3), 0)
    for family in ("clip", "t5"):
        with pytest.raises(UserError, match="several stacks of layers"):
            student_of(model(family), SizeOptions(init="random", num_layers=1), 0)
    factorise(bert)
    with pytest.raises(UserError, match="another size of a compressed model"):
        student_of(bert, SizeOptions(init="random"), 0)
