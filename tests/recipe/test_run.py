"""Whole recipes: plans, artefacts that are not made twice, outputs, and every obstacle as one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from models import save_fine_tune, save_model
from regraft.checkpoint.lineage import Lineage
from regraft.errors import UserError
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
from regraft.recipe.run import merge, run
from regraft.recipe.settings import Settings

THREE = "models: {base: ./base, a: ./a, b: ./b}\n"


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llamas")
    base = save_model(folder / "base", "llama", num_hidden_layers=4)
    save_fine_tune(folder / "a", base, 1)
    save_fine_tune(folder / "b", base, 2)
    return folder


def recipe(folder: Path, text: str) -> Any:
    return parse_recipe(text, path=folder / "recipe.yaml")


class Messages:
    """Collects what a run tells."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.lines: list[str] = []
        self.progress: list[tuple[int, int]] = []

    def step(self, name: str) -> None:
        self.steps.append(name)

    def advance(self, done: int, total: int) -> None:
        self.progress.append((done, total))

    def message(self, text: str) -> None:
        self.lines.append(text)


STEPS = (
    THREE
    + """steps:
  soup: {merge: linear, models: [a, b]}
  swept: {merge: task_arithmetic, base: base, models: [a, b], sweep: {lambda: [0.3, 0.6]}}
  both: {merge: slerp, models: [soup, "swept@lambda=0.6"], t: 0.25}
"""
)


def test_a_second_run_does_nothing_and_a_changed_option_redoes_what_depends_on_it(llamas: Path, tmp_path: Path) -> None:
    first = run(recipe(llamas, STEPS), tmp_path / "out")
    assert list(first.artefacts) == ["soup", "swept@lambda=0.3", "swept@lambda=0.6", "both"]
    for name, folder in first.artefacts.items():
        assert (tmp_path / "out" / name).resolve() == folder.resolve()
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "artefacts").rglob("*.safetensors")}
    told = Messages()
    again = run(recipe(llamas, STEPS), tmp_path / "out", progress=told)
    assert again.artefacts == first.artefacts
    assert [line for line in told.lines if "done before" in line] == [f"{n}: done before" for n in first.artefacts]
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "artefacts").rglob("*.safetensors")}
    changed = run(recipe(llamas, STEPS.replace("0.6]", "0.7]").replace("=0.6", "=0.7")), tmp_path / "out")
    same = {n for n, f in changed.artefacts.items() if first.artefacts.get(n) == f}
    assert same == {"soup", "swept@lambda=0.3"}


def test_float64_asks_for_arithmetic_in_it(llamas: Path, tmp_path: Path) -> None:
    step = "steps:\n  sum: {merge: linear, models: {base: {weight: 0.7}, a: {weight: -0.4}, b: {weight: 0.3}},"
    step += " normalize: false, out_dtype: float32"
    exact = load_file(merge(recipe(llamas, THREE + step + ", dtype: float64}\n"), tmp_path / "x") / "model.safetensors")
    plain = load_file(merge(recipe(llamas, THREE + step + "}\n"), tmp_path / "y") / "model.safetensors")
    base, a, b = (load_file(llamas / n / "model.safetensors") for n in ("base", "a", "b"))
    for name, found in exact.items():
        expected = 0.7 * base[name].double() - 0.4 * a[name].double() + 0.3 * b[name].double()
        assert torch.equal(found, expected.float()), name
    assert any(not torch.equal(plain[name], exact[name]) for name in exact)


def test_a_damaged_artefact_is_made_again(llamas: Path, tmp_path: Path) -> None:
    text = THREE + "steps:\n  soup: {merge: linear, models: [a, b]}\n"
    folder = run(recipe(llamas, text), tmp_path / "out").artefacts["soup"]
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    run(recipe(llamas, text), tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == whole


def test_merging_a_merge_equals_merging_by_hand(llamas: Path, tmp_path: Path) -> None:
    out = merge(
        recipe(
            llamas,
            THREE + "steps:\n  soup: {merge: linear, models: [a, b]}\n"
            "  end: {merge: linear, models: {soup: {weight: 2}, base: {weight: 1}}}\n",
        ),
        tmp_path / "out",
    )
    a, b, base, found = (load_file(p / "model.safetensors") for p in (llamas / "a", llamas / "b", llamas / "base", out))
    for name in found:
        expected = (a[name].double() + b[name].double() + base[name].double()) / 3
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out.steps" / "artefacts").is_dir()
    assert Lineage.read(out).inputs[0].name == "soup"
    changed = recipe(
        llamas,
        THREE + "steps:\n  soup: {merge: linear, models: [a, b]}\n  end: {merge: linear, models: [soup, base]}\n",
    )
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="not empty") as error:
        merge(changed, out)
    assert error.value.code == "RG401"
    assert (out / "model.safetensors").read_bytes() == before
    merge(changed, out, Settings(force=True))
    assert (out / "model.safetensors").read_bytes() != before


