"""The orders of several ranks, which each of them can compute."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.files import PathList
from gpucache_pipes.nodes.order import DrawnOrder
from gpucache_pipes.nodes.sharding import Shards
from gpucache_pipes.peers import Positions


class ShardedOrders(NamedTuple):
    """Where a lister stands in orders that are known for all shards.

    Attributes:
        drawing: draws them.
        shards: the lister's own.
        files: its list.
        epoch, position: where it is.
        flat: (order, start) -> the positions of files that are requested from there on.
        identity: what tells the order and the list from others.
    """

    drawing: DrawnOrder
    shards: Shards
    files: PathList
    epoch: int
    position: int
    flat: Callable[[NDArray[np.intp], int], NDArray[np.intp]]
    identity: dict[str, Any]


class RankOrders(NamedTuple):
    """What several ranks will request from where an epoch stands.

    Attributes:
        files: all files of the lister.
        epoch: its number.
        rest: [ranks, requests], the files of the rest of the epoch.
        following: returns the same for the next epoch. In any thread.
        batch: files of a batch, but for the last one.
        settings: what must be the same on all ranks.
    """

    files: PathList
    epoch: int
    rest: Positions
    following: Callable[[], Positions]
    batch: int
    settings: dict[str, Any]


def orders_of(lister: Any, ranks: Sequence[int], world: int, rank: int) -> RankOrders | str:
    """The orders of these ranks, from the present position of a lister; or why there are none.

    Args:
        lister: the source of a pipeline, after a reset.
        ranks: global ranks, this one included.
        world: how many ranks there are.
        rank: this one.
    """
    if not hasattr(lister, "sharded_orders"):
        return (
            f"the source of the GPUPrefetcher is a {type(lister).__name__}; a PathLister with a "
            "batch_size, and no node between, is sharded as DistributedSampler shards"
        )
    if lister.batch_size is None:
        return "the PathLister has no batch_size: give it one, instead of the GPUCollator"
    drawn = lister.sharded_orders()
    if drawn is None:
        return (
            "the order of a sampler or a stream is known to its own rank only; PathLister(..., "
            "shuffle=True) has that of DistributedSampler"
        )
    # A shard for each rank, or for each rank of the group, as with model parallelism.
    mine = drawn.shards.count, drawn.shards.index
    if mine == (world, rank):
        shards = ranks
    elif mine == (len(ranks), ranks.index(rank)):
        shards = range(len(ranks))
    else:
        return f"the PathLister yields shard {mine[1]} of {mine[0]} in rank {rank} of {world}"

    def positions(epoch: int, start: int) -> Positions:
        orders = drawn.drawing.draw_shards(epoch, shards)
        return np.stack([drawn.flat(order, start) for order in orders])

    files = drawn.files
    rest = positions(drawn.epoch, drawn.position)
    first = files.paths[0].rpartition("/")[0].rpartition("/")[2]
    settings = {
        "epoch": drawn.epoch, "position": drawn.position, "batch_size": lister.batch_size,
        "parts": len(files.parts), **drawn.identity, "directory": first,
        "requests left": rest.shape[1], "checksum of requests": zlib.crc32(rest.data),
    }  # fmt: skip
    batch = lister.batch_size * max(1, len(files.parts))
    return RankOrders(
        files, drawn.epoch, rest, lambda: positions(drawn.epoch + 1, 0), batch, settings
    )
