"""A folder with claims that take no time, and the repository's own claims at scale "smoke"."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for `from claims import ...`

TINY = '''"""What it does and why."""

from pathlib import Path

from regraft.claims.claim import Check, Claim, Plot, Row
from regraft.methods import Paper


def run(seed, scale):
    log = Path(__file__).with_name("ran.txt")
    log.write_text((log.read_text() if log.exists() else "") + f"{seed} {scale}\\n")
    stop = Path(__file__).with_name("stop_at")
    if stop.exists() and int(stop.read_text()) == seed:
        raise RuntimeError("power cut")
    return {"ours": 0.8 + 0.01 * seed, "theirs": 0.7 + 0.005 * seed}


CLAIM = Claim(
    title="Tiny",
    paper=Paper("A paper", "Somebody", "Nowhere 2020", "2001.00001", NUMBER),
    sentence="Ours is better.",
    baselines=("theirs",),
    run=run,
    checks=(
        Check("ours is better", lambda f: f["ours"] - f["theirs"], 0.01),
        Check("and not by luck", lambda f: f["theirs"], 0.9, decides=False),
    ),
    plot=Plot("Accuracy, %", (Row("theirs", "theirs", "baselines"), Row("ours", "ours", "new"))),
)
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """`claims/` with the claims 01 and 02."""
    folder = tmp_path / "claims"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"{number:02d}_tiny.py").write_text(TINY.replace("NUMBER", str(number)), encoding="utf-8")
    return folder
