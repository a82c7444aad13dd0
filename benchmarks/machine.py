"""What a result depends on beside the program: the kind of machine and the versions; never names or paths."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from regraft.checkpoint.lineage import Hardware
from regraft.version import __version__

PACKAGES = ("mergekit", "torch", "numpy", "safetensors", "transformers")


def describe(work: Path, mergekit: Path | None) -> dict[str, Any]:
    """Processor, memory, disk below `work`, kernel, and the versions in both environments, JSON-able.

    Raises:
        ValueError: there is no mergekit in its environment.
    """
    hardware = Hardware()
    facts: dict[str, Any] = {
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "memory_bytes": hardware.memory_bytes,
        "disk": disk(work),
        "system": f"{platform.system()} {_release()} {platform.machine()}",
        "regraft": {"regraft": f"{__version__}{_commit()}", **_versions(Path(sys.executable))},
    }
    facts["regraft"].pop("mergekit", None)
    if mergekit is not None:
        facts["mergekit"] = _versions(mergekit.parent / "python")
        if "mergekit" not in facts["mergekit"]:
            raise ValueError(f"the Python beside {mergekit} has no mergekit: name the one in its own environment")
    return facts


def _versions(python: Path) -> dict[str, str]:
    """Of Python and of `PACKAGES` in the environment of this interpreter, as far as they are there."""
    code = (
        "import json, platform, sys\nfrom importlib import metadata\n"
        "found = {d.name.lower(): d.version for d in metadata.distributions()}\n"
        "print(json.dumps({'python': platform.python_version()} | {p: found[p] for p in sys.argv[1:] if p in found}))"
    )
    try:
        done = subprocess.run([python, "-c", code, *PACKAGES], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"the versions in an environment cannot be told: {error}") from None
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def _release() -> str:
    """The kernel's version, without what its builder has appended."""
    found = re.match(r"[\d.]+", platform.release())
    return found[0].rstrip(".") if found else platform.release()


def _commit() -> str:
    """` (commit abc1234)` where regraft is a checkout with git at hand, with a remark if it was changed; else ""."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "../src"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" (commit {commit.stdout.strip()}{', changed' if changes.stdout.strip() else ''})"


def disk(path: Path) -> str:
    """The file system and the kind of disk that `path` is on, as far as Linux tells: `ext4 on a virtual disk`."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return "not told by this system"
    kinds = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number]
    block = Path("/sys/dev/block") / number
    if not block.exists():
        return kinds[0] if kinds else "unknown"
    block = block.resolve()
    block = block if (block / "queue").exists() else block.parent  # a partition has no queue of its own
    if block.name.startswith(("vd", "xvd")):
        kind = "a virtual disk"
    elif block.name.startswith("nvme"):
        kind = "an NVMe disk"
    else:
        rotates = (block / "queue" / "rotational").read_text(encoding="ascii").strip() == "1"
        kind = "a rotating disk" if rotates else "a solid-state disk"
    return f"{kinds[0] if kinds else 'a file system'} on {kind}"
