"""The page in a real browser: it loads without a complaint, fits a phone, can be read and used. Needs Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, MISSING, Browser
from pages import sections
from regraft.report.page import render

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(render("A page", sections(), facts={"time": "3 s"}), encoding="utf-8")
    return path


HEADINGS = "[...document.querySelectorAll('#table-a-name thead th')].map((cell) => cell.ariaSort).join()"
NAMES = "[...document.querySelectorAll('#table-a-name tbody th')].map((cell) => cell.textContent).join()"
FOCUS = "document.activeElement.tagName + ' ' + document.activeElement.textContent.slice(0, 12)"


def test_the_page_loads_without_a_complaint(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.querySelectorAll('section').length") == len(sections())
    assert browser.console == []


def test_the_console_and_requests_are_really_watched(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("fetch('https://example.invalid/').catch(() => 0).then(() => console.log('said'))")
    browser.run("1")
    assert any("Content Security Policy" in line for line in browser.console)
    assert any("said" in line for line in browser.console)


def test_a_click_sorts_the_table(browser: Browser, page: Path) -> None:
    browser.open(page)
    order = [(browser.run(NAMES), browser.run(HEADINGS))]
    for column in (2, 2, 1, 1):
        browser.click(f"#table-a-name thead th:nth-child({column}) button")
        order.append((browser.run(NAMES), browser.run(HEADINGS)))
    assert order == [
        ("a name,b,c", "none,none,none"),
        ("b,a name,c", "none,descending,none"),
        ("a name,b,c", "none,ascending,none"),
        ("a name,b,c", "ascending,none,none"),
        ("c,b,a name", "descending,none,none"),
    ]


def test_the_keyboard_sorts_the_table(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('#table-a-name .scroll').focus()")
    browser.press("Tab", 2)
    assert browser.run(FOCUS) == "BUTTON accuracy %"
    browser.press("Enter")
    assert browser.run(NAMES) == "b,a name,c"
    browser.press(" ")
    assert browser.run(NAMES) == "a name,b,c"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_the_first_tab_skips_to_the_results(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab")
    assert browser.run(FOCUS) == "A Skip to the "
    box = browser.run("(({left, top}) => [left, top])(document.activeElement.getBoundingClientRect())")
    assert box[0] >= 0
    assert box[1] >= 0


def test_everything_that_can_be_used_is_reached_in_the_order_of_the_page(browser: Browser, page: Path) -> None:
    browser.open(page)
    count = browser.run("""[...document.querySelectorAll('a, button, summary, [tabindex]')]
        .filter((one) => one.checkVisibility()).map((one, i) => one.dataset.place = i).length""")
    places = []
    for _ in range(count):
        browser.press("Tab")
        places.append(int(browser.run("document.activeElement.dataset.place ?? -1")))
    assert places == list(range(count))


def test_the_graph_has_its_nodes_and_leads_to_what_is_known_of_them(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.querySelectorAll('svg.graph .node').length") == 5
    assert browser.run("document.querySelector('svg.graph a').getAttribute('aria-label')") == "base"
    assert browser.run("document.getElementById('model:1').open") is False
    browser.run("document.querySelectorAll('svg.graph a')[1].focus()")
    near = "[...document.querySelectorAll('svg.graph .node.near .label')].map((one) => one.textContent).join()"
    assert browser.run(near) == "base,a name,x,y"  # what it was made from, and what was made of it
    assert browser.run("document.querySelectorAll('svg.graph .edge.near').length") == 1 + 1 + 2
    browser.press("Enter")
    assert browser.run("document.getElementById('model:1').open") is True
    # Going to a fragment takes the focus away; the page gives it back as soon as it hears of that.
    assert browser.run("""new Promise((done) => {
        const until = Date.now() + 10_000;
        const look = () => document.activeElement.parentElement?.id === "model:1" ? done(true)
            : Date.now() > until ? done(false) : setTimeout(look, 10);
        look();
    })""")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_window_scrolls_tables_and_not_the_page(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width, height=844, phone=True)
    assert browser.run("document.documentElement.scrollWidth") == width
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("Math.min(...[...document.querySelectorAll('p, td, dd')].map((one) => "
                       "parseFloat(getComputedStyle(one).fontSize)))") >= 14  # fmt: skip


def test_paper_has_everything_and_no_controls(browser: Browser, page: Path) -> None:
    browser.open(page, media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("[...document.querySelectorAll('details')].every((one) => one.open)")
    assert browser.run("document.querySelector('nav').checkVisibility()") is False
    assert browser.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"


# WCAG's contrast of every text with what is behind it, cells of heat maps with their opacity included.
CONTRAST = """(() => {
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((n) => n * scale), numbers[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = (one) => {
    const layers = [];
    for (let e = one; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const poor = [];
  let seen = 0;
  const check = (text, ink, ground, large) => {
    const [a, b] = [light(over(ink, ground)), light(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < (large ? 3 : 4.5)) poor.push(`${text.slice(0, 30)}: ${ratio.toFixed(2)}`);
  };
  for (const one of document.querySelectorAll("body *")) {
    const style = getComputedStyle(one);
    const own = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !one.checkVisibility() || one.closest(".hidden, .skip, script, style, title")) continue;
    if (one.tagName === "text") {
      let ground = behind(one.closest("div"));
      for (const cell of one.ownerSVGElement.querySelectorAll("rect.cell, rect.box")) {
        const [t, r] = [one.getBoundingClientRect(), cell.getBoundingClientRect()];
        const [x, y] = [(t.left + t.right) / 2, (t.top + t.bottom) / 2];
        if (x > r.left && x < r.right && y > r.top && y < r.bottom) {
          const paint = getComputedStyle(cell);
          ground = over([...parse(paint.fill).slice(0, 3), Number(paint.fillOpacity)], ground);
        }
      }
      check(one.textContent, parse(style.fill), ground, false);
    } else {
      check(one.textContent, parse(style.color), behind(one), parseFloat(style.fontSize) >= 24);
    }
  }
  return { seen, poor };
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out_from_its_ground(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    found: dict[str, Any] = browser.run(CONTRAST)
    assert found["poor"] == []
    assert found["seen"] > 150
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(18, 25, 27)") is dark


def test_the_measure_of_contrast_finds_what_is_pale(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('h2').style.color = '#bbbbbb'")
    browser.run("document.querySelector('rect.cell').style.fill = '#000000'")
    browser.run("document.querySelector('rect.cell').style.fillOpacity = 0.9")
    assert len(browser.run(CONTRAST)["poor"]) == 2
