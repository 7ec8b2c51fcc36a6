"""SharedEpoch: an epoch of a pipeline whose ranks share their caches."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

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
    Arrival,
    Contents,
    Exchange,
    Owners,
    PeerGroup,
    Positions,
    Schedule,
)
from gpucache_pipes.store import GPUFeatureStore, PendingBatch, Upcoming
from gpucache_pipes.store.serving import Serving

if TYPE_CHECKING:
    from gpucache_pipes.nodes.lookahead import Lookahead

_log = logging.getLogger("gpucache_pipes")

AHEAD = 2
"""Messages that are under way at most, where no depth is given."""


class SharedEpoch:
    """The steps of one epoch of a pipeline, from a reset on.

    A step is one batch of each rank. In each, all ranks do the same:

    1. `batch`, some steps ahead, requests from the store the files that this rank serves in the
       step. Where nothing is to be exchanged, these are its own batch.
    2. `step` makes the batch of this rank, agrees with the others that all have theirs, and sends
       the rows of a later step.

    All collective operations are in `step`, which the thread that trains calls. A reset is none.

    Args:
        store: of the pipeline, with a process group.
        owner: names the pipeline to the policy.
        orders: of the ranks of the group.
        depth: of the pipeline, or None.

    Attributes:
        store: as given.
        ahead: how many messages are under way at most.
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
        self._serving: dict[int, PendingBatch] = {}
        self._at = 0
        self._ended = self._released = False
        # Once all ranks have begun: the point of step 0, who sends what, and the messages.
        self._point = 0
        self._schedule: Schedule | None = None
        self._exchange: Exchange | None = None

    # Requests, some steps ahead

    def batch(self, step: int, asked: Sequence[Any] | Samples, ahead: int) -> Any:
        """The pending batch of a step; requests what this rank serves in it.

        Args:
            step: which one; they come in their order.
            asked: the paths of this rank's batch, or samples.
            ahead: how many more such batches will be pending.
        """
        schedule = self._schedule
        if schedule is None or step >= schedule.steps:
            return self.read_here(asked)
        files = asked.paths if isinstance(asked, Samples) else asked
        crosses = bool(schedule.crosses[step])
        is_own = isinstance(files, Paths) and np.array_equal(files.positions, schedule.own(step))
        if is_own and not crosses:
            return self.store.request(asked, owner=self._owner, ahead=ahead)
        if crosses:
            served, _ = schedule.served(step)
            paths = Paths(self._orders.files, served)
            self._serving[step] = self.store.request(paths, owner=self._owner, ahead=ahead)
        if is_own:
            return SharedBatch(self, step, asked)
        _warn("caches are not shared for batches that path_fn changes")
        return self.read_here(asked)

    def read_here(self, asked: Sequence[Any] | Samples) -> PendingBatch:
        """Request files from the store of this rank, also those that another rank owns."""
        return self.store.request(asked, owner=self._owner)

    # Steps

    def _begin(self) -> None:
        """Meet the other ranks. A collective operation, of the first step."""
        group, orders, store = self._group, self._orders, self.store
        group.open()
        owners = group.owners_of(orders.files.paths, orders.settings["fingerprint"])
        settings = {
            **orders.settings, "messages ahead": self.ahead, "checksum of owners": owners.checksum,
        }  # fmt: skip
        where = f"the beginning of epoch {orders.epoch}"
        self._point = group.begin(where, settings)
        owners.ranks = owners.assigned(orders.rest, orders.batch)
        schedule = Schedule(orders.rest, orders.batch, owners.ranks, group.index)
        backend, stream = store.serving.backend, store.serving.stream
        with stream.issuing():
            group.settle(where)
        # Not a method of this object: a reference cycle would keep the store until it is collected.
        serve = partial(_serve, store.serving, self._serving)
        self._exchange = Exchange(group, schedule, self.ahead, backend, stream, serve)
        self._schedule = schedule
        store.announce(self._owner, partial(_upcoming, schedule, orders, owners, group.index))

    def step(self, lookahead: "Lookahead", make: Callable[[], Any]) -> Any:
        """The next batch, at the same step on all ranks. A collective operation.

        Args:
            lookahead: requests what is needed ahead. Where the ranks lose step, its state remains
                in front of this batch, which no consumer has got.
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
        if self._released:
            raise RuntimeError("this pipeline was shut down: reset it first, on all ranks")
        if self._ended:
            raise StopIteration
        # Whether an exception leaves ranks out of step: what is in front of `make` in the first
        # step, and what follows it in every step.
        lost = self._exchange is None
        before = lookahead.state
        result = error = None
        try:
            if self._exchange is None:
                self._begin()
                lookahead.draw(1)
                for first in range(self.ahead):
                    self._send(first, self._where(first))
            assert self._schedule is not None
            if self._at >= self._schedule.steps:
                return make()  # the end of the epoch, which is the same on all ranks
            lost = False
            lookahead.draw(1)
            where = self._where(self._at)
            status, result, error = self._made(make)
            lost = True
            worst = self._group.agree(status, self._point + self._at, where)
            if worst != ENDS:
                self._at += 1
                self._send(self._at - 1 + self.ahead, where)
            if worst == FAILS:
                error = self._group.error_of_all(error, where)
        except BaseException as raised:
            if lost or lookahead.state is not before:
                lookahead.state = before
                if not isinstance(raised, Exception):
                    self._group.interrupted(self._where(self._at))
            raise
        if worst == ENDS:
            self._ended = True
            raise StopIteration
        try:
            if error is not None:
                raise error
        finally:
            del error  # it holds this frame
        return result

    def _send(self, step: int, where: str) -> None:
        assert self._exchange is not None
        self._exchange.forget(step - self.ahead)
        self._exchange.send(step, where)

    def _made(self, make: Callable[[], Any]) -> tuple[int, Any, Exception | None]:
        """What this rank has to say of a step, its batch, and its error."""
        assert self._exchange is not None
        try:
            result = make()
            unserved, self._exchange.error = self._exchange.error, None
            if unserved is not None:
                return FAILS, None, unserved
            return GOES_ON, result, None
        except StopIteration:
            return ENDS, None, None
        except Exception as error:
            return FAILS, None, error

    def _where(self, step: int) -> str:
        return f"batch {step} of epoch {self._orders.epoch}, counted from where it was begun"

    def has_sent(self, step: int) -> bool:
        """Whether the rows of a step are on their way."""
        return self._exchange is not None and step < self._exchange.sent

    def arrival(self, step: int) -> Arrival:
        """The rows of a step that was sent, after waiting for them."""
        assert self._exchange is not None
        return self._exchange.arrival(step, self._where(step))

    def release(self) -> None:
        """Give up all requests. Takes no lock."""
        self._released = True
        for step in list(self._serving):
            if (batch := self._serving.pop(step, None)) is not None:
                batch.abandon()
        if self._exchange is not None:
            self._group.left.extend(self._exchange.release())


def _upcoming(schedule: Schedule, orders: RankOrders, owners: Owners, me: int) -> Upcoming:
    """What a rank serves in the rest of an epoch, and in the next one."""
    rest = schedule.all_served()

    def both_epochs() -> Positions:
        following = orders.following()
        then = Schedule(following, orders.batch, owners.assigned(following, orders.batch), me)
        return np.concatenate([rest, then.all_served()])

    return Upcoming(orders.files, both_epochs, len(rest))


class _Served(NamedTuple):
    """What this rank serves in a step."""

    serving: Serving
    batch: PendingBatch

    def look(self) -> Contents:
        return self.serving.look(self.batch)

    def pack(self) -> torch.Tensor:
        return self.serving.pack(self.batch)

    def abandon(self) -> None:
        self.batch.abandon()


def _serve(serving: Serving, requested: dict[int, PendingBatch], step: int) -> _Served | None:
    """What this rank serves in a step, taken out of what was requested."""
    batch = requested.pop(step, None)
    return None if batch is None else _Served(serving, batch)


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
