"""The messages of one epoch: one to each rank in each step that needs any, some steps ahead."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from gpucache_pipes.device import Backend, ExchangeStream
from gpucache_pipes.errors import RankError
from gpucache_pipes.peers.arrival import Arrival
from gpucache_pipes.peers.group import PeerGroup
from gpucache_pipes.peers.message import (
    Contents,
    Inbox,
    Outbox,
    make_tails,
    read_tail,
    tail_bytes,
)
from gpucache_pipes.peers.schedule import Schedule

_log = logging.getLogger("gpucache_pipes")

Sizes = NDArray[np.int64]
"""[ranks, 2]: bytes of the rows and of the tail of the message for, or from, each rank."""


class Served(Protocol):
    """The files of a pending batch, as the store of this rank serves them."""

    def look(self) -> Contents:
        """Wait for the files; what is known of them."""

    def pack(self) -> torch.Tensor:
        """The pages of those that could be loaded, end to end, uint8."""

    def abandon(self) -> None:
        """Give the files up. Takes no lock."""


class _Prepared(NamedTuple):
    """A message to each rank that is known, and not packed yet."""

    served: Served | None
    page_bytes: int
    metas: list[bytes]
    sizes: Sizes


class _Flight(NamedTuple):
    """Messages under way."""

    works: list[Any]
    rows: torch.Tensor
    tails: torch.Tensor
    sizes: Sizes  # of the messages that come
    held: tuple[Any, ...]  # what is sent


class Exchange:
    """Sends what this rank serves, and receives what it needs, step by step.

    All ranks call `send` for the same steps in the same order, in the thread that trains. The
    message of a step tells how long the one `ahead` steps later will be, so that one operation is
    enough.

    Args:
        group: the ranks.
        schedule: who sends what.
        ahead: how many messages may be under way.
        backend: has pages, and the device.
        stream: where to pack rows.
        serve: step -> what this rank serves in it; None if the source of its pipeline has failed
            before that was requested. Others then read these files themselves.

    Attributes:
        sent: how many steps have had their messages sent.
        error: what has kept this rank from serving, and concerns no file.
    """

    def __init__(
        self, group: PeerGroup, schedule: Schedule, ahead: int, backend: Backend,
        stream: ExchangeStream, serve: Callable[[int], Served | None],
    ) -> None:  # fmt: skip
        self._group = group
        self._schedule = schedule
        self._ahead = ahead
        self._backend = backend
        self._serve = serve
        self._on_host = backend.memory_is_host()
        self._stream = stream
        self._outboxes = [Outbox() for _ in group.ranks]
        self._inboxes = [Inbox() for _ in group.ranks]
        self._next_to_prepare = 0
        self._prepared: dict[int, _Prepared] = {}
        self._flights: dict[int, _Flight] = {}
        self._told_sizes: dict[int, Sizes] = {}
        self._arrivals: dict[int, Arrival] = {}
        self.sent = 0
        self.error: Exception | None = None

    # Sending

    def send(self, step: int, where: str) -> None:
        """Send the messages of a step, if it has any. A collective operation then.

        What keeps this rank from serving a file is no error here: its receiver finds out. An error
        that concerns this rank alone is kept in `error`, and the message is sent without rows.
        """
        self.sent = step + 1
        if step >= self._schedule.steps or not self._schedule.crosses[step]:
            return
        following = step + self._ahead
        self._prepare_until(following)
        prepared = self._prepared.pop(step)
        with self._group.waiting(where):
            incoming = self._sizes_of(step, prepared)
            rows, is_void = self._pack(prepared)
            next_sizes = np.zeros_like(prepared.sizes)
            if following in self._prepared:
                next_sizes = self._prepared[following].sizes
            tails = make_tails(next_sizes, prepared.metas, prepared.page_bytes, is_void)
            self._flights[step] = self._issue(rows, tails, prepared.sizes, incoming)

    def _prepare_until(self, last: int) -> None:
        """Describe what is served up to this step, in the order of steps."""
        steps = range(self._next_to_prepare, min(last + 1, self._schedule.steps))
        for step in steps:
            self._next_to_prepare = step + 1
            if self._schedule.crosses[step]:
                self._prepared[step] = self._prepare(step)

    def _prepare(self, step: int) -> _Prepared:
        files, counts = self._schedule.served(step)
        served = self._serve(step)
        contents = Contents([], np.full(len(files), -1, np.intp), [])
        try:
            if served is not None:
                contents = served.look()
        except Exception as error:
            self.error = self.error or error
        # As of now: a store that is cleared meanwhile forgets it when its last batch is packed.
        page_bytes = self._backend.page_bytes
        pages = contents.pages(page_bytes) * page_bytes
        ends = np.cumsum(counts).tolist()
        metas, sizes = [], []
        for outbox, end, count in zip(self._outboxes, ends, counts.tolist(), strict=True):
            start = end - count
            metas.append(outbox.describe(contents.part(start, end)) if count else b"")
            sizes.append((int(pages[start:end].sum()), tail_bytes(metas[-1])))
        return _Prepared(served, page_bytes, metas, np.array(sizes, np.int64))

    def _sizes_of(self, step: int, prepared: _Prepared) -> Sizes:
        """The sizes of the messages of a step from other ranks. Collective, in the first steps."""
        before = step - self._ahead
        if before >= 0 and self._schedule.crosses[before]:
            self._receive(before)
            return self._told_sizes.pop(step)
        mine = torch.from_numpy(prepared.sizes.copy())
        theirs, two = torch.empty_like(mine), np.full(len(mine), 2)
        _start(theirs.view(-1), mine.view(-1), two, two, self._group.connection.host()).wait()
        return theirs.numpy()

    def _pack(self, prepared: _Prepared) -> tuple[torch.Tensor, int]:
        """The rows for all ranks, and whether that has failed, so that they are void."""
        total = int(prepared.sizes[:, 0].sum())
        try:
            with self._stream.issuing():
                if prepared.served is None:
                    return torch.empty(0, dtype=torch.uint8, device=self._backend.device), 0
                rows = prepared.served.pack()
                if len(rows) == total:
                    return rows, 0
            _log.warning("%d bytes of rows instead of %d: others read them", len(rows), total)
        except Exception as error:
            self.error = self.error or error
        if prepared.served is not None:
            prepared.served.abandon()
        with self._stream.issuing():
            return torch.zeros(total, dtype=torch.uint8, device=self._backend.device), 1

    def _issue(
        self, rows: torch.Tensor, tails: Sequence[NDArray[np.uint8]], outgoing: Sizes,
        incoming: Sizes,
    ) -> _Flight:  # fmt: skip
        connection = self._group.connection
        host = connection.host()
        if connection.sends_device_memory:
            with self._stream.issuing():
                landed = rows.new_empty(int(incoming[:, 0].sum()))
                work = _start(landed, rows, incoming[:, 0], outgoing[:, 0], connection.data())
            sent = torch.from_numpy(np.concatenate(tails))
            told = torch.empty(int(incoming[:, 1].sum()), dtype=torch.uint8, device="cpu")
            works = [work, _start(told, sent, incoming[:, 1], outgoing[:, 1], host)]
            return _Flight(works, landed, told, incoming, (rows, sent))
        with self._stream.issuing():
            # With a device whose memory cannot be sent, this waits for the copy.
            on_host = rows if self._on_host else rows.cpu()
        pieces, end = [], 0
        for (count, _), tail in zip(outgoing.tolist(), tails, strict=True):
            pieces += [on_host[end : end + count], torch.from_numpy(tail)]
            end += count
        sent = torch.cat(pieces)
        landed = torch.empty(int(incoming.sum()), dtype=torch.uint8, device="cpu")
        work = _start(landed, sent, incoming.sum(1), outgoing.sum(1), host)
        return _Flight([work], landed, landed, incoming, (sent, rows))

    # Receiving

    def arrival(self, step: int, where: str) -> Arrival:
        """What has arrived for a step, after waiting for it. May be called again."""
        with self._group.waiting(where):
            self._receive(step)
        return self._arrivals[step]

    def forget(self, step: int) -> None:
        """The rows of a step are not needed any more."""
        self._arrivals.pop(step, None)

    def _receive(self, step: int) -> None:
        """Wait for the messages of a step that was sent, and of those before it."""
        for earlier in sorted(self._flights):
            if earlier <= step:
                self._read(earlier, self._flights[earlier])
                del self._flights[earlier]

    def _read(self, step: int, flight: _Flight) -> None:
        with self._stream.issuing():
            for work in flight.works:
                work.wait()  # of device memory: the stream waits, and the host does not
            block = flight.rows
            if flight.tails is flight.rows and not self._on_host:
                block = flight.held[1].new_empty(len(flight.rows))
                block.copy_(flight.rows)
            mark = self._stream.mark()
        sources = self._schedule.sources(step)
        starts, sizes, contents = self._sort(step, flight, sources)
        self._arrivals[step] = Arrival(block, mark, self._stream, starts, sizes, contents)
        came = (sources != self._group.index) & (contents.which >= 0)
        self._group.files_received += int(came.sum())
        self._group.bytes_received += int(sizes[came].sum())

    def _sort(
        self, step: int, flight: _Flight, sources: NDArray[np.int16]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Contents]:
        """Where the rows of the batch begin in the block, in its order, how long they are, and what
        their senders say of them.
        """
        separate = flight.tails is not flight.rows
        told = flight.tails.numpy()
        row_sizes, tail_sizes = flight.sizes.T.tolist()
        order = np.argsort(sources, kind="stable")
        counts = np.bincount(sources, minlength=len(self._group)).tolist()
        starts, sizes = np.zeros((2, len(sources)), np.int64)
        which = np.full(len(sources), -1, np.intp)
        numbers: dict[Any, int] = {}
        values: list[Any] = [()] * len(sources)
        following_sizes = np.zeros_like(flight.sizes)
        at = begin = row = 0  # in the tails, in the block, among the rows
        for source, count in enumerate(counts):
            at += 0 if separate else row_sizes[source]
            head, meta = read_tail(told[at : at + tail_sizes[source]])
            following_sizes[source] = head["rows"], head["tail"]
            contents = self._inboxes[source].read(meta, count)
            if count:
                mine = order[row : row + count]
                takes = contents.pages(int(head["page"])) * int(head["page"])
                if takes.sum() != row_sizes[source]:
                    rank = self._group.ranks[source]
                    text = f"{row_sizes[source]} bytes for rows of {takes.sum()}: this is a bug"
                    raise RankError({rank: text}, "has sent")
                starts[mine] = begin + np.cumsum(takes) - takes
                sizes[mine] = takes
                if not head["void"]:
                    known = [numbers.setdefault(one, len(numbers)) for one in contents.layouts]
                    which[mine] = np.array([*known, -1], np.intp)[contents.which]
                for position, of_row in zip(mine.tolist(), contents.values, strict=False):
                    values[position] = of_row
            at += tail_sizes[source]
            begin += row_sizes[source] + (0 if separate else tail_sizes[source])
            row += count
        following = step + self._ahead
        if following < self._schedule.steps and self._schedule.crosses[following]:
            self._told_sizes[following] = following_sizes
        return starts, sizes, Contents([*numbers], which, values if any(values) else [])

    # The end

    def release(self) -> list[Any]:
        """Give up what is served, and return what is under way. Takes no lock."""
        prepared, self._prepared = self._prepared, {}
        for one in prepared.values():
            if one.served is not None:
                one.served.abandon()
        flights, self._flights = self._flights, {}
        return [*flights.values()]


def _start(
    landed: torch.Tensor, sent: torch.Tensor, incoming: Sizes, outgoing: Sizes, group: Any
) -> Any:
    return dist.all_to_all_single(
        landed, sent, incoming.tolist(), outgoing.tolist(), group=group, async_op=True
    )
