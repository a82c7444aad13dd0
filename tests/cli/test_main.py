"""The frame: help, versions, wrong commands, and what `regraft --help` imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMMANDS = {"merge", "run", "plan", "inspect", "methods", "schema", "delta"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, json\n"
        "from regraft.cli.main import main\n"
        "for arguments in ([], ['merge'], ['inspect'], ['methods'], ['delta', 'extract']):\n"
        "    sys.argv = ['regraft', *arguments, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "    print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    heavy = {"torch", "transformers", "pydantic", "huggingface_hub", "numpy", "yaml", "peft", "datasets"}
    for line in done.stderr.splitlines():
        roots = {name.split(".")[0] for name in json.loads(line)}
        assert not roots & heavy
        heavy.discard("pydantic")  # typer itself imports it for the options of a command, if it is installed
    assert len(done.stderr.splitlines()) == 5


@pytest.mark.parametrize(("arguments", "status"), [(["methods"], 0), (["mrege"], 2)])
def test_the_process_ends_with_the_status_after_the_last_thread(arguments: list[str], status: int) -> None:
    code = (
        "import sys, threading, time\n"
        "from regraft.cli.main import process\n"
        "import torch\n"
        "main = threading.main_thread()\n"
        "threading.Thread(target=lambda: (main.join(), time.sleep(0.2), print('the thread'))).start()\n"
        f"sys.argv = ['regraft', *{arguments!r}]\n"
        "process()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == "the thread"
    assert ("linear" in done.stdout) == (status == 0)


def test_who_calls_main_decides_on_the_status_of_the_process() -> None:
    code = (
        "import sys\n"
        "from regraft.cli.main import main\n"
        "sys.argv = ['regraft', '--version']\n"
        "try: main()\n"
        "except SystemExit: sys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300).returncode == 3


def test_help_names_every_command(cli) -> None:
    shown = cli("--help")
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in COMMANDS)
    assert "--install-completion" in shown.stdout


def test_version_names_torch_and_transformers(cli) -> None:
    from importlib.metadata import version

    shown = cli("--version")
    assert shown.exit_code == 0
    assert "regraft " in shown.stdout
    assert f"torch {version('torch')}" in shown.stdout
    assert f"transformers {version('transformers')}" in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["mrege"],
        ["merge", "recipe.yaml"],
        ["methods", "--jsn"],
        ["plan", "x.yaml", "--workers", "0"],
        ["plan", "x.yaml", "--max-memory", "much"],
        ["schema", "--dialect", "klingon"],
        [],
    ],
)
def test_wrong_usage_exits_with_2(cli, arguments: list[str]) -> None:
    assert cli(*arguments).exit_code == 2


def test_a_terminal_without_unicode_is_no_error() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments in (["ties"], ["ties", "--json"]):
        command = [sys.executable, "-m", "regraft", "methods", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
    assert "\N{GREEK SMALL LETTER LAMDA}" in json.loads(done.stdout)["description"]


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "regraft", "plan", "/no/such/recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("RG306: the recipe cannot be read: No such file")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
