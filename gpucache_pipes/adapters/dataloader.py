"""GPUCachedPathDataLoader: an existing loader of paths becomes a loader of GPU batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Generic, Self, Unpack

import torch
from torchdata.nodes import BaseNode

from gpucache_pipes.adapters.checks import (
    is_column,
    require_batches_of_paths,
    require_known,
    warn_of_ranks,
    way_out,
)
from gpucache_pipes.adapters.iteration import Iteration, Progress
from gpucache_pipes.files import Paths, as_samples
from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.nodes.batch_type import Batch
from gpucache_pipes.nodes.callbacks import call, guarded
from gpucache_pipes.nodes.options import CollateOptions, OnError, PrefetchOptions
from gpucache_pipes.nodes.upstream import as_node, shown
from gpucache_pipes.store import GPUFeatureStore, StoreOptions, StoreStats
from gpucache_pipes.units import positive_int


class GPUCachedPathDataLoader(Generic[Batch]):
    """Iterates over `loader`, which yields batches of paths, and yields batches of features.

        loader = DataLoader(FeaturePathDataset("features/"), batch_size=256, shuffle=True)
        for batch in GPUCachedPathDataLoader(loader, max_cache_bytes="8GiB"):
            ...

    Each iteration is a pipeline of its own, GPUPrefetcher -> GPUCollator, and begins at its first
    `next()`. All other attributes are the wrapped loader's, its length included. Worker processes
    of the loader handle paths only; they never use the device.

    It has `state_dict` and `load_state_dict` if the loader has both, as torchdata's
    StatefulDataLoader and nodes do. A state is the wrapped loader's own, after the last batch
    that the consumer got: batches that were prefetched are not counted, so none is lost or yielded
    twice, and a state that was taken without this class can be resumed with it. As with
    StatefulDataLoader it is the state of the latest iteration. The state over a node is {"node":
    its state, "finished": whether its epoch has ended}, with what GPUPrefetcher adds for on_error.

    Args:
        loader: a DataLoader, or any iterable that can be iterated again for each epoch. A node,
            such as a PathLister with a batch_size, announces its order to the store's policy, and
            has one position: beginning a new iteration ends the one before.
        device, max_cache_bytes, max_cache_items, **store_options: as in GPUFeatureStore, of which
            one is made. Not together with `store`.
        prefetch_batches: batches that are requested ahead of the consumer, at least 1. None is 2,
            and more where the storage has latency: the `depth` of GPUPrefetcher.
        collate_fn: list of features -> batch, as in GPUCollator.
        path_extractor: batch of the loader -> sequence of its paths, for a batch that is more than
            its paths; or a dict of columns of paths, where a sample is several files. Then
            (gpu_batch, original_batch) is yielded.
        transform: gpu_batch -> gpu_batch, as in GPUCollator: before all that follows here.
        build_batch_fn: (gpu_batch, original_batch, paths) -> what to yield instead.
        store: a store to share. Without it, one is made, which `close` closes.
        ragged, padding_value, pad_to_multiple, max_length, crop: as in GPUCollator.
        on_error, max_failures: as in GPUPrefetcher; max_failures counts each iteration anew. With
            path_extractor, a batch is skipped as a whole if one of its files fails.

    Attributes:
        store: the one that is used.

    Raises:
        ValueError: prefetch_batches < 1, store options together with a store, or what GPUCollator,
            GPUPrefetcher and GPUFeatureStore refuse.
        TypeError: for a loader that is not iterable; while iterating, for a batch that is not a
            sequence of paths.
        RuntimeError: while iterating, if a later iteration over the same node has begun, and for
            a second iteration over an iterator.
    """

    # Set on instances whose loader has them: frameworks look whether the attributes exist.
    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], None]

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        device: str | torch.device | None = None,
        max_cache_bytes: int | str | None = None,
        max_cache_items: int | None = None,
        prefetch_batches: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        path_extractor: Callable[[Any], Sequence[Any]] | None = None,
        build_batch_fn: Callable[[Any, Any, Sequence[Any]], Batch] | None = None,
        store: GPUFeatureStore | None = None,
        ragged: str | Mapping[str, str] = "error",
        padding_value: float = 0.0,
        pad_to_multiple: int = 1,
        max_length: int | None = None,
        crop: str = "start",
        on_error: OnError = "raise",
        max_failures: int | None = None,
        **store_options: Unpack[StoreOptions],
    ) -> None:
        options: dict[str, Any] = {
            "device": device,
            "max_cache_bytes": max_cache_bytes,
            "max_cache_items": max_cache_items,
            **store_options,
        }
        require_known(store_options, type(self))
        # A process group of None is an error of torchrun without torch.distributed.
        given = {
            name: value
            for name, value in options.items()
            if value is not None or name == "process_group"
        }
        if store is not None and given:
            raise ValueError(f"with store=, set {', '.join(sorted(given))} on that store")
        require_batches_of_paths(loader)
        self._loader = loader
        # The node over an iterator is made once: its second epoch is an error.
        self._source = as_node(loader) if isinstance(loader, Iterator) else loader
        self._collate_options = CollateOptions(
            collate_fn=collate_fn,
            ragged=ragged,
            padding_value=padding_value,
            pad_to_multiple=pad_to_multiple,
            max_length=max_length,
            crop=crop,
            transform=transform,
        )
        self._prefetch_options = PrefetchOptions(
            depth=None
            if prefetch_batches is None
            else positive_int("prefetch_batches", prefetch_batches),
            on_error=on_error,
            max_failures=max_failures,
        )
        self._path_extractor = path_extractor
        self._build_batch_fn = build_batch_fn
        self._progress = Progress(loader, self._prefetch_options.tolerant)
        if self._progress.has_state:
            self.state_dict = self._progress.state_dict
            self.load_state_dict = self._progress.load_state_dict
        self._warned_of_ranks = warn_of_ranks(loader)
        self._owns_store = store is None
        self.store = GPUFeatureStore(**given) if store is None else store

    def __iter__(self) -> Iterator[Batch]:
        """A new iteration, which does not disturb others, except over one node."""
        if not self._warned_of_ranks:  # these may have become known since
            self._warned_of_ranks = warn_of_ranks(self._loader)
        # The path_fn not before: a method of this object in it would be a reference cycle, and the
        # store's memory would be freed by the garbage collector only.
        options = replace(self._prefetch_options, path_fn=self._paths_of)
        features = GPUPrefetcher(self._source, self.store, **vars(options))
        # `_join` calls the transform: what the collator yields still holds the loader's own batch.
        batches = GPUCollator(features, **vars(replace(self._collate_options, transform=None)))
        return Iteration(batches, features, self._progress, self._join)

    def _join(self, gpu_batch: Any, original: Any) -> Any:
        if self._collate_options.transform is not None:
            gpu_batch = call(self._collate_options.transform, "transform", gpu_batch)
        if self._build_batch_fn is not None:
            paths = self._paths_of(original)
            return guarded(self._build_batch_fn, "build_batch_fn", gpu_batch, original, paths)
        return gpu_batch if self._path_extractor is None else (gpu_batch, original)

    def _paths_of(self, batch: Any) -> Sequence[Any]:
        paths = batch if self._path_extractor is None else self._path_extractor(batch)
        if isinstance(paths, Paths):
            return paths
        samples = as_samples(paths)
        if samples is not None:
            # The batch itself, so that one of its samples may be left out.
            return paths if self._path_extractor is None else samples
        if not is_column(paths):
            if self._path_extractor is not None:
                raise TypeError(
                    "path_extractor must return a list of paths, or a dict of such columns where a "
                    f"sample is several files, not {paths!r:.200}"
                )
            raise TypeError(
                f"the loader must yield batches of paths, not {paths!r:.200}; {way_out(paths)}"
            )
        return paths

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """True, also for a loader without a length and for one of length 0."""
        return True

    def __repr__(self) -> str:
        return f"GPUCachedPathDataLoader({shown(self._loader)}, {self.store!r})"

    @property
    def sampler(self) -> Any:
        """The loader's, or the loader itself if it is a node that has `set_epoch`.

        Frameworks look for `set_epoch(epoch)` here; Lightning calls it before each epoch.
        """
        if isinstance(self._loader, BaseNode) and hasattr(self._loader, "set_epoch"):
            return self._loader
        return self.__getattr__("sampler")

    @property
    def batch_sampler(self) -> Any:
        """The loader's; None for a node."""
        return None if isinstance(self._loader, BaseNode) else self.__getattr__("batch_sampler")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not set yet: while copying, or after a failed __init__
            raise AttributeError(name)
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(f"a {type(self._loader).__name__} has no {name}")
        try:
            return getattr(self._loader, name)
        except AttributeError:
            kind = type(self._loader).__name__
            raise AttributeError(
                f"neither a GPUCachedPathDataLoader nor the {kind} in it has {name!r}"
                + _HINTS.get(name, "")
            ) from None

    def stats(self) -> StoreStats:
        """What the store has done: see `GPUFeatureStore.stats`."""
        return self.store.stats()

    def close(self) -> None:
        """Close the store, if this object has made it."""
        if self._owns_store:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_HINTS = {
    "dataset": ": it is no DataLoader; to skip batches, as skip_first_batches of accelerate does, "
    "resume by load_state_dict",
}
