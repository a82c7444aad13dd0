"""The runs of a benchmark: each a whole process on warm files, with the output checked and removed afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import measure, warm
from recipes import Written
from synthetic import Checkpoints

from regraft.checkpoint import open_checkpoint
from regraft.errors import UserError

CACHED_SHARE = 0.8  # of the memory: beyond that, inputs and output do not stay in the page cache together
_INCOMPLETE = -1000  # in place of an exit status: it ended well, but the output is not the whole model


class Runner:
    """Runs either tool on recipes in `work`. Both see the same variables and no network."""

    def __init__(
        self,
        work: Path,
        mergekit: Path | None,
        *,
        regraft: Sequence[str] = (),
        mergekit_options: Sequence[str] = (),
        timeout: float,
    ) -> None:
        self.mergekit_path, self._timeout = mergekit, timeout
        self._regraft_options, self._mergekit_options = list(regraft), list(mergekit_options)
        self._out, self._log = work / "out", work / "log.txt"
        left_out = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")  # neither is a user's default
        self._env = {k: v for k, v in os.environ.items() if k not in left_out} | {"HF_HUB_OFFLINE": "1"}

    def regraft(self, recipe: Written, models: Checkpoints, *, limit: int | None = None) -> dict[str, Any]:
        """`regraft merge`, perhaps with at most `limit` bytes of private memory."""
        argv = [sys.executable, "-m", "regraft", "merge", "-q", *self._regraft_options, "recipe.yaml"]
        return self._run([*argv, str(self._out / "model")], recipe, models, limit)

    def mergekit(self, recipe: Written, models: Checkpoints) -> dict[str, Any]:
        """`mergekit-yaml` with its defaults."""
        argv = [str(self.mergekit_path), "--quiet", *self._mergekit_options, "recipe.yaml"]
        return self._run([*argv, str(self._out / "model")], recipe, models, None)

    def predict(self, recipe: Written, models: Checkpoints) -> dict[str, float]:
        """What `regraft plan` says of memory and time.

        Raises:
            ValueError: it refuses the recipe.
        """
        (models.folder / "recipe.yaml").write_text(recipe.text, encoding="utf-8")
        argv = [sys.executable, "-m", "regraft", "plan", "--json", "-q", *self._regraft_options, "recipe.yaml"]
        done = subprocess.run(argv, cwd=models.folder, env=self._env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"regraft plan failed:\n{done.stderr}")
        plan = json.loads(done.stdout)
        return {key: plan[key] for key in ("memory_bytes", "seconds_estimated")}

    def _run(self, argv: list[str], recipe: Written, models: Checkpoints, limit: int | None) -> dict[str, Any]:
        """One timed run. Before it, inputs are read into the page cache and earlier writes are waited for."""
        (models.folder / "recipe.yaml").write_text(recipe.text, encoding="utf-8")
        self._clear()
        os.sync()
        if self.fits_cache(models, recipe):
            warm(models.weights(*recipe.reads))
        limits: dict[str, Any] = {"limit_data": limit, "timeout": self._timeout}
        run = measure(argv, cwd=models.folder, log=self._log, env=self._env, **limits).to_dict()
        files = sorted((self._out / "model").glob("*.safetensors"))
        run["bytes_written"] = sum(path.stat().st_size for path in files)
        if not run["status"] and not self._complete(models):
            run["status"] = _INCOMPLETE
        self._clear()
        return run

    def _complete(self, models: Checkpoints) -> bool:
        """Whether the output has every tensor of the base, in its shape and dtype."""
        try:
            made = open_checkpoint(str(self._out / "model"), offline=True).tensors
        except UserError as error:
            self._log.write_text(f"{error.code}: {error}\n", encoding="utf-8")
            return False
        wanted = open_checkpoint(str(models.folder / "models" / models.names[0]), offline=True).tensors
        same = {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in wanted.items()}
        if not same:
            self._log.write_text("the output has not the tensors of the base\n", encoding="utf-8")
        return same

    def references(self, models: Checkpoints, count: int) -> list[dict[str, Any]]:
        """Reading all inputs, and copying one model, without and with the wait for the disk; each `count` times."""
        every, one = models.weights(), models.weights(models.names[-1])
        all_bytes, one_bytes = (sum(p.stat().st_size for p in files) for files in (every, one))
        if len(every) and all_bytes + one_bytes <= CACHED_SHARE * _memory():
            warm(every)
        rows: list[dict[str, Any]] = [
            {"what": f"`cat` of all {len(models.names)} checkpoints to `/dev/null`", "bytes": all_bytes, "wall": []},
            {"what": "`cp` of one checkpoint", "bytes": one_bytes, "wall": []},
            {"what": "`cp` of one checkpoint, and `fsync`", "bytes": one_bytes, "wall": []},
        ]
        for _ in range(count):
            rows[0]["wall"].append(self._cat(every))
            copied, synced = self._copy(one)
            rows[1]["wall"].append(copied)
            rows[2]["wall"].append(synced)
        return rows

    def read(self, models: Checkpoints, recipe: Written) -> float:
        """Seconds that `cat` takes for what a recipe reads, after it was read once if it fits into the page cache."""
        files = models.weights(*recipe.reads)
        if self.fits_cache(models, recipe):
            warm(files)
        return self._cat(files)

    def _cat(self, files: Sequence[Path]) -> float:
        begun = time.perf_counter()
        subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begun

    def _copy(self, files: Sequence[Path]) -> tuple[float, float]:
        """Seconds for copying, and for that and the wait until it is on the disk."""
        self._clear()
        os.sync()
        whole = ["--reflink=never"] if sys.platform == "linux" else []  # a copy that shares blocks copies nothing
        begun = time.perf_counter()
        subprocess.run(["cp", *whole, *files, self._out], check=True)
        copied = time.perf_counter() - begun
        for path in self._out.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        synced = time.perf_counter() - begun
        self._clear()
        return copied, synced

    def fits_cache(self, models: Checkpoints, recipe: Written) -> bool:
        """Whether what a recipe reads and the output stay in the page cache together."""
        need = sum(p.stat().st_size for p in models.weights(*recipe.reads)) + models.bytes_each
        return need <= CACHED_SHARE * _memory()

    def last_words(self) -> str:
        """The end of what the last run has printed."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])

    def _clear(self) -> None:
        if self._out.exists():
            shutil.rmtree(self._out)
        self._out.mkdir()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
