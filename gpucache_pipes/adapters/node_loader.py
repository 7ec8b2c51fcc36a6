"""NodeLoader: torchdata's Loader, with the length, the epochs and the figures of its nodes."""

from collections.abc import Iterator
from typing import Any

from torchdata.nodes import BaseNode, Loader

from gpucache_pipes.adapters.dataloader import GPUCachedPathDataLoader
from gpucache_pipes.nodes import GPUPrefetcher
from gpucache_pipes.nodes.batch_type import Batch
from gpucache_pipes.nodes.upstream import length_of, shown, upstream_nodes
from gpucache_pipes.store import StoreStats

_UPSTREAM = "upstream, by the attribute `source` that nodes have"


class NodeLoader(Loader[Batch]):
    """`torchdata.nodes.Loader` over a pipeline of nodes, for training loops and frameworks.

        paths = PathLister("features/", batch_size=256, shuffle=True, seed=0)
        loader = NodeLoader(GPUCollator(GPUPrefetcher(paths, store)))
        for batch in tqdm(loader):
            ...

    Iterates, and saves and loads states, as the Loader does. It has a length where the PathLister
    has one, and no node between yields more or fewer elements than it gets.

    Args:
        root: the last node of the pipeline.
        restart_on_stop_iteration: as in torchdata.nodes.Loader.
    """

    def __init__(self, root: BaseNode[Batch], restart_on_stop_iteration: bool = True) -> None:
        given: Any = root
        if not isinstance(given, BaseNode):
            is_loader = isinstance(given, (Loader, GPUCachedPathDataLoader))
            raise TypeError(
                f"the root must be a node, not {type(given).__name__}"
                + (", which is a loader itself: use it as it is" if is_loader else "")
            )
        super().__init__(root, restart_on_stop_iteration)

    def __iter__(self) -> Iterator[Batch]:
        """As torchdata's; with a type."""
        iterator: Iterator[Batch] = super().__iter__()  # type: ignore[no-untyped-call]
        return iterator

    def __len__(self) -> int:
        """Batches of an epoch. Raises TypeError where that is not known."""
        return length_of(self.root)

    def __bool__(self) -> bool:
        return True  # also without a length

    def set_epoch(self, epoch: int) -> None:
        """See PathLister; for all of them upstream. Raises TypeError if there is none."""
        listers = [node for node in upstream_nodes(self.root) if hasattr(node, "set_epoch")]
        if not listers:
            raise TypeError(f"no PathLister is found {_UPSTREAM}, to set its epoch")
        for lister in listers:
            lister.set_epoch(epoch)

    def stats(self) -> StoreStats:
        """What the store of the pipeline has done. Raises TypeError unless it has one store."""
        stores = {
            id(node.store): node.store
            for node in upstream_nodes(self.root)
            if isinstance(node, (GPUPrefetcher, GPUCachedPathDataLoader))
        }
        if len(stores) != 1:
            raise TypeError(
                f"{len(stores)} stores are found {_UPSTREAM}: ask one of yours for its stats()"
            )
        return next(iter(stores.values())).stats()

    def __repr__(self) -> str:
        return f"NodeLoader({shown(self.root)})"
