"""What people give a GPUCachedPathDataLoader first, and what to give it instead."""

import difflib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset

from gpucache_pipes.nodes import PathLister
from gpucache_pipes.nodes.sharding import find_rank, warn_of_ranks_that_read_the_same
from gpucache_pipes.nodes.upstream import as_node, is_table
from gpucache_pipes.store import StoreOptions

_OF_THE_LOADER = {"batch_size", "drop_last", "labels", "num_workers", "sampler", "seed", "shuffle"}
"""Options of the PathLister or DataLoader that is wrapped."""


def require_known(options: Mapping[str, Any], kind: type) -> None:
    """Raise TypeError for an option that neither the store nor the loader, of this class, has."""
    for name in options:
        if name in StoreOptions.__annotations__:
            continue
        known = [*list(inspect.signature(kind).parameters)[1:-1], *StoreOptions.__annotations__]
        if name in _OF_THE_LOADER:
            hint = "it belongs to the PathLister or DataLoader that is wrapped"
        else:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise TypeError(f"GPUCachedPathDataLoader has no option {name!r}: {hint}")


def require_batches_of_paths(loader: Any) -> None:
    """Raise TypeError or ValueError for a loader that certainly yields no batches of paths."""
    if is_table(loader):
        raise TypeError(
            "the loader is a table: wrap PathLister(df['path'], labels=df['label'], batch_size=...)"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, Iterable):
        raise TypeError(
            f"a {type(loader).__name__} is no loader: wrap DataLoader(dataset, batch_size=...) "
            "over a dataset of paths, such as FeaturePathDataset(directory)"
        )
    as_node(loader)  # raises TypeError for what is not iterable
    if isinstance(loader, PathLister) and loader.batch_size is None and loader.sampler is None:
        raise ValueError("the PathLister yields single paths: give it a batch_size")


def is_column(paths: Any) -> bool:
    """Whether this is a sequence of paths."""
    return (
        isinstance(paths, Sequence)
        and not isinstance(paths, str)
        and all(isinstance(path, (str, os.PathLike)) for path in paths)
    )


def way_out(batch: Any) -> str:
    """What to do about a batch that is not one of paths."""
    if isinstance(batch, str):
        return "give it a batch_size"
    if isinstance(batch, (list, tuple)) and batch and is_column(batch[0]):
        return "path_extractor=lambda batch: batch[0] takes the paths of such a batch"
    return (
        "let its dataset return paths, and not what they hold; or give a path_extractor, which "
        "returns the paths of a batch"
    )


def warn_of_ranks(loader: Any) -> bool:
    """Warn if each rank seems to read all files; whether there are several ranks.

    Lightning puts a DistributedSampler into a DataLoader, but not into one that is wrapped.
    """
    batches = getattr(loader, "batch_sampler", None)
    if (
        isinstance(loader, DataLoader)
        and isinstance(batches, BatchSampler)
        and type(batches).__module__.startswith("torch")
    ):
        warn_of_ranks_that_read_the_same(batches.sampler, "DataLoader")
    return find_rank()[0] > 1
