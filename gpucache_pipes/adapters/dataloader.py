"""GPUCachedPathDataLoader: an existing loader of paths becomes a loader of GPU batches."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torchdata.nodes import BaseNode

from gpucache_pipes.adapters.iteration import Iteration, Progress
from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.nodes.callbacks import guarded
from gpucache_pipes.nodes.options import CollateOptions, OnError, PrefetchOptions
from gpucache_pipes.nodes.sharding import find_rank
from gpucache_pipes.nodes.upstream import as_node
from gpucache_pipes.store import GPUFeatureStore
from gpucache_pipes.units import positive_int


class GPUCachedPathDataLoader:
    """Iterates over `loader`, which yields batches of paths, and yields batches of features.

        loader = DataLoader(FeaturePathDataset("features/"), batch_size=256, shuffle=True)
        for batch in GPUCachedPathDataLoader(loader, max_cache_bytes="8GiB"):
            ...

    Everything but iteration is the wrapped loader's: its attributes, its length. Worker
    processes of the loader handle paths only, and never see the device.

    Where the loader has `state_dict` and `load_state_dict`, as torchdata's StatefulDataLoader or a
    node, this has them, too. A state is one of the wrapped loader, behind the last batch that was
    consumed: what is on its way is neither lost nor served twice, and a state that was taken
    without this class resumes with it. (That of a node is {"node": its state, "finished":
    whether the epoch came to its end}.) As with StatefulDataLoader it is that of the latest
    iteration.

    Args:
        loader: a DataLoader, or any iterable that can be iterated anew for each epoch. A node, such
            as a PathLister with a batch_size, tells its order in advance, and is iterated by one
            at a time.
        device, max_cache_bytes, max_cache_items, **store_options: of the GPUFeatureStore that
            is made; not together with `store`.
        prefetch_batches: batches that are on their way while one is used, at least 1.
        collate_fn: list of features -> batch; the default is GPUCollator's.
        path_extractor: batch of the loader -> its paths, where the batch is more than paths.
            Then the default result is the tuple (gpu_batch, original_batch).
        build_batch_fn: (gpu_batch, original_batch, paths) -> what to yield.
        store: a store to share; else one is made, and closed with this loader.
        ragged, padding_value, pad_to_multiple: as in GPUCollator.
        on_error, max_failures: as in GPUPrefetcher. With path_extractor a batch of which a file
            fails is skipped as a whole.

    Raises:
        ValueError: prefetch_batches < 1, or store options beside a store.
        TypeError: while iterating, for a batch that is one str or holds no paths.
    """

    # Set where the loader has them: who looks for a state must not find one that cannot be.
    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], None]

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        device: str | torch.device | None = None,
        max_cache_bytes: int | str | None = None,
        max_cache_items: int | None = None,
        prefetch_batches: int = 2,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        path_extractor: Callable[[Any], Sequence[Any]] | None = None,
        build_batch_fn: Callable[[Any, Any, Sequence[Any]], Any] | None = None,
        store: GPUFeatureStore | None = None,
        ragged: str | Mapping[str, str] = "error",
        padding_value: float = 0.0,
        pad_to_multiple: int = 1,
        on_error: OnError = "raise",
        max_failures: int | None = None,
        **store_options: Any,
    ) -> None:
        options = {
            "device": device,
            "max_cache_bytes": max_cache_bytes,
            "max_cache_items": max_cache_items,
            **store_options,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if store is not None and given:
            raise ValueError(f"set {', '.join(sorted(given))} on the store that is given")
        as_node(loader)  # or a TypeError
        self._loader = loader
        # An iterator has one pass, and a second one is an error.
        self._source = as_node(loader) if isinstance(loader, Iterator) else loader
        self._collate_options = CollateOptions(
            collate_fn=collate_fn,
            ragged=ragged,
            padding_value=padding_value,
            pad_to_multiple=pad_to_multiple,
        )
        self._prefetch_options = PrefetchOptions(
            depth=positive_int("prefetch_batches", prefetch_batches),
            on_error=on_error,
            max_failures=max_failures,
        )
        self._path_extractor = path_extractor
        self._build_batch_fn = build_batch_fn
        self._progress = Progress(loader, self._prefetch_options.tolerant)
        if self._progress.has_state:
            self.state_dict = self._progress.state_dict
            self.load_state_dict = self._progress.load_state_dict
        _warn_of_ranks_that_read_the_same(loader)
        self._owns_store = store is None
        self.store = GPUFeatureStore(**given) if store is None else store

    def __iter__(self) -> Iterator[Any]:
        # Nodes of its own for each iteration: two at once do not disturb each other.
        # The path_fn not before: a method of this object in it would be a reference cycle, and the
        # store's memory would be freed by the garbage collector only.
        options = replace(self._prefetch_options, path_fn=self._paths_of)
        features = GPUPrefetcher(self._source, self.store, **vars(options))
        batches = GPUCollator(features, **vars(self._collate_options))
        return Iteration(batches, features, self._progress, self._join)

    def _join(self, gpu_batch: Any, original: Any) -> Any:
        if self._build_batch_fn is not None:
            paths = self._paths_of(original)
            return guarded(self._build_batch_fn, "build_batch_fn", gpu_batch, original, paths)
        return gpu_batch if self._path_extractor is None else (gpu_batch, original)

    def _paths_of(self, batch: Any) -> Sequence[Any]:
        paths = batch if self._path_extractor is None else self._path_extractor(batch)
        if (
            isinstance(paths, str)
            or not isinstance(paths, Sequence)
            or not all(isinstance(path, (str, os.PathLike)) for path in paths)
        ):
            if self._path_extractor is not None:
                raise TypeError(f"path_extractor must give a list of paths, not {paths!r:.200}")
            raise TypeError(
                f"the loader must yield batches of paths, not {paths!r:.200}; give it a "
                "batch_size, or say by path_extractor where in a batch the paths are"
            )
        return paths

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """True, also over a loader that has no length."""
        return True

    @property
    def sampler(self) -> Any:
        """The loader's; for a node that has set_epoch the node itself.

        Frameworks look here for `set_epoch(epoch)`, which Lightning calls before each epoch.
        """
        if isinstance(self._loader, BaseNode) and hasattr(self._loader, "set_epoch"):
            return self._loader
        return self.__getattr__("sampler")

    @property
    def batch_sampler(self) -> Any:
        """The loader's; None for a node."""
        return None if isinstance(self._loader, BaseNode) else self.__getattr__("batch_sampler")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not set yet, while copying or after a failed __init__
            raise AttributeError(name)
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(f"a {type(self._loader).__name__} has no {name}")
        return getattr(self._loader, name)

    def close(self) -> None:
        """Close the store, if it was made here."""
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> "GPUCachedPathDataLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _warn_of_ranks_that_read_the_same(loader: Any) -> None:
    """Nobody can put a DistributedSampler into a DataLoader that is wrapped, as Lightning does."""
    ranks, _ = find_rank()
    batches = getattr(loader, "batch_sampler", None)
    if (
        ranks > 1
        and isinstance(loader, DataLoader)
        and isinstance(batches, BatchSampler)
        and isinstance(batches.sampler, (RandomSampler, SequentialSampler))
        # and not something of the user's own that may know its rank
        and all(type(s).__module__.startswith("torch") for s in (batches, batches.sampler))
    ):
        warnings.warn(
            f"each of the {ranks} ranks may read all files of this DataLoader: give it a "
            "DistributedSampler, or wrap PathLister(files, batch_size=...), which takes the part "
            "of its rank",
            stacklevel=3,
        )
