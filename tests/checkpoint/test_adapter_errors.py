"""Adapters that cannot be applied: each is refused with a sentence, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from regraft.checkpoint.adapter import apply
from regraft.checkpoint.model import Checkpoint, open_checkpoint, open_local
from regraft.errors import UserError

PREFIX = "base_model.model."
Q = f"{PREFIX}model.layers.0.self_attn.q_proj."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_model(tmp_path_factory.mktemp("base"), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = models.model("llama", tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = "org/its-base"
    wrapped.save_pretrained(folder)
    return folder


State = dict[str, torch.Tensor]


@pytest.fixture
def refused(base: Path, made: Path, tmp_path: Path) -> Callable[..., UserError]:
    """Apply a changed copy of the adapter; returns the error."""

    def run(
        config: dict[str, Any] | None = None,
        weights: Callable[[State], Any] | None = None,
        onto: Checkpoint | None = None,
        code: str = "RG108",
    ) -> UserError:
        settings = json.loads((made / "adapter_config.json").read_text()) | (config or {})
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        state = load_file(made / "adapter_model.safetensors")
        if weights is not None:
            weights(state)
        save_file(state, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError) as caught:
            apply(onto or open_local(base), tmp_path, str(tmp_path))
        assert caught.value.code == code
        assert str(tmp_path) in caught.value.where
        assert caught.value.fix
        return caught.value

    return run


@pytest.mark.parametrize(
    "kind", ["LOHA", "LOKR", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "ADALORA", "VERA", "TRAINABLE_TOKENS", None, 3]
)
def test_other_kinds_are_named(kind: Any, refused: Any) -> None:
    error = refused({"peft_type": kind})
    assert repr(kind) in str(error)
    assert "merge_and_unload" in str(error)


@pytest.mark.parametrize(
    "option",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [1]},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {"beta": 1.0}},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        *({"init_lora_weights": name} for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
    ],
    ids=lambda option: "-".join(map(str, [*option][:1] + [v for v in option.values() if isinstance(v, str)])),
)
def test_options_that_are_no_change_of_weights(option: dict[str, Any], refused: Any) -> None:
    assert "merge_and_unload" in str(refused(option))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8}, "do not make rank 8"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alpha_pattern": {"q_proj": True}}, "lora_alpha is True"),
        ({"rank_pattern": {"(": 4}}, "no pattern"),
        ({"rank_pattern": [4]}, "no mapping"),
        ({"use_dora": True}, "magnitude"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "'o_proj'"),
    ],
)
def test_configs_that_do_not_belong_to_the_weights(config: dict[str, Any], words: str, refused: Any) -> None:
    assert words in str(refused(config))


def _drop(key: str) -> Callable[[State], Any]:
    return lambda state: state.pop(key)


def _set(key: str, *shape: int) -> Callable[[State], Any]:
    return lambda state: state.update({key: torch.zeros(shape)})


def _drop_layer(state: State) -> None:
    for key in [key for key in state if ".layers.1." in key]:
        del state[key]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop(f"{Q}lora_B.weight"), "q_proj has down in the file where down, up are needed"),
        (_drop(f"{Q}lora_A.weight"), "q_proj has up"),
        (_drop_layer, "nothing for model.layers.1.self_attn"),
        (_set(f"{Q}lora_A.weight", 5, 32), "A is (5, 32) and B is (32, 4)"),
        (_set(f"{Q}lora_A.weight", 4, 30), "A (4, 30) and B (32, 4) do not make the base's"),
        (_set(f"{Q}lora_B.weight", 30, 4), "of shape (32, 32)"),
        (_set(f"{Q}lora_A.weight", 32), "A is (32,)"),
        (_set(f"{Q}lora_B.bias", 32), "none in the base"),
        (_set(f"{Q}lora_magnitude_vector", 32), "magnitude"),
        (_set(f"{Q}lora_A.other.weight", 4, 32), "more than one adapter"),
        (_set(f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight", 4, 32), "layers.7"),
        (_set(f"{PREFIX}model.layers.0.nothing.weight", 4, 32), "layers.0.nothing.weight replaces"),
        (_set(f"{PREFIX}model.norm.weight", 31), "(31,)"),
        (_set(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32), "trainable_token_indices"),
        (_set(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 31), "(2, 31)"),
        (lambda state: state.clear(), "no tensors"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[State], Any], words: str, refused: Any) -> None:
    error = refused(weights=change)
    assert words in str(error)


@pytest.mark.parametrize("indices", [[1, 1], [1, 999], [-1, 2], [1], [1.0, 2], "12", {"wte": [1, 2]}])
def test_token_indices(indices: Any, refused: Any) -> None:
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert "2 different tokens below 96" in str(refused({"trainable_token_indices": indices}, _set(key, 2, 32)))


def test_a_base_of_another_family(refused: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = models.save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")
    error = refused(onto=open_local(other))
    assert "model.layers.0.self_attn" in str(error)
    wide = models.save_model(tmp_path_factory.mktemp("wide"), "llama", hidden_size=64)
    assert "(64, 64)" in str(refused(onto=open_local(wide)))


def test_a_place_that_could_be_one_of_two(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    clip = open_local(models.save_model(tmp_path_factory.mktemp("clip"), "clip"))
    towers = [name for name in clip.tensors if name.startswith("text_model.") and name.endswith("q_proj.weight")]
    module = towers[0].removeprefix("text_model.").removesuffix(".weight")
    assert f"vision_model.{module}.weight" in clip.tensors
    state = {
        f"{PREFIX}{module}.lora_A.weight": torch.zeros(2, 32),
        f"{PREFIX}{module}.lora_B.weight": torch.zeros(32, 2),
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(UserError, match="could be") as caught:
        apply(clip, tmp_path, "x")
    assert caught.value.code == "RG108"


def test_folders_that_are_no_adapter(base: Path, made: Path, tmp_path: Path) -> None:
    for other in (base, tmp_path):
        with pytest.raises(UserError, match=r"no adapter_config\.json") as caught:
            apply(open_local(base), other, "x")
        assert caught.value.code == "RG108"
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        apply(open_local(base), tmp_path, "x")
    assert caught.value.code == "RG105"
    (tmp_path / "adapter_config.json").write_bytes((made / "adapter_config.json").read_bytes())
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors") as caught:
        apply(open_local(base), tmp_path, "x")
    assert caught.value.code == "RG108"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x20")
    with pytest.raises(UserError) as caught:
        apply(open_local(base), tmp_path, "x")
    assert caught.value.code == "RG103"


class _Runs:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_pickled_adapters_run_no_code(base: Path, made: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "adapter_config.json").write_bytes((made / "adapter_config.json").read_bytes())
    torch.save({"x": _Runs()}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError) as caught:
        apply(open_local(base), tmp_path, "x")
    assert caught.value.code == "RG107"
    assert capsys.readouterr().out == ""


def test_another_base_is_a_remark_only(base: Path, made: Path) -> None:
    checkpoint = open_checkpoint(f"{base}+{made}")
    assert [remark for remark in checkpoint.remarks if "org/its-base" in remark]
    assert checkpoint.digest() != open_local(base).digest()


def test_integer_weights_are_not_changed(refused: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("int8")
    state = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].to(torch.int8)}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    assert name in str(refused(onto=open_local(folder), code="RG109"))


def test_expert_stacks_are_refused(refused: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("experts")
    state = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: torch.zeros(4, 32, 32)}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    assert "experts" in str(refused(onto=open_local(folder)))


def test_a_tie_to_a_head_of_unknown_name(tmp_path: Path) -> None:
    base = models.save_model(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["OwnModel"]}
    (base / "config.json").write_text(json.dumps(config))
    state = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(2, models.VOCAB),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.zeros(32, 2),
    }
    (tmp_path / "a").mkdir()
    save_file(state, tmp_path / "a/adapter_model.safetensors")
    (tmp_path / "a/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(UserError, match="unknown name") as caught:
        apply(open_local(base), tmp_path / "a", "x")
    assert caught.value.code == "RG108"
