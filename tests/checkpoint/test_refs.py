"""References to models: what they mean, and where the paths in a model's folder may lead."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.checkpoint import model
from regraft.checkpoint.model import Ref, open_checkpoint, parse_ref
from regraft.checkpoint.paths import inside, looks_like_path
from regraft.errors import UserError


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("gpt2", Ref("gpt2")),
        ("org/m", Ref("org/m")),
        ("org/m@main", Ref("org/m", "main")),
        ("org/m@refs/pr/1", Ref("org/m", "refs/pr/1")),
        ("org/m@rev+./lora@rev2", Ref("org/m", "rev", (Ref("./lora@rev2"),))),
        ("org/m+org/lora@v2+other/lora", Ref("org/m", "", (Ref("org/lora", "v2"), Ref("other/lora")))),
        ("./none", Ref("./none")),
        ("./has@sign", Ref("./has@sign")),
        ("  org/m ", Ref("org/m")),
    ],
)
def test_parse(text: str, ref: Ref, tmp_path: Path) -> None:
    assert parse_ref(text, relative_to=tmp_path) == ref


def test_existing_paths_win_over_separators(tmp_path: Path) -> None:
    for name in ("a+b", "c@d", "base", "base+lora@1", "lora"):
        (tmp_path / name).mkdir()

    def parse(text: str) -> Ref:
        return parse_ref(text, relative_to=tmp_path)

    assert parse("a+b") == Ref("a+b")
    assert parse("a+b+lora") == Ref("a+b", "", (Ref("lora"),))
    assert parse("c@d+a+b") == Ref("c@d", "", (Ref("a+b"),))
    assert parse("base+lora") == Ref("base", "", (Ref("lora"),))
    assert parse("base+lora@1") == Ref("base+lora@1")
    assert parse("base+lora@2") == Ref("base", "", (Ref("lora", "2"),))
    assert parse("./base@2") == Ref("./base", "2")
    assert parse(str(tmp_path / "a+b") + "+org/lora") == Ref(str(tmp_path / "a+b"), "", (Ref("org/lora"),))


@pytest.mark.parametrize("text", ["", " ", "+lora", "org/m+", "org/m++x", "org/m@", "@main", "org/m@+x"])
def test_empty_parts(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_ref(text)
    assert caught.value.code == "RG101"


ids = st.from_regex(r"[a-z][a-z0-9_-]{0,6}/[a-z][a-z0-9._-]{0,6}[a-z0-9]", fullmatch=True).filter(
    lambda s: ".." not in s
)
revisions = st.from_regex(r"([a-f0-9]{7})?", fullmatch=True)


@given(ids, revisions, st.lists(st.tuples(ids, revisions), max_size=3))
def test_text_of_a_reference_parses_to_itself(name: str, revision: str, adapters: list[tuple[str, str]]) -> None:
    ref = Ref(name, revision, tuple(Ref(*adapter) for adapter in adapters))
    assert parse_ref(str(ref)) == ref


@given(st.text(max_size=30))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        assert parse_ref(text).model
    except UserError as error:
        assert error.code == "RG101"  # noqa: PT017 - most examples parse


def test_what_looks_like_a_path() -> None:
    for path in ("./x", "../x", "/x", "~/x", "x/", "a/b/c", "x.safetensors", "a/pytorch_model.bin", "a b", "a\\b", "."):
        assert looks_like_path(path), path
    for name in ("gpt2", "org/name", "org/name-1.5_b"):
        assert not looks_like_path(name), name


def test_missing_paths_say_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "models" / "llama-base").mkdir(parents=True)
    cases = {
        "./models/llama-bsae": "llama-base",
        str(tmp_path / "models" / "lama-base"): "llama-base",
        "./modles/x/y": "the last folder of it that exists",
        "./nothing-like-it": "check the path",
        "models/llama-base/model.safetensors": "check the path",
        "https://huggingface.co/org/name": "such as org/name",
        "\0": "no such file",
    }
    for text, hint in cases.items():
        with pytest.raises(UserError, match=hint) as caught:
            open_checkpoint(text, relative_to=tmp_path)
        assert caught.value.code == "RG101"


def test_local_paths_have_no_revision(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match="no revision 'v1'") as caught:
        open_checkpoint("base@v1", relative_to=tmp_path)
    assert caught.value.code == "RG101"


def test_hub_ids_are_fetched_and_near_folders_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(repo_id: str, revision: str, *, offline: bool) -> tuple[Path, str]:
        asked.append((repo_id, revision, offline))
        raise UserError("RG502", "the Hub has no such model", where=repo_id, fix="check the id")

    hub = ModuleType("regraft.checkpoint.hub")
    hub.fetch = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "regraft.checkpoint.hub", hub)
    (tmp_path / "org" / "model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"did you mean .*org/model") as caught:
        open_checkpoint("org/modell@main", relative_to=tmp_path, offline=True)
    assert caught.value.code == "RG502"
    with pytest.raises(
        UserError, match=r"check the id; if a folder is meant, there is none called 'other/thing' here$"
    ):
        open_checkpoint("other/thing", relative_to=tmp_path)
    assert asked == [("org/modell", "main", True), ("other/thing", "", False)]


def test_adapters_are_applied_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[Any] = []

    def apply(base: model.Checkpoint, folder: Path, ref: str) -> model.Checkpoint:
        applied.append((base.ref, folder, ref))
        return base

    adapter = ModuleType("regraft.checkpoint.adapter")
    adapter.apply = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "regraft.checkpoint.adapter", adapter)
    monkeypatch.setattr(model, "open_local", lambda path: model.Checkpoint(str(path), path, {}))
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
    hub = ModuleType("regraft.checkpoint.hub")
    hub.fetch = lambda repo_id, revision, *, offline: (tmp_path / "two", "c0ffee")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "regraft.checkpoint.hub", hub)
    ref = "./base+./one+org/two@main"
    opened = open_checkpoint(ref, relative_to=tmp_path)
    assert applied == [(ref, tmp_path / "one", "./one"), (ref, tmp_path / "two", "org/two@c0ffee")]
    assert (opened.repo_id, opened.revision) == ("", "")
    opened = open_checkpoint("org/model@main", relative_to=tmp_path)
    assert (opened.ref, opened.repo_id, opened.revision) == ("org/model@main", "org/model", "c0ffee")


# ---------------------------------------------------------------- names and links within a folder


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "..", ".", "", "a\0b", "C:\\x", "C:x", "a\\..\\b"]
)
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no plain file name") as caught:
        inside(tmp_path, name, where="index.json")
    assert caught.value.code == "RG104"
    assert "index.json" in str(caught.value)


def test_links_that_leave_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "real").write_text("x")
    (folder / "good").symlink_to("real")
    (folder / "bad").symlink_to(outside)
    (folder / "hop").symlink_to("bad")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    assert inside(folder, "good", where="x") == folder / "good"
    assert inside(folder, "not/there", where="x") == folder / "not/there"
    for name in ("bad", "hop", "up/outside", "up"):
        with pytest.raises(UserError, match="outside the model's folder") as caught:
            inside(folder, name, where="x")
        assert caught.value.code == "RG104"
    (tmp_path / "alias").symlink_to(folder)  # the folder itself may be a link: the user named it
    assert inside(tmp_path / "alias", "good", where="x")


def hub_cache(root: Path) -> tuple[Path, Path]:
    repo = root / "models--org--m"
    snapshot, blobs = repo / "snapshots" / "0123abcd", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("x")
    return snapshot, blobs


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path)
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "x").symlink_to("../../../blobs/hash")
    assert inside(snapshot, "model.safetensors", where="x")
    assert inside(snapshot / "sub", "x", where="x")
    (blobs.parent / "refs").write_text("x")
    (snapshot / "bad").symlink_to("../../refs")
    with pytest.raises(UserError, match="outside"):
        inside(snapshot, "bad", where="x")


def test_only_the_own_cache_counts(tmp_path: Path) -> None:
    snapshot, _ = hub_cache(tmp_path / "one")
    _, foreign = hub_cache(tmp_path / "two")
    (snapshot / "x").symlink_to(foreign / "hash")
    with pytest.raises(UserError, match="outside"):
        inside(snapshot, "x", where="x")


def test_blobs_shared_by_the_repositories_of_a_cache(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path / "hub")
    digits = "ab" + "0" * 62
    for place in (f"blobs/ab/{digits}", "blobs/se/secret", f"blobs/cd/{digits}", f"other/ab/{digits}"):
        path = tmp_path / "hub" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        link = blobs / place.replace("/", "-")
        link.symlink_to(path)
        (snapshot / link.name).symlink_to(f"../../blobs/{link.name}")
        if place == f"blobs/ab/{digits}":
            assert inside(snapshot, link.name, where="x")
        else:
            with pytest.raises(UserError, match="outside"):
                inside(snapshot, link.name, where="x")


def test_linked_blobs_do_not_count(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path)
    secret = tmp_path / "secret"
    blobs.rename(secret)
    blobs.symlink_to(secret)
    (snapshot / "x").symlink_to("../../blobs/hash")
    with pytest.raises(UserError, match="outside"):
        inside(snapshot, "x", where="x")
