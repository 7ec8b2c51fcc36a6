"""`.gpu_prefetch()` and `.gpu_collate()` of IterDataPipes. Importing this module registers them."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterDataPipe

from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.nodes.options import CollateOptions, OnError, PrefetchOptions, require_store
from gpucache_pipes.store import GPUFeatureStore


class GPUPrefetchIterDataPipe(IterDataPipe[Any]):
    """`source.gpu_prefetch(store, ...)`: a GPUPrefetcher over a DataPipe.

    Each iteration makes a new node, and shuts it down when the iterator is closed or collected.

    Args:
        source_datapipe: yields paths, sequences of paths, or with path_fn anything else.
        store, depth, path_fn, join_fn, on_error, max_failures: as in GPUPrefetcher.

    Raises:
        ValueError, TypeError: for wrong arguments, as GPUPrefetcher.
    """

    def __init__(
        self,
        source_datapipe: IterDataPipe[Any],
        store: GPUFeatureStore,
        depth: int | None = None,
        path_fn: Callable[[Any], Any] | None = None,
        join_fn: Callable[[Any, Any], Any] | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
    ) -> None:
        super().__init__()
        self.source_datapipe = source_datapipe
        self.store = store
        require_store(store)
        self._options = PrefetchOptions(depth, path_fn, join_fn, on_error, max_failures)

    def new_node(self) -> GPUPrefetcher:
        """A new GPUPrefetcher over the source."""
        return GPUPrefetcher(self.source_datapipe, self.store, **vars(self._options))

    def __iter__(self) -> Iterator[Any]:
        node = self.new_node()
        try:
            yield from node
        finally:
            node.shutdown()

    def __len__(self) -> int:
        return len(self.source_datapipe)


class GPUCollateIterDataPipe(IterDataPipe[Any]):
    """`source.gpu_collate(...)`: a GPUCollator over a DataPipe.

    Directly behind `gpu_prefetch`, `batch_size` single features are gathered at once.

    Args:
        source_datapipe: yields FeatureBatches or sequences of features; with batch_size, features.
        collate_fn, batch_size, drop_last: as in GPUCollator.
        **options: its ragged, padding_value, pad_to_multiple, max_length and transform.

    Raises:
        ValueError, TypeError: for wrong arguments, as GPUCollator.
    """

    def __init__(
        self,
        source_datapipe: IterDataPipe[Any],
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_size: int | None = None,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.source_datapipe = source_datapipe
        self._options = CollateOptions(collate_fn, batch_size, drop_last, **options)

    def __iter__(self) -> Iterator[Any]:
        source: Any = self.source_datapipe
        if isinstance(source, GPUPrefetchIterDataPipe):
            source = source.new_node()  # GPUCollator gathers at once from a node
        node = GPUCollator(source, **vars(self._options))
        try:
            yield from node
        finally:
            node.shutdown()

    def __len__(self) -> int:
        count = len(self.source_datapipe)
        size = self._options.batch_size
        if size is None:
            return count
        return count // size if self._options.drop_last else -(-count // size)


def _register(name: str, pipe: type[IterDataPipe[Any]]) -> None:
    # A reloaded module registers its new classes under the same names.
    IterDataPipe.functions.pop(name, None)
    IterDataPipe.register_datapipe_as_function(name, pipe)


_register("gpu_prefetch", GPUPrefetchIterDataPipe)
_register("gpu_collate", GPUCollateIterDataPipe)
