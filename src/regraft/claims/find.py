"""Where the experiments are, and what each file holds."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import regraft
from regraft.claims.claim import Claim
from regraft.errors import UserError, nearest

_NAME = re.compile(r"(\d\d)_\w+\.py")


@dataclass(frozen=True)
class Found:
    """A claim and the file that it was read from; `doc` is the file's docstring, `code` names the state of its code."""

    claim: Claim
    path: Path
    doc: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.claim.number:02d}"


def claims_folder() -> Path:
    """`claims/` in the current folder, or beside the source checkout that regraft is used from.

    Raises:
        UserError: RG901 if there is none.
    """
    for folder in (Path.cwd() / "claims", Path(regraft.__path__[0]).parents[1] / "claims"):
        if folder.is_dir() and any(_NAME.fullmatch(path.name) for path in folder.iterdir()):
            return folder
    fix = "run this in a clone of the repository: the experiments are not part of the installed package"
    raise UserError("RG901", "there is no folder claims/ with experiments here", where=str(Path.cwd()), fix=fix)


def claims(folder: Path, numbers: Sequence[str] | None = None) -> list[Found]:
    """The claims of a folder: those asked for, in that order and once each, or all by number.

    Raises:
        UserError: RG902 for a number without a claim, or for a file that is none.
    """
    files = {match[1]: path for path in sorted(folder.iterdir()) if (match := _NAME.fullmatch(path.name))}
    wanted = dict.fromkeys(n.zfill(2) for n in numbers) if numbers is not None else files
    for number in wanted:
        if number not in files:
            raise UserError("RG902", f"there is no claim {number!r}", where=str(folder), fix=nearest(number, files))
    return [load(files[number]) for number in wanted]


def load(path: Path) -> Found:
    """The claim that a file holds.

    Raises:
        UserError: RG902 if it holds none, RG602 if it needs a package that is not installed.
    """
    try:
        module = module_of(path)
    except ModuleNotFoundError as error:
        what = f"the claim needs the package {error.name}, which is not installed"
        raise UserError("RG602", what, where=path.name, fix="pip install 'regraft[dev]'") from None
    claim = getattr(module, "CLAIM", None)
    if not isinstance(claim, Claim) or f"{claim.number:02d}" != path.name[:2]:
        fix = "set CLAIM = Claim(...) whose paper has this number"
        raise UserError("RG902", "the file has no claim of its number", where=str(path), fix=fix)
    return Found(claim, path, (module.__doc__ or "").strip(), state_of(path))


def module_of(path: Path) -> ModuleType:
    """A file of the folder, imported once per process; `from claims import ...` in it means its own folder."""
    root = str(path.parent.parent.resolve())
    if root not in sys.path:
        sys.path.insert(0, root)
    name = f"claims_at_{hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def state_of(path: Path) -> str:
    """A hash of a file and of all files of the repository that it imports, or takes from the examples, so that
    figures of one state of an experiment are not mixed with those of another.

    What a file says about itself at its beginning, such as what was found, is no part of it.
    """
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(_with_imports(path.resolve(), set())):
        digest.update(file.name.encode() + b"\0" + _without_docstring(file.read_bytes()) + b"\0")
    return digest.hexdigest()


def _without_docstring(code: bytes) -> bytes:
    tree = ast.parse(code)
    if ast.get_docstring(tree, clean=False) is None:
        return code
    lines = code.splitlines(keepends=True)
    first = tree.body[0]
    assert first.end_lineno is not None
    return b"".join(lines[: first.lineno - 1] + lines[first.end_lineno :])


def _with_imports(path: Path, seen: set[Path]) -> set[Path]:
    if path not in seen and path.is_file():
        seen.add(path)
        for other in _imports(path):
            _with_imports(other, seen)
    return seen


def _imports(path: Path) -> Iterator[Path]:
    """Files of the folder of claims that a file names in imports, and of the examples in calls of `example`."""
    root = next((parent for parent in path.parents if (parent / "claims").is_dir()), path.parent)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module == "claims":
            yield from (root / "claims" / f"{alias.name}.py" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("claims."):
            yield root.joinpath(*str(node.module).split(".")).with_suffix(".py")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "example":
            parts = [part.value for part in node.args if isinstance(part, ast.Constant)]
            yield root.joinpath("examples", *map(str, parts)).with_suffix(".py")
