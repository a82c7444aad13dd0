"""The project holds what its documents promise: layers, one file per method, pages, versions, the README's table."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regraft.methods import ROOMS, methods
from regraft.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there, too

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "regraft"
FILES = sorted(PACKAGE.rglob("*.py"))
# Rooms by layer; modules beside the rooms (errors, methods, version) are below all of them.
LAYERS = {
    "checkpoint": 0,
    "axes": 0,
    "merge": 1,
    "inspect": 1,
    "adapters": 1,
    "deltas": 1,
    "objectives": 1,
    "resize": 1,
    "train": 1,
    "recipe": 2,
    "report": 2,
    "claims": 2,
    "cli": 3,
}
GROUND = {"errors": set(), "version": set(), "methods": {"errors"}}
# Pieces of the names that architectures give to their parameters.
PARAMETERS = re.compile(
    r"self_attn|c_attn|c_proj|c_fc|mlp\.|attention\.self|attention\.output|(gate|up|down|[qkvo])_proj|"
    r"embed_tokens|wte|wpe|lm_head|SelfAttention|EncDecAttention|DenseReluDense|text_model\.|vision_model\."
)


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module of regraft, names) for every import of a file, also those inside functions; relative ones resolved."""
    package = ("regraft", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "regraft":
                    yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            head = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*head, *([node.module] if node.module else [])])
            if module.split(".")[0] == "regraft":
                yield module, tuple(alias.name for alias in node.names)


def rooms_of(module: str, names: tuple[str, ...]) -> set[str]:
    parts = module.split(".")[1:]
    return {parts[0]} if parts else set(names)


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


def test_every_room_has_a_layer() -> None:
    rooms = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lower_layers_never_import_higher_ones(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    if parts in (("__init__.py",), ("__main__.py",)):
        return
    room = parts[0].removesuffix(".py")
    for module, names in imports(path):
        for other in rooms_of(module, names):
            if room in GROUND:
                assert other in GROUND[room], f"{path.name} imports {module}"
            elif other not in GROUND:
                assert LAYERS[other] <= LAYERS[room], f"{'/'.join(parts)} imports {module}"


def test_axes_and_checkpoint_stay_apart() -> None:
    """Two rooms of the lowest layer: which tensor is where does not depend on how tensors are stored."""
    for path in (PACKAGE / "axes").rglob("*.py"):
        assert not any("checkpoint" in rooms_of(*found) for found in imports(path)), path


def test_rules_do_not_import_one_another() -> None:
    for package in ROOMS.values():
        for path in (PACKAGE / Path(*package.split(".")[1:])).glob("*.py"):
            assert not any(module.startswith(package) for module, _ in imports(path)), path


def test_nobody_imports_the_privates_of_another_file() -> None:
    for path in FILES:
        for module, names in imports(path):
            private = [n for n in names if n.startswith("_") and not n.startswith("__")]
            assert not private, f"{path.relative_to(PACKAGE)} imports {private} of {module}"


def test_only_axes_names_parameters_of_architectures() -> None:
    """In code, not in the texts of docstrings and descriptions: a rule that knows a name works for one family."""
    for path in FILES:
        if path.is_relative_to(PACKAGE / "axes"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value.strip():
                found = PARAMETERS.search(node.value)
                assert not found, f"{path.relative_to(PACKAGE)}, line {node.lineno}: {node.value!r}"


def test_files_stay_short() -> None:
    counts = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert {name: n for name, n in counts.items() if n > 400} == {}


def test_every_file_says_what_it_is() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "regraft.version.__version__"
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    wanted = [c.rpartition(" ")[2] for c in project["project"]["classifiers"] if "Python :: 3." in c]
    assert wanted == ["3.10", "3.11", "3.12", "3.13"]
    assert "(3, 10) <= sys.version_info < (3, 14)" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_constraints_pin_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    marker = r'( ; python_version >= "3\.1\d"| ; python_full_version >= "3\.1\d\.\d+")?'
    assert all(re.fullmatch(rf"[\w.-]+==[\w.]+{marker}", pin) for pin in pins)
    pinned = {normal(pin.partition("==")[0]) for pin in pins}
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {normal(re.split(r"[\[<>=]", d)[0]) for d in asked} - {"regraft"}
    assert names <= pinned


def test_nothing_is_skipped_for_want_of_a_package() -> None:
    """A test that is skipped wherever it runs is no test: `dev` brings all that tests ask for."""
    texts = (p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests").rglob("*.py")))
    wanted = {name for text in texts for name in re.findall(r'importorskip\("([\w.]+)"', text)}
    assert wanted
    assert {name for name in wanted if importlib.util.find_spec(name) is None} == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_readme_lists_the_rules_that_there_are(generate: Any) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = generate.rule_table("")
    assert table in text, f"the table of rules in README.md should be:\n\n{table}\n"


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(
        r"`((?:docs|examples)/[\w./-]+|CONTRIBUTING\.md)`", text
    )
    assert len(paths) > 3
    assert [p for p in paths if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("one", methods(), ids=lambda m: f"{m.room}-{m.name}")
def test_every_method_is_documented_and_tested(one: Any, generate: Any) -> None:
    page = generate.pages()[f"methods/{one.name}.md"]
    assert one.doc.strip() in page
    for name, field in one.options.model_fields.items():
        assert field.description, f"{one.name}.{name} has no description"
        assert f"`{field.alias or name}`" in page
    home = PACKAGE / Path(*ROOMS[one.room].split(".")[1:]) / f"{one.name}.py"
    assert home.exists(), f"{one.name} is not in a file of its name"
    tests = "".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "tests" / home.relative_to(PACKAGE).parts[0]).glob("*.py")
    )
    assert re.search(rf"\b{one.name}\b", tests), f"no test names {one.name}"


def test_every_command_and_code_has_its_page(generate: Any) -> None:
    from regraft.errors import CODES

    pages = generate.pages()
    for code in CODES:
        assert f"### {code}: " in pages["errors.md"]
    for name in (
        "merge",
        "run",
        "plan",
        "compress",
        "train",
        "export",
        "inspect",
        "compare",
        "report",
        "card",
        "extract-lora",
        "delta",
        "claims",
        "methods",
        "schema",
    ):
        assert f"# regraft {name}" in pages[f"commands/{name}.md"]


def test_the_contributing_page_shows_the_rule_as_it_is() -> None:
    """The example of a new rule is the real one, word for word."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(class NearswapOptions.*?)```", text, re.DOTALL)
    assert shown is not None
    assert shown[1] in (PACKAGE / "merge" / "rules" / "nearswap.py").read_text(encoding="utf-8")


def test_ci_calls_make_test() -> None:
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert "make test" in run.read_text(encoding="utf-8")