def test_merge_is_up_to_date_until_something_changes(llamas: Path, tmp_path: Path) -> None:
    text = THREE + "steps:\n  soup: {merge: linear, models: [a, b]}\n"
    out = merge(recipe(llamas, text), tmp_path / "out")
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    told = Messages()
    merge(recipe(llamas, text), out, progress=told)
    assert any("up to date" in line for line in told.lines)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    other = recipe(llamas, text.replace("[a, b]", "[a, base]"))
    with pytest.raises(UserError, match=r"not empty.*--force") as error:
        merge(other, out)
    assert error.value.code == "RG401"
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    merge(other, out, Settings(force=True))
    assert (out / "model.safetensors").stat().st_mtime_ns != stamp


def test_lineage_and_card_say_what_was_done(llamas: Path, tmp_path: Path) -> None:
    text = THREE + "steps:\n  t: {merge: ties, base: base, models: [a, b], density: 0.5, weight: [0.2, 0.8]}\n"
    out = merge(recipe(llamas, text), tmp_path / "out")
    lineage = Lineage.read(out)
    assert [(i.name, i.role) for i in lineage.inputs] == [("base", "base"), ("a", "model"), ("b", "model")]
    assert lineage.method == "ties"
    assert lineage.recipe == text
    assert sum(group.count for group in lineage.options) == lineage.output.tensors
    assert lineage.diagnostics["models"] == ["a", "b"]
    assert abs(lineage.diagnostics["cosine"][0][1]) < 0.1
    assert 0.3 < lineage.diagnostics["sign_conflict"] < 0.6
    assert len(lineage.diagnostics["layers"]) == 4
    assert lineage.diagnostics["independence"].startswith("task vectors are nearly independent: the largest cosine is")
    card = (out / "README.md").read_text()
    assert "ties" in card
    assert str(tmp_path) not in card + (out / "regraft.json").read_text()


def test_weights_follow_a_gradient_over_depth(llamas: Path, tmp_path: Path) -> None:
    text = THREE + "steps:\n  g: {merge: task_arithmetic, base: base, models: {a: {weight: [0, 1]}}}\n"
    plan = make_plan(recipe(llamas, text)).merges[0]
    found = {job.info.name: job.options.weight[0] for job in plan.jobs}
    assert found["model.embed_tokens.weight"] == 0
    assert found["lm_head.weight"] == found["model.norm.weight"] == 1
    assert [found[f"model.layers.{i}.input_layernorm.weight"] for i in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    theirs = (
        "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n- {model: ./a, parameters: {weight: [0, 1]}}\n"
    )
    plan = make_plan(recipe(llamas, theirs)).merges[0]
    found = {job.info.name: job.options.weight[0] for job in plan.jobs}
    assert found["lm_head.weight"] == found["model.norm.weight"] == 0


def test_one_recipe_two_dialects_two_defaults(llamas: Path) -> None:
    ours = make_plan(recipe(llamas, THREE + "steps:\n  t: {merge: ties, base: base, models: [a, b]}\n")).merges[0]
    assert (ours.jobs[0].options.density, ours.jobs[0].options.trim_scope) == ((0.2, 0.2), "model")
    theirs = (
        "merge_method: ties\nbase_model: ./base\nmodels:\n- model: ./base\n- {model: ./a, parameters: {weight: 1}}\n"
        "- {model: ./b, parameters: {weight: 0.5}}\n"
    )
    plan = make_plan(recipe(llamas, theirs)).merges[0]
    options = plan.jobs[0].options
    assert (options.density, options.trim_scope, options.weight) == ((1.0, 1.0), "tensor", (1.0, 0.5))


def test_layers_are_stacked_by_slices(llamas: Path, tmp_path: Path) -> None:
    text = (
        THREE + "steps:\n  tall:\n    merge: passthrough\n    slices:\n"
        "    - {models: [{model: a, layers: [0, 3]}]}\n    - {models: [{model: b, layers: [1, 4]}]}\n"
    )
    out = merge(recipe(llamas, text), tmp_path / "out")
    a, b, found = (load_file(p / "model.safetensors") for p in (llamas / "a", llamas / "b", out))
    for layer, (source, index) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for name in (n for n in a if n.startswith("model.layers.0.")):
            rest = name.removeprefix("model.layers.0.")
            assert torch.equal(found[f"model.layers.{layer}.{rest}"], source[f"model.layers.{index}.{rest}"])
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], b["lm_head.weight"])
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 6
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, pad_token_id=0).shape == (1, 4)


