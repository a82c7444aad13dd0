"""How to run, as opposed to what to compute: switches of the command line that do not change what is merged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Switches of a run.

    Attributes:
        offline: use the local cache of the Hub only.
        force: replace a non-empty output, and merge models that do not look like fine-tunes of the base.
        allow_nan: merge values that are not finite as they are.
        accept_licenses: go on although the licences of the inputs do not agree.
        workers: threads; one more than there are cores if None.
        chunk: elements per chunk; the engine's default if None.
        device: where chunks are computed: "cpu", "cuda", "cuda:1", ... Elsewhere than on the CPU the last bits of
            statistics, and so of weights, may differ.
        max_memory: bytes of private memory for the whole process; no limit if None.
        sync: wait until the output has reached the disk before it gets its name, so that it survives a power failure.
        shard_bytes: size of an output shard.
        seed: replaces the recipe's seed.
        tensors: replaces what the recipe says of tensors that only some state dicts have.
    """

    offline: bool = False
    force: bool = False
    allow_nan: bool = False
    accept_licenses: bool = False
    workers: int | None = None
    chunk: int | None = None
    device: str = "cpu"
    max_memory: int | None = None
    sync: bool = True
    shard_bytes: int = 5 * 10**9
    seed: int | None = None
    tensors: str | None = None
