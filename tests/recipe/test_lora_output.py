"""`output: lora`: adapters of one base merged into one, against the merge of the whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fuzz.kills import differences
from models import save_adapter, save_fine_tune, save_model
from regraft.adapters.merged import Combination
from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.lineage import Lineage
from regraft.errors import UserError, UserWarningMessage
from regraft.recipe import parse_recipe
from regraft.recipe.run import merge, run, with_output
from regraft.recipe.settings import Settings

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]},
    "stable": {
        "r": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5},
    },
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj"]},
    "saved": {"r": 4, "target_modules": ["down_proj"], "modules_to_save": ["lm_head", "norm"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters of it; `shared` has the A of `plain`."""
    folder = tmp_path_factory.mktemp("family")
    base = save_model(folder / "base", "llama")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        save_adapter(folder / name, base, seed, **config)
    save_adapter(folder / "shared", base, 0, **ADAPTERS["plain"])
    tensors = load_file(folder / "shared" / "adapter_model.safetensors")
    changed = {name: value if "lora_A" in name else 0.1 - 2 * value for name, value in tensors.items()}
    save_file(changed, folder / "shared" / "adapter_model.safetensors")
    save_fine_tune(folder / "tuned", base, 1)
    save_model(folder / "other", "llama")
    save_adapter(folder / "gpt", save_model(folder / "gpt2", "gpt2"), 5, r=3, target_modules=["c_attn", "wte"])
    save_adapter(folder / "gpt-b", folder / "gpt2", 6, r=2, target_modules=["c_attn", "c_fc"])
    return folder


