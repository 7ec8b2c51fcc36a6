"""Files with features that tell where they come from, and stores with random options."""

import os
import random
from pathlib import Path
from typing import Any

import torch

from gpucache_pipes.device import AcceleratorBackend, InOrderRuntime

POLICIES = ["clairvoyant", "keep", "lru", "fifo", "lfu", "sieve", "s3fifo", "w-tinylfu"]


def feature_of(number: int, version: int = 0) -> dict[str, Any]:
    """What file `number` holds."""
    values = torch.arange(24 * (1 + number % 5), dtype=torch.int32).view(-1, 8)
    return {
        "x": values + 1000 * number + version,
        "label": torch.tensor(number),
        "deep": [torch.tensor([number, -version], dtype=torch.int16), str(number)],
    }


def require_right(feature: Any, number: int, version: int = 0) -> None:
    """AssertionError unless it is that one, bit for bit."""
    expected = feature_of(number, version)
    assert list(feature) == list(expected), f"file {number}: {list(feature)}"
    for got, wanted in (
        (feature["x"], expected["x"]),
        (feature["label"], expected["label"]),
        (feature["deep"][0], expected["deep"][0]),
    ):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, f"file {number}"
        assert torch.equal(got.cpu(), wanted), f"wrong bytes of file {number}: {got.tolist()}"
    assert feature["deep"][1] == expected["deep"][1]


def write_files(directory: Path, count: int, alike: bool = False) -> list[str]:
    paths = []
    for number in range(count):
        path = directory / f"{number:04d}.pt"
        torch.save(feature_of(5 * number if alike else number), path)
        paths.append(str(path))
    return paths


def store_options(draw: random.Random, files: int) -> dict[str, Any]:
    return {
        "max_cache_bytes": draw.choice([None, 1000, 5000, 20_000, "1GiB"]),
        "max_cache_items": draw.choice([None, None, 1, files // 2, files]),
        "policy": draw.choice(POLICIES),
        "asynchronous": draw.random() < 0.7,
        "reader_threads": draw.choice([1, 2, 3]),
        "page_bytes": draw.choice([None, None, 16, 256]),
        "revalidate": draw.random() < 0.2,
    }


def device_of(draw: random.Random) -> Any:
    if draw.random() < 0.5:
        return "cpu"
    return AcceleratorBackend(InOrderRuntime(torch.device("cpu")))


def open_descriptors() -> int:
    """0 where the system does not tell."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