def test_integer_buffers_and_excluded_tensors_come_from_the_base(llamas: Path, tmp_path: Path) -> None:
    for name, value in (("base", 1), ("a", 2), ("b", 3)):
        shutil.copytree(llamas / name, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        save_file(tensors | {"counter": torch.tensor([value])}, tmp_path / name / "model.safetensors", {"format": "pt"})
    text = THREE + 'steps:\n  x: {merge: task_arithmetic, base: base, models: [a, b], exclude: ["^lm_head", "norm"]}\n'
    out = merge(recipe(tmp_path, text), tmp_path / "out")
    base, found = (load_file(p / "model.safetensors") for p in (tmp_path / "base", out))
    assert found["counter"].item() == 1
    for name in found:
        kept = name.startswith("lm_head") or "norm" in name or name == "counter"
        assert torch.equal(found[name], base[name]) == kept


def test_tied_weights_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    save_fine_tune(tmp_path / "a", base, 1)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    text = "models: {base: ./base, a: ./a}\nsteps:\n  x: {merge: linear, models: [a, base]}\n"
    out = merge(recipe(tmp_path, text), tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"ties lm_head.weight to model.embed_tokens.weight, but stores different"
    ) as error:
        make_plan(recipe(tmp_path, text))
    assert error.value.code == "RG209"


def test_the_plan_says_what_a_run_would_cost(llamas: Path) -> None:
    plan = make_plan(recipe(llamas, STEPS))
    facts = plan.to_dict()
    json.dumps(facts)
    size = (llamas / "a" / "model.safetensors").stat().st_size
    assert abs(facts["steps"][0]["bytes_written"] - size) < 2000
    assert facts["disk_bytes"] == sum(s["bytes_written"] for s in facts["steps"])
    assert facts["steps"][0]["values"][0]["options"] == {"weight": [1.0, 1.0], "normalize": True}
    assert facts["memory_bytes"] > 0
    assert facts["seconds_estimated"] >= 0


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def spoil(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, :3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


OBSTACLES: dict[str, tuple[Any, str, str, str]] = {
    "a tensor is missing": (
        lambda f: drop(f / "b", "model.layers.1.mlp.up_proj.weight"),
        "merge: linear, models: [a, b]",
        "RG202",
        r"b has no tensor model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "a tensor too many": (
        lambda f: drop(f / "a", "model.layers.1.mlp.up_proj.weight"),
        "merge: linear, models: [a, b]",
        "RG202",
        r"b has a tensor model\.layers\.1\.mlp\.up_proj\.weight that a lacks",
    ),
    "another width": (
        lambda f: save_model(f / "b", "llama", num_hidden_layers=4, intermediate_size=48),
        "merge: linear, models: [a, b], config_from: a",
        "RG201",
        r"shape \[.*\] in b and \[",
    ),
    "another vocabulary": (
        lambda f: save_model(f / "b", "llama", num_hidden_layers=4, vocab_size=100),
        "merge: linear, models: [a, b], config_from: a",
        "RG204",
        r"vocabularies differ: .*\[100, 32\] in b and \[96, 32\]",
    ),
    "another architecture": (
        lambda f: save_model(f / "b", "gpt2"),
        "merge: linear, models: [a, b]",
        "RG203",
        "a is of type llama and b of type gpt2",
    ),
    "another depth": (
        lambda f: save_model(f / "b", "llama", num_hidden_layers=3),
        "merge: linear, models: [a, b]",
        "RG203",
        "a has 4 layers and b has 3 layers",
    ),
    "another configuration": (
        lambda f: change_config(f / "b", rms_norm_eps=1e-3),
        "merge: linear, models: [a, b]",
        "RG207",
        "rms_norm_eps is .* in a and 0.001 in b",
    ),
    "an unrelated base": (
        lambda f: save_model(f / "base", "llama", seed=99, num_hidden_layers=4),
        "merge: ties, base: base, models: [a, b]",
        "RG205",
        "a does not look like a fine-tune of base",
    ),
    "a head that is tied in one only": (
        lambda f: (drop(f / "b", "lm_head.weight"), change_config(f / "b", tie_word_embeddings=True)),
        "merge: linear, models: [a, b], config_from: a",
        "RG209",
        r"b has no lm_head\.weight: it is tied",
    ),
    "values that are not finite": (
        lambda f: spoil(f / "b"),
        "merge: linear, models: [a, b]",
        "RG206",
        r"lm_head\.weight holds 3 NaN and 0 infinite of 3072 values \(b\)",
    ),
    "a pattern that selects nothing": (
        lambda f: None,
        "merge: linear, models: [a, b], exclude: [clasifier]",
        "RG308",
        "exclude 'clasifier' selects no tensor",
    ),
    "a broken pattern": (
        lambda f: None,
        'merge: linear, models: [a, b], exclude: ["("]',
        "RG303",
        "no regular expression",
    ),
    "a filter that selects nothing": (
        lambda f: None,
        "merge: linear, models: {a: {weight: [{filter: c_attn, value: 1}, {value: 2}]}, b: {weight: 1}}",
        "RG308",
        "'c_attn' selects no tensor",
    ),
    "an unknown dtype": (lambda f: None, "merge: linear, models: [a, b], out_dtype: float12", "RG303", "float12"),
    "a missing model": (
        lambda f: shutil.rmtree(f / "b"),
        "merge: linear, models: [a, b]",
        "RG101",
        "no such file or folder",
    ),
    "a missing base": (lambda f: None, "merge: ties, models: [a, b]", "RG304", "base"),
    "layers that do not exist": (
        lambda f: None,
        "merge: passthrough, slices: [{models: [{model: a, layers: [2, 7]}]}]",
        "RG303",
        "layers 2 to 7 of a, which has layers 0 to 4",
    ),
    "too many swapped layers": (
        lambda f: None,
        "merge: layer_swap, models: [a, b], bottom: 3, top: 2",
        "RG303",
        "are more than the 4 layers",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacles_are_one_sentence_and_nothing_is_written(obstacle: str, llamas: Path, tmp_path: Path) -> None:
    prepare, body, code, message = OBSTACLES[obstacle]
    for name in ("base", "a", "b"):
        shutil.copytree(llamas / name, tmp_path / name)
    prepare(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        merge(recipe(tmp_path, THREE + f"steps:\n  x: {{{body}}}\n"), tmp_path / "out")
    assert error.value.code == code
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_force_and_allow_nan_go_on(llamas: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        shutil.copytree(llamas / name, tmp_path / name)
    spoil(tmp_path / "b")
    save_model(tmp_path / "base", "llama", seed=99, num_hidden_layers=4)
    text = THREE + "steps:\n  x: {merge: task_arithmetic, base: base, models: [a, b]}\n"
    out = merge(recipe(tmp_path, text), tmp_path / "out", Settings(force=True, allow_nan=True))
    assert any("not finite" in w for w in Lineage.read(out).warnings)
    assert load_file(out / "model.safetensors")["lm_head.weight"].isnan().sum() == 3


def test_conflicting_licences_must_be_accepted(llamas: Path, tmp_path: Path) -> None:
    for name, licence in (("base", "mit"), ("a", "cc-by-nc-4.0"), ("b", "gpl-3.0")):
        shutil.copytree(llamas / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    made = recipe(tmp_path, THREE + "steps:\n  x: {merge: linear, models: [a, b]}\n")
    with pytest.raises(UserError, match=r"licences of the inputs do not agree.*--accept-licenses") as error:
        merge(made, tmp_path / "out")
    assert error.value.code == "RG404"
    merge(made, tmp_path / "out", Settings(accept_licenses=True))


def test_the_output_may_not_be_an_input(llamas: Path) -> None:
    made = recipe(llamas, THREE + "steps:\n  x: {merge: linear, models: [a, b]}\n")
    with pytest.raises(UserError, match="the output is the folder of a") as error:
        merge(made, llamas / "a", Settings(force=True))
    assert error.value.code == "RG401"


def test_memory_limits_are_checked_before_work(llamas: Path, tmp_path: Path) -> None:
    made = recipe(llamas, THREE + "steps:\n  x: {merge: ties, base: base, models: [a, b]}\n")
    with pytest.raises(UserError, match="--max-memory") as error:
        merge(made, tmp_path / "out", Settings(max_memory=1000))
    assert error.value.code == "RG403"


def test_merge_makes_one_model(llamas: Path, tmp_path: Path) -> None:
    two = recipe(llamas, THREE + "steps:\n  x: {merge: linear, models: [a, b]}\n  y: {merge: slerp, models: [a, b]}\n")
    with pytest.raises(UserError, match=r"makes 2 final models \(x, y\).*regraft run") as error:
        merge(two, tmp_path / "out")
    assert error.value.code == "RG309"


def save_tokenizer(folder: Path, words: str) -> None:
    from tokenizers import Tokenizer, models

    words_to_ids = {word: i for i, word in enumerate(words.split())}
    fast = Tokenizer(models.WordLevel(words_to_ids, unk_token="a"))
    hf.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="a").save_pretrained(folder)


def test_tokenizers_must_agree_or_be_chosen(llamas: Path, tmp_path: Path) -> None:
    for name, words in (("base", "a b c"), ("a", "a b c"), ("b", "a c b")):
        shutil.copytree(llamas / name, tmp_path / name)
        save_tokenizer(tmp_path / name, words)
    body = "merge: linear, models: [a, b]"
    with pytest.raises(UserError, match=r"different tokenizers.*tokenizer_from") as error:
        make_plan(recipe(tmp_path, THREE + f"steps:\n  x: {{{body}}}\n"))
    assert error.value.code == "RG204"
    chosen = recipe(tmp_path, THREE + f"steps:\n  x: {{{body}, tokenizer_from: b}}\n")
    out = merge(chosen, tmp_path / "out")
    assert hf.AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("c") == 1
    assert any("different tokenizers" in w for w in Lineage.read(out).warnings)
    make_plan(recipe(tmp_path, THREE + "steps:\n  x: {merge: linear, models: [base, a]}\n"))
    make_plan(recipe(tmp_path, THREE + f"steps:\n  x: {{{body}, exclude: [embed_tokens]}}\n"))


@pytest.mark.parametrize("rule", ["ties", "dare_ties", "pcb", "model_stock"])
def test_files_are_the_same_for_any_workers_and_chunks(rule: str, llamas: Path, tmp_path: Path) -> None:
    made = recipe(llamas, THREE + f"steps:\n  x: {{merge: {rule}, base: base, models: [a, b]}}\n")
    outputs = []
    for i, settings in enumerate(
        (Settings(workers=1), Settings(workers=3, chunk=1), Settings(workers=2, chunk=1 << 20))
    ):
        outputs.append((merge(made, tmp_path / str(i), settings) / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_key_of_data_covers_the_images_beside_it(tmp_path: Path) -> None:
    from regraft.recipe.making import data_key

    (tmp_path / "pictures").mkdir()
    data, picture = tmp_path / "test.jsonl", tmp_path / "pictures" / "a.png"
    data.write_text('{"image": "pictures/a.png", "label": 0}\n')
    picture.write_bytes(b"1")
    first = data_key(data)
    picture.write_bytes(b"22")
    second = data_key(data)
    data.write_text('{"image": "pictures/a.png", "label": 1}\n')
    assert len({str(k) for k in (first, second, data_key(data))}) == 3


def test_scores_join_the_lineage_and_the_card(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "vit")
    save_fine_tune(tmp_path / "a", base, 1)
    rows = [{"pixel_values": torch.rand(8, 8).tolist(), "label": i % 10} for i in range(20)]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    text = (
        "models: {base: ./base, a: ./a}\n"
        "steps:\n  x: {merge: linear, models: [base, a]}\n  y: {merge: linear, models: [x, a]}\n"
        "  look: {evaluate: accuracy, models: [base, x], data: test.jsonl}\n"
    )
    made = recipe(tmp_path, text)
    first = run(made, tmp_path / "out")
    score = Lineage.read(first.artefacts["x"]).scores[0]
    assert (score.metric, score.data, list(score.before)) == ("accuracy", "test.jsonl", ["base"])
    assert score.after == first.evaluations[1].score["value"]
    assert "accuracy" in (first.artefacts["x"] / "README.md").read_text()
    assert Lineage.read(first.artefacts["y"]).scores == []
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "artefacts").rglob("*") if p.is_file()}
    told = Messages()
    assert run(made, tmp_path / "out", progress=told).artefacts == first.artefacts
    assert [line for line in told.lines if "done before" in line] == ["x: done before", "y: done before"]
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}  # scores.json is outside


def test_the_documents_of_a_mergekit_file_are_made_one_from_another(llamas: Path, tmp_path: Path) -> None:
    text = """merge_method: slerp
base_model: ./base
models: [{model: ./base}, {model: experts}]
parameters: {t: 1.0}
---
name: experts
merge_method: linear
models: [{model: ./a, parameters: {weight: 1}}, {model: ./b, parameters: {weight: 1}}]
"""
    out = merge(recipe(llamas, text), tmp_path / "out")
    merged, a, b = (load_file(folder / "model.safetensors") for folder in (out, llamas / "a", llamas / "b"))
    for name, value in merged.items():
        assert torch.allclose(value, (a[name] + b[name]) / 2, atol=1e-7), name
    assert [p.name.partition("-")[0] for p in (tmp_path / "out.steps" / "artefacts").iterdir()] == ["experts"]
