"""GPUCachedPathDataLoader: an existing loader of paths becomes a loader of GPU batches."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.store import GPUFeatureStore
from gpucache_pipes.units import positive_int


class GPUCachedPathDataLoader:
    """Iterates over `loader`, which yields batches of paths, and yields batches of features.

        loader = DataLoader(paths, batch_size=256, shuffle=True)
        for batch in GPUCachedPathDataLoader(loader, max_cache_bytes="8GiB"):
            ...

    Everything but iteration is the wrapped loader's: its attributes, its length. Worker
    processes of the loader handle paths only, and never see the device.

    Args:
        loader: a DataLoader, or any iterable that can be iterated anew for each epoch.
        device, max_cache_bytes, max_cache_items, **store_options: of the GPUFeatureStore that
            is made; not together with `store`.
        prefetch_batches: batches that are on their way while one is used, at least 1.
        collate_fn: list of features -> batch; the default is GPUCollator's.
        path_extractor: batch of the loader -> its paths, where the batch is more than paths.
            Then the default result is the tuple (gpu_batch, original_batch).
        build_batch_fn: (gpu_batch, original_batch, paths) -> what to yield.
        store: a store to share; else one is made, and closed with this loader.

    Raises:
        ValueError: prefetch_batches < 1, or store options beside a store.
        TypeError: while iterating, for a batch that is one str or holds no paths.
    """

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
        self._prefetch_batches = positive_int("prefetch_batches", prefetch_batches)
        self._loader = loader
        self._collate_fn = collate_fn
        self._path_extractor = path_extractor
        self._build_batch_fn = build_batch_fn
        self._owns_store = store is None
        self.store = GPUFeatureStore(**given) if store is None else store

    def __iter__(self) -> Iterator[Any]:
        # Nodes of its own for each iteration: two at once do not disturb each other.
        features = GPUPrefetcher(
            self._loader, self.store, depth=self._prefetch_batches, path_fn=self._paths_of
        )
        batches = GPUCollator(features, collate_fn=self._collate_fn)
        try:
            for gpu_batch, original in batches:
                if self._build_batch_fn is not None:
                    yield self._build_batch_fn(gpu_batch, original, self._paths_of(original))
                else:
                    yield gpu_batch if self._path_extractor is None else (gpu_batch, original)
        finally:
            features.shutdown()

    def _paths_of(self, batch: Any) -> Sequence[Any]:
        paths = batch if self._path_extractor is None else self._path_extractor(batch)
        if (
            isinstance(paths, str)
            or not isinstance(paths, Sequence)
            or not all(isinstance(path, (str, os.PathLike)) for path in paths)
        ):
            raise TypeError(
                f"the loader must yield batches of paths, not {paths!r:.200}; give it a "
                "batch_size, or say by path_extractor where in a batch the paths are"
            )
        return paths

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not set yet, while copying or after a failed __init__
            raise AttributeError(name)
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
