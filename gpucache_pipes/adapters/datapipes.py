"""`.gpu_prefetch()` and `.gpu_collate()` for IterDataPipes; importing this registers them."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterDataPipe

from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.nodes.options import CollateOptions, OnError, PrefetchOptions, require_store
from gpucache_pipes.store import GPUFeatureStore


class GPUPrefetchIterDataPipe(IterDataPipe[Any]):
    """`source.gpu_prefetch(store, depth=2, ...)`: paths become features, as GPUPrefetcher."""

    def __init__(
        self,
        source_datapipe: IterDataPipe[Any],
        store: GPUFeatureStore,
        depth: int = 2,
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
        """The node that does it, over the source."""
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
    """`source.gpu_collate(...)`: features become batches, as GPUCollator."""

    def __init__(
        self,
        source_datapipe: IterDataPipe[Any],
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_size: int | None = None,
        drop_last: bool = False,
        **ragged_options: Any,
    ) -> None:
        super().__init__()
        self.source_datapipe = source_datapipe
        self._options = CollateOptions(collate_fn, batch_size, drop_last, **ragged_options)

    def __iter__(self) -> Iterator[Any]:
        source: Any = self.source_datapipe
        if isinstance(source, GPUPrefetchIterDataPipe):
            source = source.new_node()  # which can gather many single features at once
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
    # A module that is loaded again brings new classes of the same names.
    IterDataPipe.functions.pop(name, None)
    IterDataPipe.register_datapipe_as_function(name, pipe)


_register("gpu_prefetch", GPUPrefetchIterDataPipe)
_register("gpu_collate", GPUCollateIterDataPipe)
