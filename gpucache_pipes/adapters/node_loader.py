"""NodeLoader: torchdata's Loader, with the length, the epochs and the figures of its nodes."""

from collections.abc import Iterator

from torchdata.nodes import Loader

from gpucache_pipes.nodes import GPUPrefetcher
from gpucache_pipes.nodes.batch_type import Batch
from gpucache_pipes.nodes.upstream import find_upstream, length_of, shown, single_upstream
from gpucache_pipes.store import StoreStats


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
        """See PathLister. Raises TypeError for a pipeline without one."""
        set_epoch = find_upstream(self.root, "set_epoch")
        if set_epoch is None:
            raise TypeError("no PathLister is in front of this pipeline, to set its epoch")
        set_epoch(epoch)

    def stats(self) -> StoreStats:
        """What the store of the pipeline has done. Raises TypeError for one without a store."""
        for node in single_upstream(self.root):
            if isinstance(node, GPUPrefetcher):
                return node.store.stats()
        raise TypeError("no GPUPrefetcher is in this pipeline, whose store has statistics")

    def __repr__(self) -> str:
        return f"NodeLoader({shown(self.root)})"
