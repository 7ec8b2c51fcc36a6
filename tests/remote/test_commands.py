"""The commands over URLs."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpucache_pipes.cli.main import main


@pytest.fixture
def flags(remote: dict[str, Any]) -> list[str]:
    given = {
        **{name: remote[name] for name in ("endpoint", "access_key_id", "secret_access_key")},
        "region": "us-east-1",
        "client_options.allow_http": "true",
    }
    return [f"--storage-option={name}={value}" for name, value in given.items()]


@pytest.fixture
def prefix(put: Callable[..., str]) -> str:
    for n in range(24):
        url = put(f"{n:02}.pt", {"x": torch.randn(30), "n": n})
    return url.rpartition("/")[0]


def test_inspect(prefix: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", prefix, *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith("24 files, ") and "read by their bytes: 24" in out
    assert main(["inspect", f"{prefix}/03.pt", "--json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == f"{prefix}/03.pt" and report["feature_bytes"] == 120
    assert main(["inspect", f"{prefix}/0*.pt", "--dtype=bfloat16", *flags]) == 0
    assert "converted by dtype" in capsys.readouterr().out


def test_plan(prefix: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", prefix, "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 24


def test_bench(prefix: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--batch-size=8", "--rounds=1", "--json", "--only=obstore", "--only=dict"]
    assert main(["bench", prefix, *arguments, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    problems = {name: entry["problem"] for name, entry in report["contenders"].items()}
    assert problems == dict.fromkeys(
        ["gpucache_pipes", "DataLoader, 0 workers", "dict of features, never evicts",
         "obstore, 32 requests at once"]
    )  # fmt: skip


def test_errors(prefix: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{prefix}/none/", *flags]) == 1
    assert "no objects below" in capsys.readouterr().err
    assert main(["inspect", "s3://user:password@bucket/a"]) == 1
    err = capsys.readouterr().err
    assert "s3://***@bucket/a" in err and "password@" not in err
    assert main(["bench", prefix, "--cold-storage", *flags]) == 1
    assert "--cold-storage is for local files" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", prefix, "--storage-option=endpoint"])
    assert "NAME=VALUE" in capsys.readouterr().err
