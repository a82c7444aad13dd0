"""Models from a Hub on 127.0.0.1, and every way in which it can fail."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import models
import regraft.checkpoint.hub as hub_module
from hub_server import FakeHub
from regraft.checkpoint.hub import fetch
from regraft.checkpoint.hub_files import choose
from regraft.checkpoint.model import open_checkpoint
from regraft.errors import UserError

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}" * 50,
    "README.md": b"---\nlicense: mit\n---\n",
    "model.safetensors": bytes(range(256)) * 40,
}
TOKEN = "hf_thisIsTheSecretToken"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.3)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        server.add("org/model", dict(FILES))
        yield server


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)


def failed(repo: str = "org/model", revision: str = "", *, offline: bool = False) -> UserError:
    with pytest.raises(UserError) as caught:
        fetch(repo, revision, offline=offline)
    text = str(caught.value)
    assert TOKEN not in text
    assert "Signature" not in text
    assert "\n" not in text
    return caught.value


def cache_files(hub: FakeHub) -> list[str]:
    root = Path(constants.HF_HUB_CACHE)
    return [path.name for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts]


def test_downloads_into_the_cache(hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    folder, commit = fetch("org/model", "", offline=False)
    assert commit == hub.refs["org/model", "main"]
    assert folder == Path(constants.HF_HUB_CACHE) / "models--org--model" / "snapshots" / commit
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert capfd.readouterr() == ("", "")


def test_the_token_goes_to_the_hub_and_not_to_the_store(hub: FakeHub) -> None:
    fetch("org/model", "", offline=False)
    sent = {path.split("/")[1]: authorised for _, path, authorised in hub.log}
    assert sent == {"api": True, "org": True, "store": False}


def test_a_second_time_asks_for_the_list_only(hub: FakeHub) -> None:
    first = fetch("org/model", "", offline=False)
    hub.log.clear()
    assert fetch("org/model", "", offline=False) == first
    assert len(hub.log) == 1


def test_revisions(hub: FakeHub) -> None:
    other = hub.add("org/model", FILES | {"config.json": b'{"x": 1}'}, "refs/pr/3")
    folder, commit = fetch("org/model", "refs/pr/3", offline=False)
    assert commit == other
    assert json.loads((folder / "config.json").read_text()) == {"x": 1}
    assert fetch("org/model", other, offline=False) == (folder, commit)
    assert fetch("org/model", "refs/pr/3", offline=True) == (folder, commit)
    assert failed(offline=True).code == "RG501"


def test_only_what_is_needed_is_downloaded(hub: FakeHub) -> None:
    extra = {
        "pytorch_model.bin": b"x",
        "model.Q4.gguf": b"x",
        "tf_model.h5": b"x",
        "flax_model.msgpack": b"x",
        "onnx/model.onnx": b"x",
        "original/consolidated.00.pth": b"x",
        "consolidated.safetensors": b"x",
        "model.fp16.safetensors": b"x",
        "training_args.bin": b"x",
        ".gitattributes": b"x",
        "sample.png": b"x",
    }
    needed = {
        "LICENSE": b"x",
        "modeling_own.py": b"x",
        "additional_chat_templates/rag.jinja": b"x",
        "1_Pooling/config.json": b"{}",
        "2_Dense/model.safetensors": b"x",
    }
    hub.add("org/model", FILES | extra | needed)
    folder, _ = fetch("org/model", "", offline=False)
    got = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert got == FILES.keys() | needed.keys()


@pytest.mark.parametrize(
    ("names", "weights", "index"),
    [
        (["model.safetensors", "pytorch_model.bin"], ("model.safetensors",), ""),
        (["model.safetensors.index.json", "model-00001-of-00001.safetensors"], (), "model.safetensors.index.json"),
        (["pytorch_model.bin", "x.gguf"], ("pytorch_model.bin",), ""),
        (["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"], ("adapter_model.safetensors",), ""),
        (["adapter_config.json", "adapter_model.bin", "optimizer.pt"], ("adapter_model.bin",), ""),
    ],
)
def test_which_weights_are_chosen(names: list[str], weights: tuple[str, ...], index: str) -> None:
    choice = choose(names, "org/model")
    assert (choice.weights, choice.index) == (weights, index)


def test_weights_that_the_config_names(hub: FakeHub) -> None:
    config = json.dumps({"transformers_weights": "consolidated.safetensors"}).encode()
    hub.add("org/named", FILES | {"config.json": config, "consolidated.safetensors": b"x"})
    folder, _ = fetch("org/named", "", offline=False)
    names = {path.name for path in folder.iterdir()}
    assert "consolidated.safetensors" in names
    assert "model.safetensors" not in names
    (folder / "consolidated.safetensors").unlink()
    assert failed("org/named", offline=True).code == "RG501"


def test_shards_are_those_of_the_index(hub: FakeHub) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    shards = {name: name.encode() for name in index["weight_map"].values()}
    hub.add("org/sharded", files | shards | {"model-00003-of-00002.safetensors": b"stray"})
    folder, commit = fetch("org/sharded", "", offline=False)
    assert {path.name for path in folder.iterdir()} == files.keys() | shards.keys()
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = failed("org/sharded", commit, offline=True)
    assert error.code == "RG501"
    assert "model-00002-of-00002.safetensors" in str(error)
    assert "model-00001" not in str(error)

    hub.add("org/broken", {**files, "model-00001-of-00002.safetensors": b"x"})
    error = failed("org/broken")
    assert error.code == "RG102"
    assert "model-00002-of-00002.safetensors" in str(error)


def test_a_repository_without_weights(hub: FakeHub) -> None:
    hub.add("org/gguf", {"config.json": b"{}", "model.Q4.gguf": b"x"})
    error = failed("org/gguf")
    assert error.code == "RG102"
    assert "model.Q4.gguf" in str(error)
    hub.add("org/empty", {"README.md": b"x"})
    assert failed("org/empty").code == "RG102"
    assert not [path for path in hub.paths("GET") if path.endswith("gguf")]


def test_opens_models_and_adapters(hub: FakeHub, tmp_path: Path) -> None:
    import peft

    base = models.save_model(tmp_path / "base", "llama")
    wrapped = peft.get_peft_model(models.model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "lora")
    commit = hub.add("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    lora = hub.add("org/lora", {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}, "v2")
    checkpoint = open_checkpoint("org/base+org/lora@v2")
    assert (checkpoint.repo_id, checkpoint.revision) == ("org/base", commit)
    assert checkpoint.adapters == (f"org/lora@{lora}",)
    assert checkpoint.model_type == "llama"


@pytest.mark.parametrize("offline", [False, True])
def test_opens_deltas(offline: bool, hub: FakeHub, tmp_path: Path) -> None:
    from regraft.deltas.extract import extract

    base = models.save_model(tmp_path / "base", "llama")
    tuned = models.save_fine_tune(tmp_path / "tuned", base, 1)
    (tuned / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (tuned / name).write_text("{{ messages }}")
    extract(open_checkpoint(str(tuned)), open_checkpoint(str(base)), tmp_path / "delta")
    for name in ("base", "delta"):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        hub.add(f"org/{name}", {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in files})
    checkpoint = open_checkpoint("org/base+org/delta")
    if offline:
        checkpoint = open_checkpoint("org/base+org/delta", offline=True)
    assert checkpoint.full_digest() == open_checkpoint(str(tuned)).full_digest()
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} <= set(checkpoint.files)
    for reference in ("org/delta", "org/base+org/tuned"):
        with pytest.raises(UserError) as caught:
            open_checkpoint(reference, offline=offline)
        assert caught.value.code in ("RG113", "RG501", "RG502")


# --- offline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "environment", "constant"])
def test_offline_uses_the_cache_alone(
    how: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    expected = fetch("org/model", "", offline=False)
    request.getfixturevalue("no_network")
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    if how == "constant":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("org/model", "", offline=how == "argument") == expected
    assert fetch("org/model", expected[1], offline=how == "argument") == expected


def test_offline_says_what_is_missing(hub: FakeHub, no_network: None) -> None:
    error = failed("org/other", offline=True)
    assert error.code == "RG501"
    assert "org/other is not in the local cache" in str(error)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_offline_names_a_missing_file(name: str, hub: FakeHub) -> None:
    folder, _ = fetch("org/model", "", offline=False)
    (folder / name).unlink()
    error = failed(offline=True)
    assert error.code == "RG501"
    assert ("weights" if name.startswith("model") else name) in str(error)
    assert "'v9'" in str(failed(revision="v9", offline=True))
    assert failed(revision="../../main", offline=True).code == "RG501"


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how", "code", "header"),
    [
        ("info", 404, "RG502", "RepoNotFound"),
        ("info", 401, "RG502", ""),
        ("info", 401, "RG502", "GatedRepo"),
        ("info", 403, "RG502", ""),
        ("info", 403, "RG502", "GatedRepo"),
        ("info", 500, "RG501", ""),
        ("info", 503, "RG501", ""),
        ("info", 429, "RG501", ""),
        ("info", "hang", "RG501", ""),
        ("info", "close", "RG501", ""),
        ("info", "html", "RG501", ""),
        ("head", 401, "RG502", "GatedRepo"),
        ("head", 403, "RG502", ""),
        ("head", 404, "RG503", "EntryNotFound"),
        ("head", 500, "RG501", ""),
        ("head", "hang", "RG501", ""),
        ("head", "close", "RG501", ""),
        ("head", "no etag", "RG501", ""),
        ("head", "no commit", "RG501", ""),
        ("head", "dead redirect", "RG501", ""),
        ("head", "wrong size", "RG503", ""),
        ("head", "wrong commit", "RG503", ""),
        ("get", 500, "RG501", ""),
        ("get", 403, "RG502", ""),
        ("get", "hang", "RG501", ""),
        ("get", "truncate", "RG503", ""),
        ("get", "corrupt", "RG503", ""),
        ("store", 500, "RG501", ""),
        ("store", "hang", "RG501", ""),
        ("store", "truncate", "RG503", ""),
        ("store", "corrupt", "RG503", ""),
    ],
)
def test_failures(kind: str, how: Any, code: str, header: str, hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.fail[kind] = how
    if header:
        hub.codes[kind] = header
    error = failed()
    assert error.code == code, str(error)
    assert error.fix
    assert capfd.readouterr() == ("", "")
    # nothing is left that a later run, online or not, would take for the whole
    assert not [name for name in cache_files(hub) if "incomplete" in name]
    assert failed(offline=True).code == "RG501"
    hub.fail.clear()
    folder, _ = fetch("org/model", "", offline=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_wrong_ids_and_revisions(hub: FakeHub) -> None:
    assert failed("org/nothing").code == "RG502"
    error = failed(revision="v9")
    assert error.code == "RG502"
    assert "'v9'" in str(error)
    for repo in ("a/b/c", "-x", "org/na..me", "", "org/x.git"):
        assert failed(repo).code == "RG502"


@pytest.mark.parametrize(("kind", "how"), [("info", 503), ("info", "close"), ("store", "truncate"), ("head", 502)])
def test_a_passing_failure_is_overcome(kind: str, how: Any, hub: FakeHub) -> None:
    hub.fail[kind], hub.times[kind] = how, 1
    folder, _ = fetch("org/model", "", offline=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_nothing_listens(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://user:password@127.0.0.1:{free.getsockname()[1]}")
        error = failed()
    assert error.code == "RG501"
    assert "password" not in str(error)


def test_an_unreachable_hub_does_not_mean_offline_but_says_that_the_cache_would_do(hub: FakeHub) -> None:
    fetch("org/model", "", offline=False)
    hub.fail["info"] = 500
    error = failed()
    assert error.code == "RG501"
    assert "local cache has a copy" in str(error)


def test_a_wrong_etag_is_noticed_by_the_content(hub: FakeHub) -> None:
    hub.fail["head"] = "wrong etag"
    # the cache names blobs by etag, so the second file is taken for a copy of the first
    error = failed()
    assert error.code == "RG503"
    assert failed(offline=True).code == "RG501"


def test_a_file_of_the_wrong_size_in_the_cache_is_replaced(hub: FakeHub) -> None:
    folder, _ = fetch("org/model", "", offline=False)
    (folder / "model.safetensors").resolve().write_bytes(b"cut")
    fetch("org/model", "", offline=False)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_too_little_disk_is_found_before_the_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    assert failed().code == "RG402"
    assert not [path for path in hub.paths("GET") if path.endswith("safetensors")]


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "RG402"), (errno.EROFS, "RG405"), (errno.EACCES, "RG405")])
def test_a_disk_that_fails_during_the_download(
    number: int, code: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert failed().code == code
    assert not [name for name in cache_files(hub) if "incomplete" in name]


def test_the_settings_of_huggingface_hub_are_left_as_they_were(hub: FakeHub) -> None:
    import logging

    before = huggingface_hub.utils.are_progress_bars_disabled(), logging.getLogger("huggingface_hub").level
    fetch("org/model", "", offline=False)
    assert (huggingface_hub.utils.are_progress_bars_disabled(), logging.getLogger("huggingface_hub").level) == before


def test_progress_is_shown_to_a_person(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = huggingface_hub.hf_hub_download

    def look(*args: Any, **kwargs: Any) -> str:
        seen.append(huggingface_hub.utils.are_progress_bars_disabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", look)
    monkeypatch.setattr(hub_module.sys.stderr, "isatty", lambda: True, raising=False)
    huggingface_hub.utils.enable_progress_bars()  # whatever ran before in this process
    fetch("org/model", "", offline=False)
    assert seen == [False] * len(FILES)
