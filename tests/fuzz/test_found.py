"""What the fuzzer and its making found, each by its name: input that once crashed, hung or took all memory."""

from __future__ import annotations

import json
import math
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fuzz import mutate, seeds
from models import save_model
from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.adapter_config import AdapterConfig
from regraft.checkpoint.card import write_card
from regraft.checkpoint.licences import front_matter, read_licence, strings
from regraft.checkpoint.lineage import InputRecord, Lineage
from regraft.checkpoint.model_class import bounded, model_class
from regraft.checkpoint.paths import inside, parse_ref, shown
from regraft.checkpoint.pickle_file import read_pickle
from regraft.checkpoint.sidecars import copy_sidecars
from regraft.errors import UserError
from regraft.inspect.config_keys import config_differences
from regraft.inspect.facts import look
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return seeds.save_seed(tmp_path / "model")


@contextmanager
def refused(code: str, message: str = "", seconds: float = 10) -> Iterator[None]:
    begun = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        yield
    assert caught.value.code == code
    assert time.process_time() - begun < seconds


def change(folder: Path, name: str, **values: Any) -> Path:
    data = json.loads((folder / name).read_text())
    seeds.write_json(folder / name, {**data, **values})
    return folder


# ---------------------------------------------------------------- paths and references


@pytest.mark.parametrize("name", ["\ud800.safetensors", "k" * 300, "d/" * 600 + "x", "a\0"])
def test_names_that_no_file_system_has(tmp_path: Path, name: str) -> None:
    with refused("RG104"):
        inside(tmp_path, name, where=tmp_path)


@pytest.mark.parametrize("ref", ["~a\0b", "~\ud800/x", "./\ud800/x", "./" + "n" * 300 + "/x", "./\0/x", "\ud800"])
def test_references_that_no_path_can_be(ref: str) -> None:
    with refused("RG101", "no such file"):
        open_checkpoint(ref, offline=True)
    assert parse_ref(ref).model


def test_values_that_cannot_be_printed_are_named_by_their_type() -> None:
    assert shown(mutate.nested(50_000, mappings=False)) == "a very long list"
    assert shown(10**5000) == "a very long int"


# ---------------------------------------------------------------- weights


def test_shards_beside_many_that_are_missing(model: Path) -> None:
    index = seeds.save_shards(model)
    (model / seeds.WEIGHTS).unlink()
    index["weight_map"] |= {f"x{i}": f"{i}.safetensors" for i in range(500)}
    seeds.write_json(model / seeds.INDEX, index)
    with refused("RG102", "500 of 502 files"):
        open_checkpoint(str(model))


@pytest.mark.parametrize("name", ["n" * 1001, "model.layers." + "9" * 5000 + ".w"])
def test_names_of_tensors_have_an_end(model: Path, name: str) -> None:
    save_file({**seeds.tensors(0), name: torch.ones(1)}, model / seeds.WEIGHTS)
    with refused("RG103", "characters"):
        look(str(model))
    (model / seeds.WEIGHTS).unlink()
    torch.save({name: torch.ones(1)}, model / seeds.PICKLE)
    with refused("RG111", "cannot be stored"):
        open_checkpoint(str(model))


def test_scalars_where_embeddings_belong(model: Path, tmp_path: Path) -> None:
    other = seeds.save_seed(tmp_path / "other")
    save_file(
        load_file(model / seeds.WEIGHTS) | {"model.embed_tokens.weight": torch.tensor(1.0)}, model / seeds.WEIGHTS
    )
    assert look(str(model)).architecture.vocabulary is None
    recipe = parse_recipe(f"steps: {{m: {{merge: linear, models: ['{other}', '{model}']}}}}")
    with refused("RG201"):
        make_plan(recipe)


def test_a_header_of_very_many_values_is_not_parsed(tmp_path: Path) -> None:
    header = b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with refused("RG103", "more than 5,000,000 values", seconds=1):
        open_checkpoint(str(tmp_path / "x.safetensors"))


# ---------------------------------------------------------------- pickles


