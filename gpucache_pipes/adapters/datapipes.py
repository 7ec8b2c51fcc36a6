"""`.gpu_prefetch()` and `.gpu_collate()` for IterDataPipes; importing this registers them."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterDataPipe

from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.nodes.failures import OnError
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
        self._options: dict[str, Any] = {
            "depth": depth,
            "path_fn": path_fn,
            "join_fn": join_fn,
            "on_error": on_error,
            "max_failures": max_failures,
        }
        GPUPrefetcher((), store, **self._options)  # wrong options: now, and not while training

    def new_node(self) -> GPUPrefetcher:
        """The node that does it, over the source."""
        return GPUPrefetcher(self.source_datapipe, self.store, **self._options)

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
        self._options: dict[str, Any] = {
            "collate_fn": collate_fn,
            "batch_size": batch_size,
            "drop_last": drop_last,
            **ragged_options,
        }
        GPUCollator((), **self._options)

    def __iter__(self) -> Iterator[Any]:
        source: Any = self.source_datapipe
        if isinstance(source, GPUPrefetchIterDataPipe):
            source = source.new_node()  # which can gather many single features at once
        node = GPUCollator(source, **self._options)
        try:
            yield from node
        finally:
            node.shutdown()

    def __len__(self) -> int:
        count = len(self.source_datapipe)
        size: int | None = self._options["batch_size"]
        if size is None:
            return count
        return count // size if self._options["drop_last"] else -(-count // size)


def _register(name: str, pipe: type[IterDataPipe[Any]]) -> None:
    # A module that is loaded again brings new classes of the same names.
    IterDataPipe.functions.pop(name, None)
    IterDataPipe.register_datapipe_as_function(name, pipe)


_register("gpu_prefetch", GPUPrefetchIterDataPipe)
_register("gpu_collate", GPUCollateIterDataPipe)
