"""The HTML page: its structure, that nothing gets in unescaped, and that nothing is fetched from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pages import sections
from regraft.errors import UserError
from regraft.report.charts import heat_map, lines
from regraft.report.graph import Edge, Node
from regraft.report.markup import Markup, tag
from regraft.report.page import render, write_page
from regraft.report.sections import Column, Figure, Graph, Table, Text

VOID = {"meta", "br", "wbr"}
NASTY = """<script>alert("x")</script>&'"><img src=http://evil.example/x onerror=alert(1)>"""


class Tree(HTMLParser):
    """Collects elements and texts, and insists on balanced tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]

    def words(self) -> str:
        return " ".join(text for where, text in self.texts if where not in ("script", "style"))


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree(render("A title", sections(), summary=["What was found"], facts={"time": "3 s"}))


def test_a_page_has_headings_landmarks_and_contents(tree: Tree) -> None:
    names = [name for name, _ in tree.elements]
    assert names.count("h1") == 1
    assert names.count("h2") == names.count("section") == len(sections())
    assert {"header", "nav", "main", "footer"} <= set(names)
    assert tree.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in tree.all("meta"))
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in tree.all("a"):
        assert (link["href"] or "").removeprefix("#") in ids
    assert "What was found" in tree.words()


def test_tables_are_sortable_by_keyboard_and_say_so(tree: Tree) -> None:
    columns = [th for th in tree.all("th") if th.get("scope") == "col"]
    assert len(columns) == 4
    assert all(th["aria-sort"] == "none" for th in columns)
    assert len([b for b in tree.all("button") if b["type"] == "button"]) == 4
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in tree.all("div") if box.get("class") == "scroll")


def test_the_best_is_marked_in_its_own_direction(tree: Tree) -> None:
    marked = [text for where, text in tree.texts if where == "strong"]
    assert marked == ["75.0", "1.250", "1.250"]
    assert "40.0–60.0" in [text for where, text in tree.texts if where == "small"]


def test_drawings_have_names(tree: Tree) -> None:
    charts = [svg for svg in tree.all("svg") if svg.get("class", "") and "chart" in (svg["class"] or "")]
    assert len(charts) == 9
    assert [svg["role"] for svg in charts if "graph" in (svg["class"] or "")] == ["group"]  # it has links inside
    assert all(svg["role"] == "img" for svg in tree.all("svg") if "graph" not in (svg.get("class") or ""))
    assert len([link for link in tree.all("a") if link.get("aria-label")]) == 5
    assert any("95 % interval 40.0 to 60.0" in (svg.get("aria-label") or "") for svg in tree.all("svg"))


def test_merges_of_the_same_models_share_a_joint(tree: Tree) -> None:
    edges = [path for path in tree.all("path") if path.get("class") == "edge"]
    assert len(edges) == 2 + 4
    assert len([c for c in tree.all("circle") if c.get("class") == "joint"]) == 1


def test_nothing_comes_from_elsewhere() -> None:
    page = render("t", sections())
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"(?m)^\s*//.*$", "", page))
    assert not re.search(r"url\(|@import|<link|<img|<iframe|<base", page)
    policy = next(meta["content"] for meta in Tree(page).all("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in (policy or "")


def test_nothing_gets_in_unescaped() -> None:
    page = Tree(render(NASTY, sections(NASTY), summary=[NASTY], facts={NASTY: NASTY}))
    clean = Tree(render("t", sections("n"), summary=["n"], facts={"n": "n"}))
    assert [name for name, _ in page.elements if name != "wbr"] == [name for name, _ in clean.elements]
    assert page.words().count('alert("x")') >= 8
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


@given(st.text(max_size=60))
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    text = text.replace("\r", " ").replace("\0", " ")
    read = Tree(tag("p", text, title=text))
    assert "".join(part for _, part in read.texts) == text
    assert read.all("p")[0]["title"] == text


def test_markup_is_kept_and_attributes_are_written() -> None:
    assert tag("p", Markup("<b>x</b>"), None, class_="a", aria_label="b", hidden=True, id=None) == (
        '<p class="a" aria-label="b" hidden><b>x</b></p>'
    )


@pytest.mark.parametrize(
    ("nodes", "edges", "words"),
    [("ab", [("a", "c")], "not in the graph"), ("ab", [("a", "b"), ("b", "a")], "from one another")],
)
def test_graphs_that_cannot_be_drawn(nodes: str, edges: list[tuple[str, str]], words: str) -> None:
    graph = Graph("g", [Node(n, n) for n in nodes], [Edge(a, b) for a, b in edges])
    with pytest.raises(ValueError, match=words):
        graph.html()


def test_empty_and_odd_contents_are_drawn() -> None:
    odd: list[Any] = [
        Table("t", [Column("a"), Column("b", better="high")], []),
        Table("t", [Column("a"), Column("b", better="high")], [["x", 1]]),
        Graph("g", [], []),
        Figure("f", lines({"a": [1.0]}, ["0"], title="t", y_title="y")),
        Figure("f", heat_map(["a"], ["b"], [[float("nan")]], title="t")),
        Text("!?"),
    ]
    page = Tree(render("t", odd))
    assert [s["id"] for s in page.all("section")] == ["t", "t-2", "g", "f", "f-2", "part"]


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    written = write_page(tmp_path / "report.html", title="t", sections=[])
    assert written.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(UserError) as caught:
        write_page(tmp_path / "none" / "report.html", title="t", sections=[])
    assert caught.value.code == "RG405"


def test_what_rounds_to_zero_has_no_sign_of_its_own() -> None:
    drawing = heat_map(["a"], ["b", "c", "d"], [[-0.001, -0.5, 0.001]], title="t", low=-1.0)
    assert [text for where, text in Tree(drawing).texts if where == "text"] == [
        "b",
        "c",
        "d",
        "a",
        "0.00",
        "−0.50",
        "0.00",
    ]


def test_long_texts_in_tables_are_no_slivers() -> None:
    page = Tree(Table("t", [Column("a"), Column("b")], [["x", "a sentence of some length"], ["y", "no"]]).html())
    assert [cell.get("class") for cell in page.all("td")] == ["long", None]