class Call:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    ("function", "args"),
    [(bytearray, (10**11,)), (torch.Tensor, (10**10,)), (torch.FloatTensor, (10**10,)), (set, ([1],))],
    ids=["bytearray", "Tensor", "FloatTensor", "set"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_calls_that_make_objects_of_any_size(
    tmp_path: Path, function: Callable[..., Any], args: tuple[Any, ...], zipped: bool
) -> None:
    torch.save({"w": Call(function, *args)}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with refused("RG107", function.__name__):
        read_pickle(tmp_path / "x.bin")


_PAIRS = b"K\x01" + b"2\x86" * 60  # (1, 1), twice in a pair, which is twice in a pair, ...


@pytest.mark.parametrize(
    "code",
    [
        b"}" + _PAIRS + b"K\x01s.",
        _PAIRS + b"Q.",
        _PAIRS + b")R.",
        b"ccollections\nOrderedDict\n]" + _PAIRS + b"K\x01\x86a\x85R.",
    ],
    ids=["hashed as a key", "printed as a storage", "printed as a function", "hashed by a dict"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_tuples_that_take_years_to_hash_or_print(tmp_path: Path, code: bytes, zipped: bool) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x80\x02" + code)
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + code)
            archive.writestr("archive/version", b"3\n")
    with refused("RG107"):
        read_pickle(path)


@pytest.mark.parametrize("code", [b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02h\x05.", b"\x80\x02(u.", b"\x80\x02\x85."])
def test_pickles_that_take_what_they_never_made(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(code)
    with refused("RG111"):
        read_pickle(tmp_path / "x.bin")


def test_a_pickle_that_announces_more_than_it_has(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x80\x02\x8d" + (2**62).to_bytes(8, "little") + b"x.")
    with refused("RG111"):
        read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_strides_that_repeat_a_few_values_without_end(tmp_path: Path, zipped: bool) -> None:
    tensor = torch.ones(1).expand(10**9, 10**9)
    torch.save({"w": tensor}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with refused("RG111", "larger than the file"):
        read_pickle(tmp_path / "x.bin")


def test_a_tensor_called_metadata_would_break_the_output(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "__metadata__": torch.ones(1)}, tmp_path / "x.bin")
    with refused("RG111", "cannot be stored"):
        read_pickle(tmp_path / "x.bin")


def test_what_training_saves_is_still_read(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimiser.step()
    content = {"epoch": 2**70, "state_dict": layer.state_dict(), "optimizer": optimiser.state_dict(), "flag": None}
    for zipped in (True, False):
        torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        assert list(read_pickle(tmp_path / "x.bin")) == ["weight", "bias"]
    torch.save(dict(layer.named_parameters()), tmp_path / "x.bin")
    assert list(read_pickle(tmp_path / "x.bin")) == ["weight", "bias"]
    assert pickle.dumps(content, protocol=2)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("content", [5, None, 0.5, True, "text", {"a": 1}, [[1], "x", None]])
@pytest.mark.parametrize("key", ["added_tokens", "merges", "vocab"])
def test_tokenizers_with_other_types(model: Path, key: str, content: Any) -> None:
    data = json.loads((model / "tokenizer.json").read_text())
    (data if key == "added_tokens" else data["model"])[key] = content
    seeds.write_json(model / "tokenizer.json", data)
    tokens = look(str(model)).tokenizer
    assert tokens is not None
    assert tokens.hash


def test_wrong_types_in_the_config_of_a_folder_without_weights(model: Path) -> None:
    (model / seeds.WEIGHTS).unlink()
    with refused("RG105", "architectures"):
        look(str(change(model, "config.json", architectures=5)))


def test_a_link_out_of_a_folder_without_weights_is_not_followed(model: Path, tmp_path: Path) -> None:
    (model / seeds.WEIGHTS).unlink()
    (model / "README.md").unlink()
    (tmp_path / "private").write_text("---\nlicense: secret\n---\n")
    (model / "README.md").symlink_to(tmp_path / "private")
    with refused("RG104"):
        look(str(model))


def test_files_whose_names_are_no_text_are_left_out(model: Path) -> None:
    (model / "LICENSE\udcff").write_text("x")
    checkpoint = open_checkpoint(str(model))
    assert "LICENSE\udcff" not in checkpoint.files
    assert any("left out" in remark for remark in checkpoint.remarks)


def test_halves_of_characters_in_json_stay_escapes(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(change(model, "config.json", note="\ud800")))
    out = tmp_path / "out"
    out.mkdir()
    copy_sidecars(out, config_from=checkpoint, tokenizer_from=checkpoint, config_changes={}, dtype="float32")
    assert json.loads((out / "config.json").read_text("utf-8"))["note"] == "\ud800"


@pytest.mark.parametrize("mappings", [True, False])
def test_nested_values_are_compared_in_linear_time(mappings: bool) -> None:
    begun = time.process_time()
    assert config_differences({"x": mutate.nested(90, mappings)}, {"x": 1})
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"num_labels": 10**9}, {"num_labels": float("inf")}, {"hidden_size": []}]
)
def test_counts_that_transformers_would_make_lists_of(change: dict[str, Any]) -> None:
    begun = time.process_time()
    kind = {"model_type": "qwen2"}
    assert config_differences({**seeds.CONFIG, **kind}, {**seeds.CONFIG, **kind, **change})
    assert time.process_time() - begun < 10


def test_what_counts_as_too_many() -> None:
    assert bounded({"num_layers": 100, "vocab_size": 10**9, "depths": [2, 2], "text_config": {"n_layer": 5}, 3: None})
    for config in ({"num_labels": 10**6}, {"a": {"n_layer": 1e9}}, {"depths": [10**9]}, {"layers": math.nan}):
        assert not bounded(config)


@pytest.mark.parametrize("name", ["Trainer", "pipeline", "__name__", "LlamaConfig", "AutoModel", "", "nothing"])
def test_only_classes_of_models_are_taken_from_transformers(name: str) -> None:
    assert model_class(name) is None


def test_classes_of_models_are_found() -> None:
    assert model_class("LlamaForCausalLM").__name__ == "LlamaForCausalLM"


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("alpha", [float("inf"), 1e39, 10**39, 10**40, float("nan"), "4", None, True])
def test_factors_that_are_no_numbers_of_float32(tmp_path: Path, alpha: Any) -> None:
    folder = change(seeds.save_adapter(tmp_path / "adapter"), "adapter_config.json", lora_alpha=alpha)
    with pytest.raises(UserError):
        AdapterConfig(folder).scaling("x.q_proj")


def test_patterns_that_take_years(tmp_path: Path) -> None:
    patterns = {r"(?:(\w)|(.))*\d$": 4}
    folder = change(seeds.save_adapter(tmp_path / "adapter"), "adapter_config.json", rank_pattern=patterns)
    with refused("RG108", "too long to match"):
        AdapterConfig(folder).rank("model.layers.0.self_attn.q_proj")


# ---------------------------------------------------------------- cards


@pytest.mark.parametrize(
    "front",
    [
        'x: "\\UFFFFFFFF"',
        "%YAML 1." + "9" * 5000,
        "- " * 200_000,
        "x: " + "[" * 200_000,
        "x: [" + "1, " * 200_000 + "1]",
        "{a: " * 200_000,
    ],
    ids=["escape", "version", "block", "flow", "long", "mappings"],
)
def test_front_matter_that_ends_loaders(model: Path, front: str) -> None:
    (model / "README.md").write_text(f"---\nlicense: mit\n{front}\n---\n")
    begun = time.process_time()
    assert front_matter(open_checkpoint(str(model)))[0] == {}
    assert time.process_time() - begun < 5


def test_halves_of_characters_in_a_card(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text('---\nlicense: "\\ud800x"\nlanguage: ["\\udfff"]\n---\n')
    checkpoint = open_checkpoint(str(model))
    assert read_licence(checkpoint).ids in ((), ("?x",))  # PyYAML's parser in C refuses such escapes, the other not
    assert strings(["\ud800x", "\udfff"]) == ["?x", "?"]
    record = InputRecord.of(checkpoint, "a", role="model")
    lineage = Lineage(step="s", method="linear", inputs=[record], recipe="\ud800")
    assert "?" in write_card(tmp_path, lineage, [checkpoint], recipe="\ud800").read_text("utf-8")


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('steps: "\\UFFFFFFFF"', "RG306", ""),
        ("%YAML 1." + "9" * 5000 + "\n---\nsteps: 1", "RG306", ""),
        ('steps: {"\\ud800": 1}', "RG306", "half of a character"),
        ('chat_template: "\\ud800"', "RG306", "half of a character"),
        ("models: {a: ./a}\nsteps: {" + "m" * 101 + ": {merge: linear, models: [a]}}", "RG303", "too long"),
        (f"steps: {{m: {{merge: linear, models: [{', '.join(f'./{i}' for i in range(3000))}]}}}}", "RG305", "too many"),
        (f"merge_method: linear\nmodels: [{', '.join(f'{{model: ./{i}}}' for i in range(3000))}]", "RG305", "too many"),
        (
            "models: {a: ./a, b: ./b}\nsteps: {"
            + ", ".join(
                f"m{i}: {{merge: linear, models: [a, b], sweep: {{seed: [{', '.join(map(str, range(900)))}]}}}}"
                for i in range(3)
            )
            + "}",
            "RG303",
            "more than 2,000 steps",
        ),
        (
            "models: {a: ./a, b: ./b}\nsteps: {m: {merge: ties, base: a, models: [b], sweep: {density: [0."
            + "1" * 62
            + "]}}}",
            "RG303",
            "too long for the name",
        ),
        (
            "models: {a: ./a, b: ./b}\nsteps: {m: {merge: ties, base: a, models: [b], sweep: {density: ["
            + ", ".join(str(i / 5000) for i in range(1, 5000))
            + "]}}}",
            "RG303",
            "4,999 members",
        ),
    ],
)
def test_recipes_that_ask_for_too_much(text: str, code: str, message: str) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        parse_recipe(text)
    assert caught.value.code.startswith(code)
    assert time.process_time() - begun < 20


def test_characters_in_two_halves_are_one() -> None:
    recipe = parse_recipe('models: {a: "./\\ud83d\\ude00"}\nsteps: {m: {merge: passthrough, models: [a]}}')
    assert recipe.models["a"] == "./\U0001f600"


@pytest.mark.parametrize(
    "text",
    [
        "context length" + " " * 10**6,
        "sequence" + " " * 10**6 + "length",
        "context size " + "*|" * 5 * 10**5,
        "1," * 5 * 10**5,
        "7" + " " * 10**6,
        "9" * 10**6,
    ],
)
def test_cards_are_searched_in_a_time_that_grows_with_their_length(tmp_path: Path, text: str) -> None:
    folder = save_model(tmp_path / "model", "llama")
    (folder / "README.md").write_text(f"# A model\n\n{text} x", encoding="utf-8")
    begun = time.process_time()
    look(str(folder))
    assert time.process_time() - begun < 20


def test_an_adapter_on_a_model_whose_vocabulary_has_no_size(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": {"a": 1}}))
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"}))
    settings = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    with suppress(UserError):
        open_checkpoint(f"{base}+{tmp_path / 'adapter'}")
