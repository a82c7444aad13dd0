"""On an accelerator the rules give what they give on the processor. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from models import save_fine_tune, save_model
from regraft.checkpoint.device import usable_device
from regraft.checkpoint.tensor import BLOCK
from regraft.cli.main import app
from regraft.merge.rule import Rule
from rule_cases import BRANCHES, NAMES, RULES, assert_alike, count, family

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_gives_what_it_gives_on_the_processor(rule: Rule, dtype: torch.dtype) -> None:
    base, models = family(4, count(rule, 3), dtype)
    for options in ({}, *BRANCHES.get(rule.name, [])):
        found = rule(models, base=base, device="cuda", **options)
        assert all(value.device.type == "cpu" for value in found.values())
        # Another library's singular vectors: their error is relative to the largest value of a matrix, here about 10.
        within = 1e-4 if rule.span(rule.options()) == "matrices" else 1e-6
        assert_alike(found, rule(models, base=base, **options), within)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_chunk_size_and_workers_never_change_a_byte(rule: Rule) -> None:
    base, models = family(5, count(rule, 3))
    for options in ({}, *BRANCHES.get(rule.name, [])):
        reference = rule(models, base=base, device="cuda", **options)
        for workers, chunk in ((1, BLOCK), (3, 2 * BLOCK)):
            other = rule(models, base=base, device="cuda", workers=workers, chunk=chunk, **options)
            assert all(torch.equal(reference[name], other[name]) for name in reference), options


@pytest.mark.parametrize("method", ["ties", "slerp", "della", "tsvm"])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_the_command_merges_models(kind: str, method: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", kind, hidden_size=128, vocab_size=512)
    models = [save_fine_tune(tmp_path / name, base, seed) for seed, name in enumerate("ab")]
    recipe = tmp_path / "recipe.yaml"
    step = {"merge": method, "models": [str(path) for path in models]}
    step |= {"t": 0.3} if method == "slerp" else {"base": str(base)}
    recipe.write_text(json.dumps({"steps": {"merged": step}}))  # JSON is YAML
    outputs = []
    for device in ("cpu", "auto"):
        out = tmp_path / device
        result = CliRunner().invoke(app, ["merge", str(recipe), str(out), "--device", device])
        assert result.exit_code == 0, result.output
        outputs.append(out)
    on_cpu, on_cuda = (tensors(out) for out in outputs)
    assert_alike(on_cuda, on_cpu)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_a_device_that_is_not_there_is_said_before_any_work() -> None:
    from regraft.errors import UserError

    with pytest.raises(UserError, match="cuda:97"):
        usable_device("cuda:97")
