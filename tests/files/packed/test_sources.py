"""A packed directory, and a disk cache, keep the contract of sources."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpucache_pipes.files import LocalFiles, Source
from gpucache_pipes.files.packed import DiskCache, DiskDirectory, packer
from gpucache_pipes.files.packed.packing import pack
from gpucache_pipes.testing import SourceContract

_clock = itertools.count(1_000_000_000)


def write(directory: Path, features: Sequence[Any]) -> list[str]:
    directory.mkdir(exist_ok=True)
    paths = [str(directory / f"{number}.pt") for number in range(len(features))]
    for path, feature in zip(paths, features, strict=True):
        torch.save(feature, path)
        age(path)
    return paths


def age(path: str) -> None:
    when = next(_clock)
    os.utime(path, (when, when))


class TestPackedDirectory(SourceContract):
    """Paths in a directory that `pack` has made."""

    def make_source(self, directory: Path, features: Sequence[Any]) -> tuple[Source, list[str]]:
        files = write(directory / "source", features)
        target = directory / f"packed{next(_clock)}"
        pack(str(directory / "source"), str(target))
        return LocalFiles(), [str(target / Path(path).name) for path in files]

    def spellings(self, path: str) -> list[str]:
        head, _, name = path.rpartition("/")
        return [f"{head}/./{name}", f"{head}//{name}", os.path.relpath(path)]


class TestDiskCache(SourceContract):
    """Files below a disk cache that has some of them."""

    @pytest.fixture(autouse=True)
    def end_threads(self) -> Iterator[None]:
        yield
        for one in list(packer._packers):
            one.end()
            one.join(30)

    def make_source(self, directory: Path, features: Sequence[Any]) -> tuple[Source, list[str]]:
        paths = write(directory / f"files{next(_clock)}", features)
        cache = DiskCache(LocalFiles(), DiskDirectory(str(directory / "cache"), None))
        return cache, paths

    def change(self, source: Source, path: str, feature: Any) -> None:
        torch.save(feature, path)
        age(path)
