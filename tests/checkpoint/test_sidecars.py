"""The files beside the weights: what transformers loads from them, what stays behind, what is rewritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import models
from regraft.checkpoint.model import Checkpoint, open_checkpoint
from regraft.checkpoint.sidecars import changed_config, copy_licences, copy_sidecars, sidecar_files
from regraft.errors import UserError, UserWarningMessage

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]


def save_tokenizer(folder: Path, template: str | None = None) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special)
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy(
    tmp_path: Path, model: Checkpoint, tokenizer: Checkpoint | None = None, **settings: Any
) -> tuple[Path, list[str]]:
    out = tmp_path / "staging"
    out.mkdir()
    settings = {"config_changes": {}, "dtype": "float32"} | settings
    names = copy_sidecars(out, config_from=model, tokenizer_from=tokenizer or model, **settings)
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert names == found
    return out, names


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = models.save_model(tmp_path / "llama", "llama")
    save_tokenizer(folder, "{{ messages[0].content }}")
    return folder


def test_a_language_model_loads_with_what_travels(tmp_path: Path, llama: Path) -> None:
    out, names = copy(tmp_path, open_checkpoint(str(llama)), dtype="bfloat16")
    assert "config.json" in names
    config = hf.AutoConfig.from_pretrained(out)
    assert (config.model_type, config.dtype) == ("llama", torch.bfloat16)
    assert config.architectures == ["LlamaForCausalLM"]
    assert hf.GenerationConfig.from_pretrained(out).to_diff_dict() == (
        hf.GenerationConfig.from_pretrained(llama).to_diff_dict()
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    assert tokenizer("hello world")["input_ids"] == [5, 6]
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello"
    shutil.copy(llama / "model.safetensors", out)
    model = hf.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_an_image_model_loads_with_its_processor(tmp_path: Path) -> None:
    folder = models.save_model(tmp_path / "vit", "vit")
    hf.ViTImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=False).save_pretrained(folder)
    out, names = copy(tmp_path, open_checkpoint(str(folder)))
    assert names == ["config.json", "preprocessor_config.json"]
    assert dict(hf.AutoImageProcessor.from_pretrained(out).size) == {"height": 8, "width": 8}


def test_config_and_tokenizer_come_from_different_models(tmp_path: Path, llama: Path) -> None:
    other = models.save_model(tmp_path / "other", "qwen2")
    save_tokenizer(other, "other {{ messages[0].content }}")
    (other / "merges.txt").write_text("#version: 0.2\n")
    out, names = copy(tmp_path, open_checkpoint(str(llama)), open_checkpoint(str(other)))
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert (out / "chat_template.jinja").read_text().startswith("other")
    assert "merges.txt" in names


def test_generation_config_of_another_model(tmp_path: Path, llama: Path) -> None:
    other = models.save_model(tmp_path / "other", "llama")
    edit(other / "generation_config.json", max_new_tokens=7)
    out, _ = copy(tmp_path, open_checkpoint(str(llama)), generation_from=open_checkpoint(str(other)))
    assert hf.GenerationConfig.from_pretrained(out).max_new_tokens == 7


def test_own_chat_template_replaces_every_other(tmp_path: Path, llama: Path) -> None:
    edit(llama / "tokenizer_config.json", chat_template="old")
    (llama / "chat_template.json").write_text('{"chat_template": "old"}')
    out, names = copy(tmp_path, open_checkpoint(str(llama)), chat_template="new {{ messages[0].content }}")
    assert "chat_template.json" not in names
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    chat = [{"role": "user", "content": "hello"}]
    assert hf.AutoTokenizer.from_pretrained(out).apply_chat_template(chat, tokenize=False) == "new hello"


def test_additional_templates_travel(tmp_path: Path, llama: Path) -> None:
    (llama / "additional_chat_templates").mkdir()
    (llama / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (llama / "additional_chat_templates" / "secret.txt").write_text("no")
    out, names = copy(tmp_path, open_checkpoint(str(llama)))
    assert [n for n in names if "/" in n] == ["additional_chat_templates/tools.jinja"]
    assert hf.AutoTokenizer.from_pretrained(out).chat_template["tools"] == "tools"


def test_paths_of_the_machine_do_not_travel(tmp_path: Path, llama: Path) -> None:
    edit(llama / "tokenizer_config.json", name_or_path="/home/me/x", special_tokens_map_file="/root/.cache/x.json")
    edit(llama / "config.json", _name_or_path="/home/me/x")
    out, names = copy(tmp_path, open_checkpoint(str(llama)))
    for name in names:
        assert "/home/me" not in (out / name).read_text()
        assert "/root" not in (out / name).read_text()


def test_nothing_else_of_the_folder_travels(tmp_path: Path, llama: Path) -> None:
    for name in ("notes.txt", "training_args.json", "optimizer.txt", "README.md", ".env", "LICENSE"):
        (llama / name).write_text("{}")
    (llama / "runs").mkdir()
    (llama / "runs" / "events").write_text("x")
    _, names = copy(tmp_path, open_checkpoint(str(llama)))
    assert names == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_model_without_config_gets_none(tmp_path: Path, llama: Path) -> None:
    (llama / "config.json").unlink()
    _, names = copy(tmp_path, open_checkpoint(str(llama)))
    assert "config.json" not in names


def test_changed_config() -> None:
    config = {
        "architectures": ["X"],
        "torch_dtype": "float32",
        "_name_or_path": "/home/me/x",
        "quantization_config": {"bits": 4},
        "text_config": {"torch_dtype": "float32", "num_hidden_layers": 2, "_name_or_path": "y", "vocab_size": 5},
        "id2label": {"0": "dtype"},
        "auto_map": {"AutoModel": "m.X"},
    }
    before = json.dumps(config)
    changes = {"vocab_size": 9, "text_config.num_hidden_layers": 3}
    assert changed_config(config, changes, "float16") == {
        "architectures": ["X"],
        "dtype": "float16",
        "text_config": {"dtype": "float16", "num_hidden_layers": 3, "vocab_size": 5},
        "id2label": {"0": "dtype"},
        "auto_map": {"AutoModel": "m.X"},
        "vocab_size": 9,
    }
    assert json.dumps(config) == before
    with pytest.raises(KeyError):
        changed_config(config, {"vision_config.x": 1}, "float16")


@pytest.mark.parametrize("allowed", [False, True])
def test_code_of_the_model_travels_only_if_asked(tmp_path: Path, llama: Path, allowed: bool) -> None:
    (llama / "modeling_x.py").write_text("raise SystemExit")
    model = open_checkpoint(str(llama))
    if allowed:
        _, names = copy(tmp_path, model, remote_code=True)
    else:
        with pytest.warns(UserWarningMessage, match=r"modeling_x\.py.*neither run nor copied"):
            _, names = copy(tmp_path, model)
    assert ("modeling_x.py" in names) == allowed


# --- sentence-transformers ------------------------------------------------------------------------------------------


@pytest.fixture
def sentence_encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    hf.BertModel(models.config("bert")).save_pretrained(folder)
    save_tokenizer(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": false}')
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {}, "similarity_fn_name": "cosine"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}'
    )
    return folder


def test_a_sentence_encoder_stays_one(tmp_path: Path, sentence_encoder: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    out, names = copy(tmp_path, open_checkpoint(str(sentence_encoder)))
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= set(names)
    shutil.copy(sentence_encoder / "model.safetensors", out)
    loaded, original = (library.SentenceTransformer(str(path), device="cpu") for path in (out, sentence_encoder))
    assert loaded.max_seq_length == 12
    a, b = (model.encode(["hello world"], convert_to_tensor=True) for model in (loaded, original))
    assert torch.equal(a, b)
    assert a.norm().item() == pytest.approx(1, abs=1e-5)


def test_modules_with_weights_are_named(tmp_path: Path, sentence_encoder: Path) -> None:
    entries = json.loads((sentence_encoder / "modules.json").read_text())
    entries += [{"path": "3_Dense", "type": "x"}, {"path": "../outside", "type": "x"}, {"path": "notes", "type": "x"}]
    (sentence_encoder / "modules.json").write_text(json.dumps(entries))
    for folder in ("3_Dense", "notes"):
        (sentence_encoder / folder).mkdir()
        (sentence_encoder / folder / "model.safetensors").write_bytes(b"x")
        (sentence_encoder / folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.warns(UserWarningMessage) as remarks:
        _, names = copy(tmp_path, open_checkpoint(str(sentence_encoder)))
    said = " ".join(str(remark.message) for remark in remarks)
    assert "3_Dense/model.safetensors holds weights outside the merged model" in said
    assert "3_Dense/pytorch_model.bin is not a safetensors file" in said
    assert [n for n in names if "/" in n] == ["1_Pooling/config.json", "3_Dense/model.safetensors"]


# --- refusals and links ---------------------------------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, sentence_encoder: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    (sentence_encoder / "1_Pooling" / "more.json").symlink_to(secret)
    with pytest.raises(UserError) as caught:
        sidecar_files(
            config_from=open_checkpoint(str(sentence_encoder)), tokenizer_from=open_checkpoint(str(sentence_encoder))
        )
    assert caught.value.code == "RG104"


def test_links_of_the_hub_cache_are_copied_as_files(tmp_path: Path, llama: Path) -> None:
    cache = tmp_path / "models--org--x"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(llama.iterdir())):
        shutil.copy(file, cache / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    out, names = copy(tmp_path, open_checkpoint(str(snapshot)))
    assert "tokenizer.json" in names
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_a_git_lfs_stub(tmp_path: Path, llama: Path) -> None:
    (llama / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError) as caught:
        copy(tmp_path, open_checkpoint(str(llama)))
    assert caught.value.code == "RG106"


def test_an_unreadable_tokenizer_config(tmp_path: Path, llama: Path) -> None:
    (llama / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        copy(tmp_path, open_checkpoint(str(llama)))
    assert caught.value.code == "RG105"


def test_sizes_are_known_before_anything_is_copied(tmp_path: Path, llama: Path) -> None:
    model = open_checkpoint(str(llama))
    found = sidecar_files(config_from=model, tokenizer_from=model)
    assert found["tokenizer.json"].stat().st_size == (llama / "tokenizer.json").stat().st_size
    assert not (tmp_path / "staging").exists()


# --- licence files --------------------------------------------------------------------------------------------------


def test_licence_files_of_all_parents(tmp_path: Path, llama: Path) -> None:
    parents = [llama, *(models.save_model(tmp_path / name, "llama") for name in ("same", "other"))]
    (parents[0] / "LICENSE").write_text("A")
    (parents[0] / "Notice.txt").write_text("N")
    (parents[1] / "LICENSE").write_text("A")
    (parents[2] / "LICENSE").write_text("B")
    (parents[2] / "USE_POLICY.md").write_text("P")
    out = tmp_path / "staging"
    out.mkdir()
    names = copy_licences(out, [open_checkpoint(str(path)) for path in parents])
    assert names == ["LICENSE", "LICENSE.other", "Notice.txt", "USE_POLICY.md.other"]
    assert (out / "LICENSE.other").read_text() == "B"
