"""What the tests on a device share: features, streams, and scripts in processes of their own.

With TEST_DEVICE=cpu the CPU takes the place of the device. Tests that need CUDA are skipped then,
and the others show that they themselves work.
"""

import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ACCELERATOR

ROOT = Path(__file__).resolve().parents[2]
ON_CUDA = ACCELERATOR is not None and ACCELERATOR.type == "cuda"
STRESS_SECONDS = float(os.environ.get("GPU_STRESS_SECONDS", 20))
GiB = 1 << 30
MiB = 1 << 20

cuda = pytest.mark.skipif(not ON_CUDA, reason="needs CUDA")
several_gpus = pytest.mark.skipif(
    not ON_CUDA or torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)


def rows(count: int, width: int = 1024) -> dict[str, torch.Tensor]:
    """Features by path: each is full of its number."""
    return {f"/f/{n}": torch.full((width,), float(n)) for n in range(count)}


def first_column(batch: torch.Tensor) -> list[int]:
    """The numbers of the features in a batch of `rows`. Waits for the device."""
    return [int(n) for n in batch[:, 17].tolist()]


def wrong_rows(batch: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """How many rows are not wholly those of `rows`; a tensor, so that the host does not wait."""
    expected = torch.tensor(numbers, dtype=batch.dtype, device="cpu")
    if ON_CUDA:
        expected = expected.pin_memory().to(batch.device, non_blocking=True)
    return (batch != expected.unsqueeze(1)).any(1).sum()


def own_stream() -> AbstractContextManager[Any]:
    """A context whose operations are on a new stream of the device."""
    return torch.cuda.stream(torch.cuda.Stream(ACCELERATOR)) if ON_CUDA else nullcontext()


def keep_busy(cycles: int) -> None:
    """Keep the current stream busy, so that what waits for it not is too early."""
    if ON_CUDA:
        torch.cuda._sleep(cycles)


def wait() -> None:
    """Wait until the device is idle."""
    if ON_CUDA:
        torch.cuda.synchronize(ACCELERATOR)


def run(
    *arguments: str, timeout: float = 100, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run Python with this repository first on its path, and return what it said.

    Args:
        arguments: of Python.
        timeout: seconds. A test that is longer than its limit would end without a word.
        variables: environment variables in addition to those of this process.
    """
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_script(script: str, *arguments: object, timeout: float = 100, **variables: str) -> str:
    """Run a script in a process of its own, which must succeed; returns what it printed."""
    done = run("-c", script, *map(str, arguments), timeout=timeout, **variables)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


PYTEST = (
    "-m", "pytest", "-o", "addopts=", "-o", "faulthandler_timeout=0", "-W", "default",
    "-p", "no:cacheprovider", "-q", "-rsfE",
)  # fmt: skip
"""Arguments of Python that run pytest without the options of pyproject.toml."""
