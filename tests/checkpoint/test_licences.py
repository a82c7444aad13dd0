"""Licences: what cards state, and the rule that combines them. Never a default for what is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.checkpoint import licences
from regraft.checkpoint.licences import Statement, combine, front_matter, kinds, on_hub, read_licence
from regraft.checkpoint.model import Checkpoint, open_checkpoint


def parent(folder: Path, card: str | None, files: Sequence[str] = ()) -> Checkpoint:
    folder.mkdir()
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    for name in files:
        (folder / name).write_text("All rights reserved.")
    return open_checkpoint(str(folder))


def licensed(tmp_path: Path, *stated: str) -> list[Checkpoint]:
    return [parent(tmp_path / f"p{i}", f"---\n{text}\n---\n# p{i}\n") for i, text in enumerate(stated)]


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\nText", Statement(("apache-2.0",))),
        ("\ufeff---\r\nlicense: MIT\r\n---\r\nText", Statement(("mit",))),
        ("---\nlicense: [mit, apache-2.0]\n---\n", Statement(("mit", "apache-2.0"))),
        (
            "---\nlicense: other\nlicense_name: Qwen\nlicense_link: LICENSE\n---\n",
            Statement(("qwen",), link="LICENSE"),
        ),
        ("---\nlicense: other\n---\n", Statement(remark="its card says 'other' and names no licence")),
        ("---\nlicense: unknown\n---\n", Statement(remark="its card states no licence")),
        ("---\nlicense:\n---\n", Statement(remark="its card states no licence")),
        ("---\nlicense: {nested: mit}\n---\n", Statement(remark="its card states no licence")),
        ("---\nlanguage: en\n---\nLicensed under MIT.", Statement(remark="its card states no licence")),
        ("# Only text, license: mit", Statement(remark="its card has no front matter")),
        ("---\nlicense: mit\n", Statement(remark="its card has no front matter")),
        ("---\nlicense: [mit\n---\n", Statement(remark="the front matter of its card is not valid YAML")),
        ("---\n!!python/object:os.system x\n---\n", Statement(remark="the front matter of its card is no mapping")),
        ("---\n- mit\n---\n", Statement(remark="the front matter of its card is no mapping")),
        (
            "---\n" + "[" * 5000 + "\n---\n",
            Statement(remark="the front matter of its card is too long or nested too deeply"),
        ),
        ("---\nlicense: mit\ndate: 2024-99-99\n---\n", Statement(("mit",))),
        (None, Statement(remark="it has no card")),
    ],
)
def test_what_a_card_states(tmp_path: Path, card: str | None, expected: Statement) -> None:
    assert read_licence(parent(tmp_path / "p", card)) == expected


def test_the_language_no_is_a_text(tmp_path: Path) -> None:
    data, _ = front_matter(parent(tmp_path / "p", "---\nlanguage: no\n---\n"))
    assert data == {"language": "no"}


def test_a_licence_file_is_noticed_and_not_interpreted(tmp_path: Path) -> None:
    verdict = combine([parent(tmp_path / "p", None, ["LICENSE.txt", "NOTICE"])])
    assert verdict.licence is None
    assert verdict.unknown == ["p: it has no card; LICENSE.txt was not interpreted"]


@pytest.mark.parametrize("licence", ["apache-2.0", "cc-by-nc-4.0", "llama3.1", "gpl-3.0", "gemma"])
def test_equal_licences_stay(tmp_path: Path, licence: str) -> None:
    verdict = combine(licensed(tmp_path, f"license: {licence}", f"license: {licence}"))
    assert (verdict.licence, verdict.conflicts, verdict.unknown) == (licence, [], [])


def test_unknown_stays_unknown(tmp_path: Path) -> None:
    verdict = combine(licensed(tmp_path, "license: mit", "language: en"))
    assert verdict.licence is None
    assert verdict.unknown == ["p1: its card states no licence"]
    assert verdict.conflicts == []


def test_permissive_licences_give_the_one_with_most_duties(tmp_path: Path) -> None:
    verdict = combine(licensed(tmp_path, "license: mit", "license: apache-2.0", "license: cc0-1.0"))
    assert verdict.licence == "apache-2.0"
    assert verdict.conflicts == []
    assert verdict.inherited == [
        "cc0-1.0, of p2: its notice and terms go along",
        "mit, of p0: its notice and terms go along",
    ]


@pytest.mark.parametrize(
    ("other", "licence", "says"),
    [
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0", "cc-by-nc-4.0 (p1) is non-commercial, and mit is not the same"),
        ("license: gpl-3.0", "gpl-3.0", "gpl-3.0 (p1) is share-alike, and mit is not the same"),
        ("license: cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", "is non-commercial and share-alike"),
        ("license: llama3.1", "llama3.1", "is a licence with terms of its own"),
        ("license: other\nlicense_name: qwen-research", "qwen-research", "non-commercial"),
        ("license: other\nlicense_name: acme", "acme", "the terms of acme (p1) are not known here"),
        ("license: cc", "cc", "the terms of cc (p1) are not known here"),
        ("license: cc-by-nd-4.0", "cc-by-nd-4.0", "allows no changed versions"),
    ],
)
def test_other_mixtures_are_conflicts(tmp_path: Path, other: str, licence: str, says: str) -> None:
    verdict = combine(licensed(tmp_path, "license: mit", other))
    assert verdict.licence == licence
    assert says in " | ".join(verdict.conflicts)


def test_two_restrictive_licences_determine_none(tmp_path: Path) -> None:
    verdict = combine(licensed(tmp_path, "license: gemma", "license: llama3.1"))
    assert verdict.licence is None
    assert len(verdict.conflicts) == 2
    assert any("Llama" in duty for duty in verdict.inherited)


def test_no_derivatives_conflicts_even_with_itself(tmp_path: Path) -> None:
    verdict = combine(licensed(tmp_path, "license: cc-by-nd-4.0", "license: cc-by-nd-4.0"))
    assert verdict.conflicts == ["cc-by-nd-4.0 (p0, p1) allows no changed versions"]


def test_the_link_of_a_named_licence_travels(tmp_path: Path) -> None:
    card = "license: other\nlicense_name: qwen\nlicense_link: https://example.org/LICENSE"
    assert combine(licensed(tmp_path, card, card)).link == "https://example.org/LICENSE"


def test_an_adapter_makes_the_licence_unknown(tmp_path: Path) -> None:
    import dataclasses

    (model,) = licensed(tmp_path, "license: mit")
    verdict = combine([dataclasses.replace(model, adapters=("org/lora",))])
    assert verdict.licence is None
    assert verdict.unknown == ["org/lora: the licence of an adapter is not read"]


@given(st.lists(st.sampled_from(sorted(licences._KINDS)), min_size=1, max_size=5), st.randoms())
def test_the_order_of_parents_does_not_matter(names: list[str], random: object) -> None:
    from unittest.mock import patch

    def verdict(order: list[str]) -> tuple[str | None, list[str]]:
        stated = iter([Statement((name,)) for name in order])
        with patch.object(licences, "read_licence", lambda _: next(stated)):
            fakes = [Checkpoint(ref=n, path=Path(n), tensors={}) for n in order]
            found = combine(fakes)
        return found.licence, sorted(c.split(" (")[0] for c in found.conflicts)

    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert verdict(names) == verdict(shuffled)
    licence, conflicts = verdict(names)
    assert licence is None or licence in names
    permissive = all(licences.PERMISSIVE in kinds(name) for name in names)
    assert bool(conflicts) == (
        any(licences.NO_DERIVATIVES in kinds(name) for name in names) or (len(set(names)) > 1 and not permissive)
    )


def test_the_table_knows_the_hubs_identifiers() -> None:
    assert on_hub("apache-2.0")
    assert on_hub("cc")
    assert not on_hub("qwen")
    assert kinds("qwen")
    assert not kinds("nobody-knows")
