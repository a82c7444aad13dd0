"""The page in a real browser: it loads without a complaint, fits a phone, and its tables sort. Needs Chromium."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pages import sections
from regraft.report.page import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")


def load(page: Path, *options: str) -> tuple[str, str]:
    """(the document after its scripts ran, what the console said)."""
    assert CHROMIUM is not None
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *fixed, profile, "--enable-logging=stderr", *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"HOME": str(page.parent)},
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probe(tmp_path: Path, script: str) -> tuple[str, str]:
    """The page with a script behind its own, whose result it puts into the title of the document."""
    page = render("A page", sections()).replace("</body>", f"<script>document.title = {script}</script></body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    document, console = load(tmp_path / "page.html", "--window-size=500,900")
    found = re.search(r"<title>(.*?)</title>", document)
    assert found
    return found[1], console


def test_the_page_loads_without_a_complaint(tmp_path: Path) -> None:
    title, console = probe(tmp_path, "document.querySelectorAll('section').length")
    assert title == "7"
    assert console == ""


def test_the_console_is_really_read(tmp_path: Path) -> None:
    _, console = probe(tmp_path, "fetch('https://example.invalid/').catch(() => 0) && 'x'")
    assert "Content Security Policy" in console


def test_a_click_sorts_the_table(tmp_path: Path) -> None:
    click = "document.querySelectorAll('thead button')[{}].click();"
    read = "[...document.querySelectorAll('tbody th')].map((cell) => cell.textContent).join() + ' ' + "
    read += "[...document.querySelectorAll('thead th')].map((cell) => cell.ariaSort).join()"

    def after(*clicks: int) -> str:
        return probe(tmp_path, f"(() => {{ {''.join(click.format(i) for i in clicks)} return {read}; }})()")[0]

    assert after() == "a name,b,c none,none,none"
    assert after(1) == "b,a name,c none,descending,none"
    assert after(1, 1) == "a name,b,c none,ascending,none"
    assert after(0, 0) == "c,b,a name descending,none,none"


def test_a_narrow_window_scrolls_tables_and_not_the_page(tmp_path: Path) -> None:
    title, _ = probe(tmp_path, "document.documentElement.scrollWidth <= window.innerWidth")
    assert title == "true"
