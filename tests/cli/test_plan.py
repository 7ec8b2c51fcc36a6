"""`python -m gpucache_pipes plan`."""

import builtins
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpucache_pipes.cache import policies
from gpucache_pipes.cli import plan as planning
from gpucache_pipes.cli.main import main

Files = Callable[..., list[str]]


def directory(paths: list[str]) -> str:
    return str(Path(paths[0]).parent)


def test_all_policies_are_planned() -> None:
    assert set(planning.POLICIES) <= set(policies.base._REGISTRY)
    assert {"clairvoyant", "fifo", "keep", "lfu", "lru", "s3fifo", "sieve", "w-tinylfu"} == set(
        planning.POLICIES
    )


def test_a_picture(make_files: Files, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    picture = tmp_path / "plan.png"
    assert main(["plan", directory(make_files(4)), "--plot", str(picture)]) == 0
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    # 11 by 4.2 inches at 150 dots per inch.
    assert struct.unpack(">II", content[16:24]) == (1650, 630)


def test_a_plan(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(40, lambda n: {"x": torch.zeros(64)})
    command = ["plan", directory(paths), "--gpu-memory", "5120B"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "simulating" not in captured.err  # bars are for terminals
    for part in ("40 files, 10 KiB of tensors, shuffled", "hit rate", "● clairvoyant",
                 "With 5 KiB, 50% of reads come from the GPU", "LRU would give"):  # fmt: skip
        assert part in captured.out, captured.out
    assert main([*command[:2], "--json", "--no-shuffle", "--epochs", "3"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    report = json.loads(captured.out)
    assert report["files"] == report["simulated_files"] == 40
    assert report["feature_bytes"] == 40 * 256 and report["memory"] == 5120
    assert report["epochs"] == 3 and report["shuffle"] is False
    for row in report["rows"]:
        served = row["policies"]
        share = row["cache_bytes"] // 256 / 40
        assert served["clairvoyant"]["hit_rate"] == pytest.approx(share)
        assert served["lru"]["hit_rate"] == 0
        assert served["keep"]["read_fraction"] == pytest.approx(1 - share)


def test_tiers(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(40, lambda n: {"x": torch.zeros(64)})
    command = ["plan", directory(paths), "--gpu-memory", "2560B", "--host-memory", "5120B"]
    assert main([*command, "--json"]) == 0
    tiers = json.loads(capsys.readouterr().out)["tiers"]
    assert tiers["names"] == ["GPU", "host"] and tiers["bytes"] == [2560, 5120]
    ours = tiers["policies"]["clairvoyant"]
    assert ours == {
        "hit_rates": [0.25, 0.5], "served": [2560, 5120], "read": 2560, "demoted": [0, 0],
    }  # fmt: skip
    assert tiers["policies"]["lru"]["demoted"][1] > 0
    assert main([*command, "--disk", "1GiB"]) == 0
    said = capsys.readouterr().out
    assert "tiers: GPU 2.5 KiB, host 5 KiB, disk 10 KiB" in said
    assert (
        "Below it, 5 KiB of host serve 50% and 10 KiB of disk serve 25%, and an epoch reads 0 B"
    ) in said
    assert main([*command, "--disk", "much"]) == 1
    assert "--disk='much' is not a size" in capsys.readouterr().err


def test_all_of_it_fits(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(10)
    assert main(["plan", directory(paths), "--gpu-memory", "24GiB"]) == 0
    assert "With 24 GiB, all 400 B fit" in capsys.readouterr().out


def test_a_sample_stands_for_many(
    make_files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_files(60, lambda n: {"x": torch.zeros(64 + n)})
    whole = planning.plan(paths, progress=False)
    monkeypatch.setattr(planning, "_MOST_FILES", 30)
    sampled = planning.plan(paths, progress=False)
    assert (whole["simulated_files"], sampled["simulated_files"]) == (60, 30)
    for row, same in zip(whole["rows"], sampled["rows"], strict=True):
        assert row["cache_bytes"] == same["cache_bytes"]
        pair = [r["policies"]["clairvoyant"]["hit_rate"] for r in (row, same)]
        assert pair[0] == pytest.approx(pair[1], abs=0.06)
    assert main(["plan", directory(paths)]) == 0
    assert "on a sample of 30 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "1"], "--epochs 1: at least 2"),
        (["--gpu-memory", "much"], "--gpu-memory='much' is not a size"),
        (["--pattern", "*.npy"], "no files in directory"),
    ],
)
def test_errors(
    make_files: Files, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["plan", directory(make_files(2)), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_broken_file_is_named(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(3)
    Path(paths[1]).write_bytes(b"")
    assert main(["plan", directory(paths)]) == 1
    error = capsys.readouterr().err
    assert "empty" in error and paths[1] in error


def test_without_matplotlib(
    make_files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    where = directory(make_files(2))
    assert main(["plan", where, "--plot", "x.png"]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert main(["plan", where]) == 0


def test_ranks(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(64, lambda n: {"x": torch.zeros(64)})
    command = ["plan", directory(paths), "--ranks", "4", "--gpu-memory", "4KiB"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "4 ranks: hit rate after the first epoch" in text and "process_group=" in text
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["ranks"]
    assert report["ranks"] == 4 and report["memory"] == 4096
    for row in report["rows"]:
        share = row["cache_bytes"] // 256 / 64
        for way in ("shared", "static"):
            assert row[way]["hit_rate"] == pytest.approx(min(1, 4 * share))
            assert row[way]["read_fraction"] == pytest.approx(1 - min(1, 4 * share))
        assert share == 1 or row["epoch"]["hit_rate"] < row["shared"]["hit_rate"]
    for ranks in ("0", "65"):
        assert main([*command[:2], "--ranks", ranks]) == 1
        assert f"--ranks {ranks} must be from 2 to the number of files, 64" in (
            capsys.readouterr().err
        )
