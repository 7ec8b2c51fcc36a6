"""The command itself."""

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from gpucache_pipes import __version__
from gpucache_pipes.cli.main import main

ROOT = Path(__file__).parents[2]


def test_bare_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: gpucache-pipes") and "examples:" in out


def test_its_examples_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith("  gpucache-pipes")]
    assert len(lines) == 3
    for _, command, *_ in lines:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"gpucache_pipes {__version__}\n"


def test_a_command_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["insepct", "x"])
    assert ended.value.code == 2
    assert "inspect" in capsys.readouterr().err


def test_as_a_module_and_as_a_script() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "gpucache_pipes", "--version"], capture_output=True, text=True
    )
    assert run.stdout == f"gpucache_pipes {__version__}\n", run.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"gpucache-pipes": "gpucache_pipes.cli.main:main"}
    for script in entry_points(group="console_scripts", name="gpucache-pipes"):
        assert script.load() is main
