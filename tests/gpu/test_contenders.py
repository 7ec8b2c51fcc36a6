"""The contenders on a real device make the same batches there."""

from pathlib import Path

import pytest
import torch
from conftest import ACCELERATOR

from gpucache_pipes.cli import bench
from gpucache_pipes.device import resolve_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ragged", [False, True])
def test_all_make_the_same_batches(tmp_path: Path, ragged: bool) -> None:
    paths = [str(tmp_path / f"{number}.pt") for number in range(14)]
    for number, path in enumerate(paths):
        rows = 1 + (number % 4 if ragged else 0)
        torch.save({"x": torch.full((rows, 8), float(number)), "y": torch.tensor(number)}, path)
    with bench.Work(paths, 4, resolve_device(ACCELERATOR), epochs=3) as work:
        report = bench.bench(work, rounds=1, overlap=True, progress=False)
    problems = {name: entry["problem"] for name, entry in report["contenders"].items()}
    left_out = {name for name, problem in problems.items() if problem}
    assert left_out <= ({"one tensordict memory map"} if ragged else set()), problems
    assert bench.advice(report, bench.free_bytes(resolve_device(ACCELERATOR)))
