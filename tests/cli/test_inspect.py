"""`python -m gpucache_pipes inspect`."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpucache_pipes.cli.main import main

Files = Callable[..., list[str]]


def test_a_file(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = make_files(1, lambda n: {"x": torch.zeros(2, 3), "n": 1, "s": "t"})
    assert main(["inspect", path]) == 0
    said = capsys.readouterr().out
    assert "['x']: float32 [2, 3], 24 B" in said
    assert "read by its bytes" in said
    assert "['n']: int" in said and "['s']: str" in said
    assert main(["inspect", path, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "path": path,
        "file_bytes": Path(path).stat().st_size,
        "feature_bytes": 24,
        "fast": True,
        "reason": None,
        "leaves": [{"name": "['x']", "dtype": "float32", "shape": [2, 3], "bytes": 24}],
        "values": [{"name": "['n']", "type": "int"}, {"name": "['s']", "type": "str"}],
    }


def test_why_torch_load_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert main(["inspect", str(path)]) == 0
    assert (
        "read by torch.load: the file does not end with a plain zip end record"
        in capsys.readouterr().out
    )


def test_a_directory(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(20, lambda n: {"x": torch.zeros(4 + n % 2)})
    torch.save(torch.nn.Linear(1, 1).state_dict(), paths[3])
    Path(paths[7]).write_bytes(b"broken")
    directory = str(Path(paths[0]).parent)
    assert main(["inspect", directory]) == 1  # one of them cannot be loaded
    captured = capsys.readouterr()
    assert "inspecting" not in captured.err  # bars are for terminals
    for part in ("20 files", "read by their bytes: 18", "read by torch.load: 1: ",
                 "18 files of 2 different shapes:", "  ['x']: float32 [4..5], up to 20 B",
                 """ragged={'x': "pad"}, or "jagged", or "list\"""", "\n1 file:",
                 "cannot be loaded: 1 file", "0007.pt", "max_cache_bytes="):  # fmt: skip
        assert part in captured.out, captured.out
    assert main(["inspect", directory, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == 20 and report["fast"] == 18
    assert [item["path"] for item in report["failures"]] == [paths[7]]
    assert sum(report["reasons"].values()) == 1 and report["number_of_layouts"] == 3
    # Ten features of 4 floats, eight of 5 (two of those files were replaced), and one of 2.
    assert [kind["files"] for kind in report["kinds"]] == [18, 1]
    assert report["kinds"][0]["leaves"] == [
        {"name": "['x']", "dtype": "float32", "shape": [[4, 5]], "bytes": 20}
    ]
    assert report["feature_bytes"] == 10 * 16 + 8 * 20 + 2 * 4
    assert report["sizes"]["largest"] == 20 and report["sizes"]["least"] == 8
    assert report["recommended"]["max_cache_bytes"] >= report["feature_bytes"]


def test_kinds_of_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        image = torch.zeros(number + 1, 2 * number + 1)
        at = (number if number else None, 0.5)
        feature = {"image": image, "name": f"n{number}", "at": at}
        torch.save(feature, tmp_path / f"{number}.pt")
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "6 files of 6 different shapes:\n  ['image']: float32 [1..6, 1..11], up to 264 B" in said
    assert "  ['name']: str\n  ['at'][0]: NoneType or int\n  ['at'][1]: float" in said
    assert "differ in more than their first dimension: collate_fn= joins them" in said


def test_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no files in directory" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "no.pt")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_the_error_of_a_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        feature = {"x": torch.tensor([1 + 2**-10, 1e6, 1e-9, 0.0, torch.inf]), "n": torch.ones(1)}
        feature["n"] = feature["n"].half()
        torch.save(feature, tmp_path / f"{number}.pt")
    assert main(["inspect", str(tmp_path), "--dtype", "float16", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["conversion"]
    assert row == {
        "name": "['x']", "from": "float32", "to": "float16", "elements": 15,
        "relative_error": 0.0, "become_infinite": 3, "become_zero": 3,
    }  # fmt: skip
    assert main(["inspect", str(tmp_path / "0.pt"), "--dtype", "torch.bfloat16"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\['x'\]: float32 to bfloat16: at most 0\.00\d+ of the value", said)
    assert main(["inspect", str(tmp_path), "--dtype", "int8"]) == 1
    assert "--dtype=int8 is no floating dtype" in capsys.readouterr().err
