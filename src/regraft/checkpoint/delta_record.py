"""delta.json: of which base a delta is, what is stored for each tensor, and what was measured when it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from regraft.checkpoint.dtypes import DTYPES
from regraft.checkpoint.json_file import malformed_field, read_json
from regraft.checkpoint.licences import short_name
from regraft.checkpoint.model import Checkpoint
from regraft.checkpoint.paths import inside
from regraft.checkpoint.safetensors_file import MAX_NAME
from regraft.checkpoint.weights import DELTA_RECORD
from regraft.errors import UserError
from regraft.version import __version__

if TYPE_CHECKING:
    import torch

FILES = "files"  # the folder of what stands beside the weights of the fine-tune, where it is not the base's
FORMAT = 1
Kind = Literal["dense", "sparse", "bits"]
KINDS: tuple[Kind, ...] = ("dense", "sparse", "bits")
# "base": the base's tensor unchanged, nothing is stored; "whole": the fine-tune's tensor, whatever the scale.
Encoding = Literal["base", "whole", "dense", "sparse", "bits"]

_CONTENT: dict[tuple[Path, str], str] = {}  # (folder, cheap digest) -> digest of the content, read once per process


def _known(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name[:20]!r}")
    return name


def _allowed(name: str) -> str:
    if name == "__metadata__":
        raise ValueError("a tensor has a reserved name")
    return name


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True, ser_json_inf_nan="strings")


class Parent(_Record):
    """A model that the delta was made from: never a path. `digest` is that of its whole content."""

    name: str
    repo_id: str = ""
    revision: str = ""
    digest: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Parent:
        """The record of an opened model; reads all of it."""
        name = "+".join([short_name(checkpoint), *(Path(adapter).name for adapter in checkpoint.adapters)])
        digest = content_digest(checkpoint)
        return cls(name=name, repo_id=checkpoint.repo_id, revision=checkpoint.revision, digest=digest)


class TensorRecord(_Record):
    """One tensor of the fine-tune.

    `relative_error` is |restored - model| / |model - base|, `exact` the share of entries that come back bit for bit.
    """

    shape: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(max_length=64)
    dtype: Annotated[str, AfterValidator(_known)]
    encoding: Encoding
    relative_error: float = 0.0
    exact: float = 1.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class Delta(_Record):
    """Everything that delta.json holds.

    Attributes:
        removed: tensors of the base that the fine-tune does not have.
        base_files: the files beside the weights that are taken from the base; all others are in the delta.
        relative_error, exact: over all tensors that are differences.
    """

    format: Literal[1] = 1
    kind: Kind
    density: float | None = None
    base: Parent
    model: Parent
    tensors: dict[Annotated[str, Field(max_length=MAX_NAME), AfterValidator(_allowed)], TensorRecord] = Field(
        min_length=1
    )
    removed: list[str] = []
    base_files: list[str] = []
    relative_error: float = 0.0
    exact: float = 1.0
    licence: str | None = None
    regraft: str = __version__

    def write(self, folder: Path) -> None:
        """Write delta.json into a folder."""
        text = json.dumps(json.loads(self.model_dump_json()), indent=2, ensure_ascii=False)
        (folder / DELTA_RECORD).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Delta:
        """The record of a delta.

        Raises:
            UserError: RG104 for a link out of the folder; RG105 if there is none, or it is malformed or of another
                version.
        """
        path = inside(folder, DELTA_RECORD, where=folder)
        data = read_json(path)
        if data.get("format") != FORMAT:
            what = (
                f"the delta has the format {str(data.get('format'))[:20]!r}, and this version of regraft reads {FORMAT}"
            )
            raise UserError("RG105", what, where=str(path), fix="name a folder that regraft delta extract made")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            fix = "the file was edited; extract the delta again"
            raise UserError("RG105", malformed_field(error), where=str(path), fix=fix) from None

    def summary(self) -> dict[str, Any]:
        """JSON-able, without the tensors: their number by encoding instead."""
        encodings = [one.encoding for one in self.tensors.values()]
        counts = {name: encodings.count(name) for name in dict.fromkeys(encodings)}
        return self.model_dump(mode="json", exclude={"tensors"}) | {"encodings": counts}


def content_digest(checkpoint: Checkpoint) -> str:
    """`full_digest`, which reads everything, once per process for files that stay as they are."""
    key = (checkpoint.path, checkpoint.digest())
    if key not in _CONTENT:
        _CONTENT[key] = checkpoint.full_digest()
    return _CONTENT[key]
