"""Bench over a packed directory: other loaders read the same features as `.pt` files."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from gpucache_pipes.cli.bench.contender import Contender
from gpucache_pipes.cli.bench.loaders import gpucache_pipes
from gpucache_pipes.store import GPUFeatureStore

NAME = "gpucache_pipes, packed"


@contextlib.contextmanager
def unpacked(paths: Sequence[str], weights_only: bool) -> Iterator[list[str]]:
    """Features of a packed directory as files, in order, for as long as the context lasts."""
    with (
        tempfile.TemporaryDirectory(prefix="gpucache-unpacked-") as root,
        GPUFeatureStore(
            "cpu", max_cache_items=1, asynchronous=False, weights_only=weights_only
        ) as store,
    ):
        files = [f"{root}/{number:08d}.pt" for number in range(len(paths))]
        for file, path in zip(files, paths, strict=True):
            torch.save(store.get(path), file)
        yield files


def packed_contender(paths: Sequence[str]) -> Contender:
    """gpucache_pipes over the packed features that the files of `unpacked` were made of."""
    run = partial(gpucache_pipes, paths=list(paths))
    return Contender(NAME, "ours", run, caches=True, cases=("first", "later", "partial"))