@pytest.fixture
def made(family: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """The adapter of a step, and the model that it makes without `output: lora`."""

    def make(models: str, rest: str, base: str = "base") -> tuple[Path, Path]:
        named = ", ".join(f"{name}: {family}/{base}+{family}/{name}" for name in models.split())
        head = f"models: {{base: {family}/{base}, {named}}}\n"
        step = rest if "models:" in rest else f"models: [{', '.join(models.split())}], {rest}"
        for name, more in (("lora", ", output: lora"), ("whole", "")):
            cut = "" if more else "no cut"
            body = step if not cut else ", ".join(p for p in step.split(", ") if not p.startswith(("rank", "energy")))
            recipe = parse_recipe(f"{head}steps: {{x: {{{body}{more}}}}}")
            merge(recipe, tmp_path / name, Settings(force=True))
        return tmp_path / "lora", tmp_path / "whole"

    return make


def check(base: Path, lora: Path, whole: Path) -> None:
    """Both give the same model, by regraft and by PEFT."""
    applied = open_checkpoint(f"{base}+{lora}")
    for name, value in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(applied.source(name).read(), value.flatten(), rtol=1e-5, atol=1e-5)
    ids = torch.arange(3, 20).unsqueeze(0)
    adapted = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), lora).eval()
    expected = hf.AutoModelForCausalLM.from_pretrained(whole).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rest",
    [
        "merge: task_arithmetic, base: base, models: {plain: {weight: 0.7}, stable: {weight: -0.4}}",
        "merge: task_arithmetic, base: base, models: {plain: , stable: {weight: 3}}, normalize: true, lambda: 0.5",
        "merge: task_arithmetic, base: base, weight: [0.2, 0.8]",  # a gradient over the layers
        "merge: linear, models: {plain: {weight: 1}, stable: {weight: 3}}",
        "merge: linear, models: {plain: {weight: 1.5}, stable: {weight: -0.5}}, normalize: false",
    ],
)
def test_sums_are_exact(made: Callable[..., Any], family: Path, rest: str) -> None:
    lora, whole = made("plain stable", rest)
    check(family / "base", lora, whole)
    figures = Lineage.read(lora).diagnostics
    assert figures["relative_error"] < 1e-6
    ranks = {one["name"].split(".")[-2]: one["rank"] for one in figures["tensors"]}
    assert ranks == {"q_proj": 12, "up_proj": 4, "v_proj": 2}
    config = json.loads((lora / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["use_rslora"] is False


def test_adapters_that_share_their_a_keep_their_rank(made: Callable[..., Any], family: Path) -> None:
    lora, whole = made("plain shared", "merge: task_arithmetic, base: base, weight: 0.5")
    check(family / "base", lora, whole)
    assert {one["rank"] for one in Lineage.read(lora).diagnostics["tensors"]} == {4}


def test_transposed_layers_and_embeddings(made: Callable[..., Any], family: Path) -> None:
    lora, _ = made("gpt gpt-b", "merge: linear", base="gpt2")
    kinds = {one["name"]: one["rank"] for one in Lineage.read(lora).diagnostics["tensors"]}
    assert kinds["transformer.h.0.attn.c_attn.weight"] == 5


def test_modules_that_were_saved_whole_are_merged_whole(made: Callable[..., Any], family: Path) -> None:
    lora, whole = made("plain saved", "merge: task_arithmetic, base: base, weight: 0.7")
    check(family / "base", lora, whole)
    saved = {one["name"] for one in Lineage.read(lora).diagnostics["tensors"] if one["kind"] == "saved"}
    # PEFT takes "norm" for the end of all norms' names.
    norms = {f"model.layers.{i}.{kind}_layernorm.weight" for i in (0, 1) for kind in ("input", "post_attention")}
    assert saved == {"lm_head.weight", "model.norm.weight", *norms}


def test_other_rules_are_cut_off_and_the_error_told(made: Callable[..., Any], family: Path) -> None:
    rest = "merge: ties, base: base, density: 0.4, trim_scope: tensor"
    lora, whole = made("plain stable", f"{rest}, rank: 32")
    check(family / "base", lora, whole)
    base = load_file(family / "base" / "model.safetensors")
    exact = load_file(whole / "model.safetensors")
    small, _ = made("plain stable", f"{rest}, rank: 3")
    applied = open_checkpoint(f"{family}/base+{small}")
    for one in Lineage.read(small).diagnostics["tensors"]:
        name = one["name"]
        delta = exact[name] - base[name]
        error = (exact[name].flatten() - applied.source(name).read()).norm() / delta.norm()
        assert one["rank"] == 3
        assert one["error"] == pytest.approx(float(error), rel=1e-3)
        assert one["error"] > 0.01


def test_an_exact_sum_can_be_made_smaller(made: Callable[..., Any], family: Path) -> None:
    lora, whole = made("plain stable", "merge: linear, energy: 0.9")
    base, exact = (load_file(p / "model.safetensors") for p in (family / "base", whole))
    applied = open_checkpoint(f"{family}/base+{lora}")
    for one in Lineage.read(lora).diagnostics["tensors"]:
        error = (exact[one["name"]].flatten() - applied.source(one["name"]).read()).norm()
        assert one["error"] == pytest.approx(float(error / (exact[one["name"]] - base[one["name"]]).norm()), abs=1e-4)
        assert one["energy"] >= 0.9 - 1e-6


def test_dora_needs_a_rank(made: Callable[..., Any], family: Path) -> None:
    with pytest.raises(UserError, match=r"the merged change of model.layers.0.self_attn.q_proj.weight and 1 more"):
        made("plain dora", "merge: linear")
    lora, whole = made("plain dora", "merge: linear, rank: 32")
    check(family / "base", lora, whole)


@pytest.mark.parametrize(
    ("models", "rest", "sentence"),
    [
        ("plain: P, tuned: T", "merge: linear, models: [plain, tuned]", "tuned is a whole model"),
        ("plain: P, gpt: G", "merge: linear, models: [plain, gpt]", "are of different bases|architecture|type"),
        ("plain: P, far: O", "merge: linear, models: [plain, far]", "far and plain are adapters of different bases"),
        ("base: O2, plain: P", "merge: task_arithmetic, base: base, models: [plain]", "base is not the base"),
        ("base: B, plain: P, s: S", "merge: ties, base: base, models: [plain, s]", "add trim_scope: tensor"),
        ("base: B, plain: P, s: S", "merge: consensus_ties, base: base, models: [plain, s]", "at once.*leave out"),
        (
            "base: B, plain: P, s: S",
            "merge: ties, base: base, models: [plain, s], trim_scope: tensor",
            "is no sum of the adapters' factors.*give rank or energy",
        ),
        ("plain: P, s: S", "merge: slerp, models: [plain, s], t: 0.5", "slerp changes the base itself"),
        ("plain: P, s: S", "merge: linear, models: [plain, s], normalize: false", "weights that do not add up to 1"),
        ("plain: P", "merge: passthrough, slices: [{models: [{model: plain, layers: [0, 1]}]}]", "slices make another"),
        (
            "plain: P, s: S",
            "merge: linear, models: [plain, s], tokenizer: union",
            "another vocabulary makes another base",
        ),
    ],
)
def test_what_makes_no_adapter(family: Path, tmp_path: Path, models: str, rest: str, sentence: str) -> None:
    refs = {"O2": "other", "P": "base+plain", "S": "base+stable", "T": "tuned", "G": "gpt2+gpt", "O": "other+plain"}
    refs["B"] = "base"
    for short, ref in sorted(refs.items(), reverse=True):
        full = "+".join(f"{family}/{part}" for part in ref.split("+"))
        models = ", ".join(f"{p.split(': ')[0]}: {full}" if p.endswith(f": {short}") else p for p in models.split(", "))
    text = f"models: {{{models}}}\nsteps: {{x: {{{rest}, output: lora}}}}"
    with pytest.raises(UserError, match=sentence):
        merge(parse_recipe(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("output: laro", "output is 'laro' .*: did you mean 'lora'"),
        ("rank: 4", "rank is for adapters"),
        ("output: lora, rank: 0", "rank is 0 .*: give a whole number"),
        ("output: lora, rank: 4, energy: 0.5", "both rank and energy"),
        ("output: lora, energy: a lot", "energy is 'a lot'"),
    ],
)
def test_what_the_recipe_says_of_the_output_is_checked(more: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse_recipe(f"steps: {{x: {{merge: linear, models: [./a, ./b], {more}}}}}")
    assert caught.value.code == "RG303"
    assert "step x" in str(caught.value)


def test_the_command_line_decides_over_the_recipe(family: Path, tmp_path: Path) -> None:
    text = f"models: {{a: {family}/base+{family}/plain}}\nsteps: {{x: {{merge: linear, models: [a]}}}}"
    recipe = with_output(parse_recipe(text), "lora", None, None, None)
    merge(recipe, tmp_path / "out")
    check(family / "base", tmp_path / "out", merge(parse_recipe(text), tmp_path / "whole"))
    before = (tmp_path / "out" / "regraft.json").stat().st_mtime_ns
    merge(recipe, tmp_path / "out")  # up to date
    assert (tmp_path / "out" / "regraft.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is not empty"):
        merge(with_output(parse_recipe(text), "lora", 2, None, None), tmp_path / "out")
    with pytest.raises(UserError, match="--rank and --energy are for adapters"):
        with_output(parse_recipe(text), None, 2, None, None)
    with pytest.raises(UserError, match="did you mean 'model'"):
        with_output(parse_recipe(text), "modle", None, None, None)


def test_a_later_step_merges_the_adapter(family: Path, tmp_path: Path) -> None:
    text = (
        f"models: {{base: {family}/base, a: {family}/base+{family}/plain, b: {family}/base+{family}/stable}}\n"
        "steps:\n"
        "  both: {merge: linear, models: [a, b], output: lora}\n"
        "  again: {merge: task_arithmetic, base: base, models: [both], lambda: 2}\n"
        "  at_once: {merge: task_arithmetic, base: base, models: [a, b]}\n"
    )
    found = run(parse_recipe(text), tmp_path / "out").artefacts
    one, other = (load_file(found[name] / "model.safetensors") for name in ("again", "at_once"))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5)
    run(parse_recipe(text), tmp_path / "out")
    measured = text + "  score: {evaluate: perplexity, models: [both], data: x.jsonl}\n"
    with pytest.raises(UserError, match="both is an adapter") as caught:
        run(parse_recipe(measured), tmp_path / "out")
    assert caught.value.code == "RG602"


def test_a_merge_that_was_stopped_goes_on(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        f"models: {{base: {family}/base, a: {family}/base+{family}/plain, b: {family}/base+{family}/stable}}\n"
        "steps: {x: {merge: ties, base: base, models: [a, b], trim_scope: tensor, output: lora, rank: 4}}"
    )
    (tmp_path / "whole").mkdir()
    whole = merge(parse_recipe(text), tmp_path / "whole" / "out")
    factors, calls = Combination._factors, []

    def watched(self: Combination, parameter: Any) -> Any:
        found = factors(self, parameter)
        calls.append(parameter.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Combination, "_factors", watched)
    with pytest.raises(KeyboardInterrupt, match=r"2 of .* parts of the work are kept in .*the same command goes on"):
        merge(parse_recipe(text), tmp_path / "out")
    first = calls[:2]
    with pytest.warns(UserWarningMessage, match=r"2 of .* parts of the work are there from a run that did not end"):
        merge(parse_recipe(text), tmp_path / "out")
    assert not set(calls[3:]) & set(first)
    assert differences(tmp_path / "out", whole) == []
