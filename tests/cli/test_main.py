"""The command itself."""

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

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
        helped = capsys.readouterr().out
        assert f"examples:\n  gpucache-pipes {command} features/" in helped
        assert "(default: *.pt)" in helped and "(default: None)" not in helped


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "{files}", "--epochs", "1"], "--epochs 1: at least 2"),
        (["inspect", "{files}", "--pattern", "*.x"], "--recursive looks into subdirectories"),
        (["bench", "{files}", "--device", "tpux"], "--device 'tpux'"),
        (["bench", "{files}", "--rounds", "0"], "--rounds=0"),
        (["bench", "{files}", "--bytes", "much"], "--bytes='much'"),
        (["bench", "{files}", "--only", "nosuch"], "--only: 'nosuch' is none of"),
        (["plan", "{files}", "--gpu-memory", "much"], "--gpu-memory='much'"),
    ],
)
def test_errors_speak_of_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    for number in range(3):
        torch.save(torch.zeros(2), tmp_path / f"{number}.pt")
    assert main([part.format(files=tmp_path) for part in arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and "recursive=True" not in error and "Traceback" not in error


def test_lists_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "x", "--batch-size", "8,many"])
    assert "'8,many' is no list of whole numbers, such as 8,32,256" in capsys.readouterr().err
