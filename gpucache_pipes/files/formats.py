"""How a store opens files."""

import os
from collections.abc import Callable
from typing import Any

import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.pt import PtReader
from gpucache_pipes.files.source import LoadedFeature, Opener, OpenFeature


def opener(load_fn: Callable[[str], Any] | None, weights_only: bool) -> Opener:
    """How a store opens files: by `load_fn(path)` where the user gave one, else as `.pt`."""
    if load_fn is not None:

        def by_load_fn(path: str) -> OpenFeature:
            return LoadedFeature(load_fn(path))

        return by_load_fn

    reader = PtReader()

    def by_reader(path: str) -> OpenFeature:
        try:
            return reader.open(path)
        except Unsupported:
            return by_torch_load(path, weights_only)

    return by_reader


def by_torch_load(path: str, weights_only: bool) -> LoadedFeature:
    """What torch.load makes of the file: the authority on all that the reader does not know."""
    # map_location: a file saved on a GPU must not touch that GPU from a reader thread.
    feature = torch.load(path, map_location="cpu", weights_only=weights_only)
    return LoadedFeature(feature, os.stat(path).st_size)
