"""Opening models from folders and files: what is found, what is refused, what identifies the content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.model import Checkpoint, open_checkpoint
from regraft.errors import UserError

STUB = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def write(folder: Path, name: str = "model.safetensors", **tensors: torch.Tensor) -> Path:
    """A folder with one weight file; F32 `a` and BF16 `b` unless other tensors are given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors or {"a": torch.arange(4.0), "b": torch.arange(6).reshape(2, 3).to(torch.bfloat16)}
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder


def write_json(folder: Path, name: str = "config.json", **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def sharded(folder: Path, suffix: str = "safetensors", **weight_map: str) -> Path:
    """Two shards and an index, whose entries `weight_map` replaces."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    write(folder, files[0], a=torch.ones(2), b=torch.zeros(3))
    write(folder, files[1], c=torch.ones(4))
    listed = {"a": files[0], "b": files[0], "c": files[1]} | weight_map
    return write_json(folder, f"{stem}.{suffix}.index.json", metadata={"total_size": 36}, weight_map=listed)


def refused(folder: Path | str, code: str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.code == code, str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what opens


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_models_as_transformers_saves_them(tmp_path: Path, family: str) -> None:
    folder = models.save_model(tmp_path / "my model", family, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(str(folder))
    stored = load_file(folder / "model.safetensors")
    assert checkpoint.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensors[name].read(), tensor.reshape(-1))
    assert checkpoint.model_type == family
    assert checkpoint.architectures == (models.CLASSES[family].__name__,)
    assert checkpoint.parameters == sum(t.numel() for t in stored.values())
    assert checkpoint.bytes == 2 * checkpoint.parameters
    assert checkpoint.ref == str(folder)
    assert checkpoint.path == folder
    assert checkpoint.remarks == ()
    assert "generation_config.json" in checkpoint.files


def test_shards_as_transformers_saves_them(tmp_path: Path) -> None:
    model = models.model("llama")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = open_checkpoint(str(tmp_path / "whole")), open_checkpoint(str(tmp_path / "shards"))
    assert whole.tensors.keys() == shards.tensors.keys()
    assert whole.full_digest() == shards.full_digest()
    assert whole.digest() != shards.digest()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded(tmp_path: Path, suffix: str) -> None:
    checkpoint = open_checkpoint(str(sharded(tmp_path / "with space", suffix)))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.tensors["c"].read().tolist() == [1, 1, 1, 1]
    assert checkpoint.files == {}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_single_files_by_folder_and_by_name(tmp_path: Path, name: str) -> None:
    folder = write_json(write(tmp_path / "m", name), model_type="llama")
    for ref in (folder, folder / name, f"{folder}/"):
        checkpoint = open_checkpoint(str(ref))
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.model_type == "llama"
        assert checkpoint.path == folder


@pytest.mark.parametrize("name", ["weights.safetensors", "step-100.pt", "old.pth", "other.bin"])
def test_files_of_any_name(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(str(write(tmp_path / "m", name) / name))
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.config == {}
    assert checkpoint.model_type == ""
    assert checkpoint.architectures == ()


def test_single_file_among_strangers(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    checkpoint = open_checkpoint(str(write(tmp_path, "x.safetensors") / "x.safetensors"))
    assert checkpoint.files == {}


def test_relative_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m")
    assert open_checkpoint("m", relative_to=tmp_path).ref == "m"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for ref in ("m", "./m", "~/m", "m/model.safetensors"):
        assert list(open_checkpoint(ref).tensors) == ["a", "b"]


def test_order_of_preference_is_that_of_from_pretrained(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    write(folder, "pytorch_model.bin", old=torch.ones(1))
    assert "c" in open_checkpoint(str(folder)).tensors
    write(folder, "model.safetensors", new=torch.ones(1))
    checkpoint = open_checkpoint(str(folder))
    assert list(checkpoint.tensors) == ["new"]
    (remark,) = checkpoint.remarks
    assert "model.safetensors was read" in remark
    assert "model.safetensors.index.json, pytorch_model.bin" in remark


def test_weights_that_the_config_names(tmp_path: Path) -> None:
    folder = write(write(tmp_path / "m"), "special.safetensors", special=torch.ones(1))
    write_json(folder, transformers_weights="special.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert list(checkpoint.tensors) == ["special"]
    assert checkpoint.remarks == ("special.safetensors was read; model.safetensors in the same folder was not",)
    write_json(folder, transformers_weights="gone.safetensors")
    refused(folder, "RG102", "gone.safetensors")
    write_json(folder, transformers_weights="../m/special.safetensors")
    refused(folder, "RG104", "../m/special.safetensors")


def test_tied_weights_of_pickles_are_aliases(tmp_path: Path) -> None:
    shared = torch.randn(3, 2)
    folder = write(tmp_path / "m", "pytorch_model.bin", embed=shared, b=torch.ones(1), head=shared, copy=shared.clone())
    checkpoint = open_checkpoint(str(folder))
    assert list(checkpoint.tensors) == ["embed", "b", "copy"]
    assert checkpoint.aliases == {"head": "embed"}
    assert checkpoint.source("head") is checkpoint.tensors["embed"]
    assert checkpoint.parameters == 13
    assert checkpoint.same_bytes("head", "embed")
    assert checkpoint.same_bytes("head", "copy")


def test_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regraft.checkpoint.model._PIECE", 64)
    values = torch.randn(100)
    values[3] = torch.nan  # equal as bits, not as numbers
    late = values.clone()
    late[-1] += 1
    tensors = {
        "a": values,
        "b": values.clone(),
        "late": late,
        "wide": values.double(),
        "square": values.clone().reshape(10, 10),
    }
    tensors |= {"zero": torch.zeros(2), "minus": -torch.zeros(2)}
    checkpoint = open_checkpoint(str(write(tmp_path / "m", **tensors)))
    assert checkpoint.same_bytes("a", "b")
    for one, other in (("a", "late"), ("a", "wide"), ("a", "square"), ("zero", "minus")):
        assert not checkpoint.same_bytes(one, other)
    with pytest.raises(KeyError):
        checkpoint.same_bytes("a", "none")


def test_other_files(tmp_path: Path) -> None:
    folder = write_json(write(tmp_path / "m"), model_type="bert")
    names = {"tokenizer.json", "README.md", "tokenizer.model", "generation_config.json", "chat_template.jinja"}
    hidden = {"training_args.bin", "tf_model.h5", "model.onnx", ".gitattributes", "flax_model.msgpack", "optimizer.pt"}
    for name in names | hidden:
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    (folder / "runs").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    checkpoint = open_checkpoint(str(folder))
    assert set(checkpoint.files) == names | {"additional_chat_templates/tool.jinja"}
    assert all(path == folder / name for name, path in checkpoint.files.items())
    assert checkpoint.remarks == ("dangling is a link to nothing or no regular file, and was left out",)


def test_remote_code_is_a_remark_and_is_not_run(tmp_path: Path) -> None:
    folder = write_json(write(tmp_path / "m"), auto_map={"AutoModel": "modeling_x.X"}, model_type="x")
    (folder / "modeling_x.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nraise SystemExit\n")
    checkpoint = open_checkpoint(str(folder))
    (remark,) = checkpoint.remarks
    assert "modeling_x.py" in remark
    assert "was not run" in remark
    assert not (tmp_path / "canary").exists()
    write_json(folder, model_type="x")
    assert "modeling_x.py is in the folder" in open_checkpoint(str(folder)).remarks[0]


def test_adapter_beside_a_model_is_a_remark(tmp_path: Path) -> None:
    folder = write_json(write(tmp_path / "m"), "adapter_config.json", peft_type="LORA")
    assert open_checkpoint(str(folder)).remarks == ("adapter_config.json in the folder was not applied",)


def test_hub_snapshot_of_links(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--m"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    source = write_json(sharded(tmp_path / "plain"), model_type="llama")
    (source / "tokenizer.json").write_text("{}")
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    for ref in (snapshot, os.path.relpath(snapshot)):
        checkpoint = open_checkpoint(str(ref))
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert checkpoint.model_type == "llama"
        assert set(checkpoint.files) == {"tokenizer.json"}
    blobs.joinpath(f"{1:064x}").unlink()  # a shard that was cleaned away
    refused(snapshot, "RG102", "model-00001-of-00002.safetensors")


# ---------------------------------------------------------------- what is refused


def test_folders_without_weights(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "RG102", "no weights")
    refused(write_json(tmp_path / "config only", model_type="llama"), "RG102", "no weights")
    write(tmp_path / "parent" / "child")
    refused(tmp_path / "parent", "RG102", "did you mean", "child")
    refused(write(tmp_path / "variant", "model.fp16.safetensors"), "RG102", "model.fp16.safetensors", "name the file")
    folder = write_json(tmp_path / "keras")
    (folder / "tf_model.h5").write_text("x")
    refused(folder, "RG102", "tf_model.h5", "convert")
    folder = sharded(tmp_path / "no index")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "RG102", "no index", "model-00001-of-00002.safetensors")
    (tmp_path / "nothing in it").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    refused(write_json(tmp_path / "json", "weights.json") / "weights.json", "RG102", "no weight file")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").symlink_to("gone")
    refused(tmp_path / "broken", "RG102", "'model.safetensors' is missing")


def test_file_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    refused(tmp_path / "x.safetensors", "RG102", "no tensors")


def test_adapters_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", "adapter_model.safetensors")
    write_json(folder, "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA")
    refused(folder, "RG108", f"org/base+{folder}")
    write_json(folder, "adapter_config.json", base_model_name_or_path=None)
    refused(folder, "RG108", f"BASE+{folder}")
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "RG105", "adapter_config.json")


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", x="model-00007.safetensors", y="model-00008.safetensors")
    refused(folder, "RG102", "2 of 4", "model-00007.safetensors, model-00008.safetensors", "index.json")
    many = {f"t{i}": f"s{i:03}.safetensors" for i in range(50)}
    refused(sharded(tmp_path / "many", **many), "RG102", "50 of 52", "and 44 more")


def test_index_that_does_not_fit(tmp_path: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    refused(sharded(tmp_path / "wrong", a=second), "RG103", "holds a,", second)
    refused(sharded(tmp_path / "none", zz=second), "RG103", "zz", second)
    folder = sharded(tmp_path / "twice")
    write(folder, second, a=torch.ones(2), c=torch.ones(4))
    refused(folder, "RG103", "a is in", "another shard")
    folder = sharded(tmp_path / "unlisted")
    write(folder, second, c=torch.ones(4), d=torch.ones(1))
    checkpoint = open_checkpoint(str(folder))
    assert list(checkpoint.tensors) == ["a", "b", "c", "d"]
    assert checkpoint.remarks == ("the index does not list d, which was read all the same",)
    write(tmp_path / "mixed", "pytorch_model.bin")
    folder = write_json(tmp_path / "mixed", "model.safetensors.index.json", weight_map={"a": "pytorch_model.bin"})
    (folder / "pytorch_model.bin").rename(folder / "shard.bin")
    write_json(folder, "model.safetensors.index.json", weight_map={"a": "shard.bin"})
    refused(folder, "RG105", "shard.bin")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"text"', "null", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}']
)
def test_unreadable_indices(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "RG105", "index")


def test_index_without_entries(tmp_path: Path) -> None:
    refused(write_json(tmp_path, "model.safetensors.index.json", weight_map={}), "RG102", "no tensors")


@pytest.mark.parametrize(
    "name", ["{outside}/secret.safetensors", "../secret.safetensors", "link.safetensors", "sub/../../x"]
)
def test_index_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, "secret.safetensors", a=torch.ones(1))
    folder = write_json(tmp_path / "m", "model.safetensors.index.json", weight_map={"a": name.format(outside=tmp_path)})
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    refused(folder, "RG104", "index.json")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_links_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "m", "pytorch_model.bin" if name.endswith(".bin") else "model.safetensors")
    if (folder / name).exists():
        (folder / name).rename(tmp_path / name)
    else:
        (tmp_path / name).write_text("{}")
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, "RG104", name, "outside")


def test_lfs_stubs(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(STUB)
        refused(folder, "RG106", "git lfs pull", name)
    folder = sharded(tmp_path / "shards")
    (folder / "model-00002-of-00002.safetensors").write_text(STUB)
    refused(folder, "RG106", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "config", ["", "{", "[1]", '{"model_type": 5}', '{"architectures": "X"}', '{"architectures": [1]}', "\udcff"]
)
def test_unreadable_configs(tmp_path: Path, config: str) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    refused(tmp_path, "RG105", "config.json")


def test_json_limits(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    deep, long = "nested too deeply", "a number that is too long"
    for content, message in (
        ("[" * 100_000, deep),
        ('{"a":' * 100_000, deep),
        ("[" * 102 + "]" * 102, deep),
        ('{"a":' * 110 + "1" + "}" * 110, deep),
        ("9" * 10_000, long),
        ('{"a": ' + "9" * 41 + "}", long),
        ("[" + "[]," * 2_600_000 + "0]", "more than 5,000,000 values"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_json(path)
        assert caught.value.code == "RG105"
    path.write_text("[" * 100 + "]" * 100)
    assert read_json(path, list)
    path.write_text("[1, 2]")
    assert read_json(path, list) == [1, 2]
    for call in (
        lambda: read_json(path, list, limit=5),
        lambda: read_json(tmp_path),
        lambda: read_json(tmp_path / "no"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.code == "RG105"


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {"quantization": {"bits": 4, "group_size": 64}},
    ],
)
def test_quantised_by_config(tmp_path: Path, config: dict[str, Any]) -> None:
    refused(write_json(write(tmp_path), **config), "RG109", "quantised")
    write_json(tmp_path, quantization_config=None)
    assert open_checkpoint(str(tmp_path)).tensors


@pytest.mark.parametrize(
    "name",
    [
        "l.0.qweight",
        "l.weight.absmax",
        "l.SCB",
        "l.weight.quant_state.bitsandbytes__nf4",
        "l.qzeros",
        "l.weight_packed",
    ],
)
def test_quantised_by_names(tmp_path: Path, name: str) -> None:
    refused(write(tmp_path, **{name: torch.ones(2, dtype=torch.int32)}), "RG109", name)


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "y.dat").write_bytes(b"GGUF\x03\0\0\0")
    refused(tmp_path, "RG109", "x.gguf")
    refused(tmp_path / "x.gguf", "RG109", "GGUF")
    refused(tmp_path / "y.dat", "RG109", "GGUF")


# ---------------------------------------------------------------- digests


def _digests(folder: Path) -> tuple[str, str]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint.digest(), checkpoint.full_digest()


def _keep_time(path: Path, change: Any) -> None:
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_digest_notices_every_kind_of_change(tmp_path: Path) -> None:
    base = {"a": torch.zeros(50_000), "b": torch.ones(3, dtype=torch.int64), "none": torch.empty(0)}
    folder = write_json(write(tmp_path / "m", **base), model_type="x")
    (folder / "tokenizer.json").write_text("{}")
    file = folder / "model.safetensors"
    cheap, full = _digests(folder)
    assert _digests(folder) == (cheap, full)
    assert len(cheap) == len(full) == 64
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert _digests(moved) == (cheap, full)

    def step(change: Any, path: Path, same_full: bool = False) -> None:
        nonlocal cheap, full
        _keep_time(path, change)
        now = _digests(folder)
        assert now[0] != cheap
        assert (now[1] == full) is same_full
        cheap, full = now

    step(lambda: write(folder, **base | {"a": base["a"].index_fill(0, torch.tensor(0), 1.0)}), file)
    step(lambda: write(folder, **base | {"a": base["a"].index_fill(0, torch.tensor(49_999), 1.0)}), file)
    step(lambda: write(folder, **base | {"b": torch.tensor([1, 2, 1])}), file)
    step(lambda: write(folder, **base | {"a": base["a"].reshape(250, 200)}), file)
    step(lambda: write(folder, **base | {"renamed": torch.empty(0)}), file)
    step(lambda: write_json(folder, model_type="y"), folder / "config.json")
    step(lambda: (folder / "tokenizer.json").write_text("{ }"), folder / "tokenizer.json", same_full=True)
    os.utime(file, ns=(1, 1))
    assert _digests(folder)[0] != cheap
    assert _digests(folder)[1] == full


def test_digest_samples_and_full_digest_reads_all(tmp_path: Path) -> None:
    values = torch.zeros(1_000_000)
    folder = write(tmp_path, a=values)
    file = folder / "model.safetensors"
    before = _digests(folder)
    _keep_time(file, lambda: write(folder, a=values.index_fill(0, torch.tensor(500_001), 1.0)))
    after = _digests(folder)
    assert after[1] != before[1]
    assert after[0] == before[0]  # one element of a million, same size and time: the price of being cheap


def test_opening_costs_headers_only(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**36], "data_offsets": [0, 2**38]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2**38)  # 256 GiB, sparse
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.bytes == 2**38
    assert checkpoint.tensors["a"].read(2**36 - 2).tolist() == [0, 0]
    assert len(checkpoint.digest()) == 64


def test_repr_is_short(tmp_path: Path) -> None:
    assert len(repr(open_checkpoint(str(models.save_model(tmp_path, "gpt2"))))) < 600


def test_names_are_imported_when_used() -> None:
    code = (
        "import sys, regraft.checkpoint as c; assert 'torch' not in sys.modules; "
        "c.open_checkpoint, c.Checkpoint, c.read_json; assert 'transformers' not in sys.modules; "
        "assert 'huggingface_hub' not in sys.modules; missing = [n for n in c.__all__ if not hasattr(c, n)]; "
        "assert not missing, missing"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_checkpoint_is_exported() -> None:
    import regraft.checkpoint

    assert regraft.checkpoint.Checkpoint is Checkpoint
    with pytest.raises(AttributeError, match="nonsense"):
        _ = regraft.checkpoint.nonsense  # type: ignore[attr-defined]
