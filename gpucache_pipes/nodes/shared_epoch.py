"""SharedEpoch: an epoch of a pipeline whose ranks share their caches."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gpucache_pipes.files import Paths, Samples
from gpucache_pipes.nodes.rank_orders import RankOrders, orders_of
from gpucache_pipes.nodes.sharding import find_rank
from gpucache_pipes.nodes.shared_batch import SharedBatch
from gpucache_pipes.peers import (
    ENDS,
    FAILS,
    GOES_ON,
    Contents,
    Exchange,
    PeerGroup,
    Positions,
    Schedule,
)
from gpucache_pipes.store import GPUFeatureStore, PendingBatch, Upcoming

_log = logging.getLogger("gpucache_pipes")

AHEAD = 2
"""Messages that are under way at most, where no depth is given."""


class SharedEpoch:
    """The steps of one epoch of a pipeline, from a reset on.

    A step is one batch of each rank. All ranks do the same in each:

    1. `batch`, some steps ahead: request from the store the files that this rank serves in the
    step,
       which are its own batch where nothing is to be exchanged;
    2. `step`: make the batch of this rank; agree with the others that all have theirs; send the
    rows
       of a later step.

    All collective operations are in `step`, which the thread that trains calls.

    Args:
        store: of the pipeline, with a process group.
        owner: names the pipeline to the policy.
        orders: of the ranks of the group.
        depth: of the pipeline, or None.
    """

    def __init__(
        self, store: GPUFeatureStore, owner: object, orders: RankOrders, depth: int | None
    ) -> None:
        assert store.peers is not None
        self.store = store
        self.ahead = min(depth or AHEAD, AHEAD)
        self._group: PeerGroup = store.peers
        self._owner = owner
        self._orders = orders
        self._thread = threading.current_thread()
        self._owners = self._group.owners_of(
            len(orders.files.paths), orders.settings["order"]["fingerprint"]
        )
        self._before = self._owners.checksum
        self._owners.ranks = self._owners.assigned(orders.rest, orders.batch)
        self._schedule = Schedule(orders.rest, orders.batch, self._owners.ranks, self._group.index)
        self._exchange = Exchange(
            self._group, self._schedule, self.ahead, store.serving.backend, self._serve
        )
        self._serving: dict[int, PendingBatch] = {}
        self._at = 0
        self._ended = False
        self._place: int | None = None  # of step 0; None before all have begun

    def upcoming(self) -> Upcoming:
        """What this rank serves in the rest of the epoch, and in the next one."""
        rest, orders = self._schedule.all_served(), self._orders
        owners, me = self._owners, self._group.index

        def both_epochs() -> Positions:
            following = orders.following()
            ranks = owners.assigned(following, orders.batch)
            then = Schedule(following, orders.batch, ranks, me)
            return np.concatenate([rest, then.all_served()])

        return Upcoming(orders.files, both_epochs, len(rest))

    # Requests, some steps ahead

    def batch(self, step: int, asked: Sequence[Any] | Samples, ahead: int) -> Any:
        """The pending batch of a step; requests what this rank serves in it.

        Args:
            step: which one; they come in their order.
            asked: the paths of this rank's batch, or samples.
            ahead: how many more such batches will be pending.
        """
        files = asked.paths if isinstance(asked, Samples) else asked
        if step >= self._schedule.steps or not self._announced(step, files):
            _warn("caches are not shared for batches that path_fn changes")
            if step < self._schedule.steps and self._schedule.crosses[step]:
                self._request_served(step, ahead)
            return self.read_here(asked)
        if not self._schedule.crosses[step]:
            return self.store.request(asked, owner=self._owner, ahead=ahead)
        self._request_served(step, ahead)
        return SharedBatch(self, step, asked)

    def _request_served(self, step: int, ahead: int) -> None:
        served, _ = self._schedule.served(step)
        paths = Paths(self._orders.files, served)
        self._serving[step] = self.store.request(paths, owner=self._owner, ahead=ahead)

    def _announced(self, step: int, files: Any) -> bool:
        """Whether a batch is the one that all ranks know of."""
        own = self._schedule.own(step)
        return isinstance(files, Paths) and np.array_equal(files.positions, own)

    def read_here(self, asked: Sequence[Any] | Samples) -> PendingBatch:
        """Request files from the store of this rank, whoever owns them."""
        return self.store.request(asked, owner=self._owner)

    # Steps

    def begin(self) -> None:
        """Meet the other ranks. A collective operation, of the first step."""
        self._group.open()
        settings = {
            **self._orders.settings, "ahead": self.ahead, "epoch": self._orders.epoch,
            "owners of files": self._before,
        }  # fmt: skip
        place = self._group.begin(self._orders.epoch, settings)
        self._place = place
        for step in range(self.ahead):
            self._exchange.send(step, self._where(step), place)

    def step(self, draw: Callable[[], None], make: Callable[[], Any]) -> Any:
        """The next batch, at the same step on all ranks. A collective operation.

        Args:
            draw: requests what is needed ahead.
            make: makes the batch of this rank.

        Raises:
            RankError: another rank had an error, is somewhere else, or does not answer.
            Exception: what `make` raises. All ranks may go on with the next step.
        """
        if threading.current_thread() is not self._thread:
            raise RuntimeError(
                "ranks that share their caches exchange features in next(), which must be called "
                "in the thread that has reset the pipeline and trains: after the GPUPrefetcher, "
                "leave out nodes with threads of their own, such as a Prefetcher"
            )
        if self._ended:
            raise StopIteration
        if self._at >= self._schedule.steps:
            return make()  # the end of the epoch, which is the same on all ranks
        draw()
        if self._place is None:
            self.begin()
        assert self._place is not None
        result, error, status = None, None, GOES_ON
        where, place = self._where(self._at), self._place + self._at
        try:
            result = make()
            if self._exchange.error is not None:
                raise self._exchange.error
        except StopIteration:
            status = ENDS
        except Exception as raised:
            status, error = FAILS, raised
        self._exchange.error = None
        try:
            worst = self._group.agree(status, place, where)
            if worst == ENDS:
                self._ended = True
                raise StopIteration
            self._exchange.forget(self._at)
            self._at += 1
            self._exchange.send(self._at - 1 + self.ahead, where, place)
            if worst == FAILS:
                raise self._group.error_of_all(error, place, where)
        finally:
            del error  # it holds this frame
        return result

    def _where(self, step: int) -> str:
        return f"batch {step} of this pass over epoch {self._orders.epoch}"

    def has_sent(self, step: int) -> bool:
        """Whether the rows of a step are on their way."""
        return step < self._exchange.sent

    def arrival(self, step: int) -> Any:
        """The rows of a step, after waiting for them."""
        assert self._place is not None
        return self._exchange.arrival(step, self._where(step), self._place + step)

    def forget(self, step: int) -> None:
        """The rows of a step are not needed any more."""
        self._exchange.forget(step)

    def _serve(self, step: int) -> "_Served":
        served, _ = self._schedule.served(step)
        return _Served(self.store, self._serving.pop(step, None), len(served))

    def release(self) -> None:
        """Give up all requests. Takes no lock."""
        serving, self._serving = self._serving, {}
        for batch in serving.values():
            batch.abandon()
        self._group.left += self._exchange.release()


class _Served:
    """What this rank serves in a step; nothing if it was not requested."""

    def __init__(self, store: GPUFeatureStore, batch: PendingBatch | None, count: int) -> None:
        self._serving = store.serving
        self._count = count
        self._batch = batch

    def look(self) -> Contents:
        if self._batch is None:  # the source has failed: others read for themselves
            return Contents([], np.full(self._count, -1, np.intp), [])
        return self._serving.look(self._batch)

    def pack(self) -> torch.Tensor:
        if self._batch is None:
            return torch.empty(0, dtype=torch.uint8, device=self._serving.backend.device)
        return self._serving.pack(self._batch)

    def abandon(self) -> None:
        if self._batch is not None:
            self._batch.abandon()


def share(
    store: GPUFeatureStore, source: Any, owner: object, depth: int | None
) -> SharedEpoch | None:
    """An epoch of `source`, which was just reset, with the caches of other ranks; None without.

    Where the orders of the other ranks are not known, this is logged once, and each rank uses its
    own cache, as without a process group.
    """
    group = store.peers
    if group is None or len(group) < 2:
        return None
    orders = orders_of(source, group.ranks, *find_rank())
    if isinstance(orders, str):
        _warn(f"caches are not shared by a pipeline, since {orders}")
        return None
    return SharedEpoch(store, owner, orders, depth)


_warned: set[str] = set()


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        _log.warning("%s: each rank reads its files itself", text)
