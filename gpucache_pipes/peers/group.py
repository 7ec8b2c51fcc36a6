"""PeerGroup: the ranks whose caches are one, and where all of them are."""

import logging
import os
import weakref
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from gpucache_pipes.errors import RankError
from gpucache_pipes.peers.agreement import MOST_RANKS, agree_at, error_of_all, points_of
from gpucache_pipes.peers.connection import Connection
from gpucache_pipes.peers.schedule import Owners

_log = logging.getLogger("gpucache_pipes")

_NOT_INITIALISED = (
    "process_group= needs torch.distributed: call torch.distributed.init_process_group() before "
    "the store is made"
)

_STEPS = 1 << 32
"""More than an epoch has."""

_MOST_LISTS = 8
"""Lists of files whose owners are remembered, those that were used last."""


class NoGroup:
    """The default of `process_group=`, since None is what group.WORLD is before it is made."""

    def __repr__(self) -> str:
        return "no group"


NO_GROUP = NoGroup()


class PeerGroup:
    """The ranks with which a store shares its cache. All of them call each method equally often.

    Args:
        group: of `torch.distributed`; its ranks take part.
        timeout: seconds that a rank waits for the others.
        device: where features are.

    Attributes:
        ranks: global ranks of the members, ascending.
        index: the position of this rank among them.
        left: messages under way in epochs that were broken off.
        files_received, bytes_received: what has come from the caches of other ranks.

    Raises:
        ValueError: no torch.distributed is initialised, this process is not in the group, or a
            timeout that is not positive.
        TypeError: the group is none.
    """

    def __init__(self, group: Any, timeout: float, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(_NOT_INITIALISED)
        if not isinstance(timeout, (int, float)) or not 0 < timeout < 1e6:
            raise ValueError(f"exchange_timeout={timeout!r} must be a positive number of seconds")
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group= is a group that this process does not belong to")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group={group!r:.80} is no group; torch.distributed.group.WORLD is that "
                "of all ranks"
            )
        self.ranks: list[int] = sorted(dist.get_process_group_ranks(group))
        if len(self.ranks) > MOST_RANKS:
            raise ValueError(
                f"process_group= has more than {MOST_RANKS} ranks: take several groups"
            )
        self.index = self.ranks.index(dist.get_rank())
        self.files_received = self.bytes_received = 0
        self.left: deque[Any] = deque()
        self._group = weakref.ref(group)
        self._timeout = float(timeout)
        self._device = device
        self._connection: Connection | None = None
        self._number = 0  # of the store, among those over one connection
        self._owners: dict[Any, Owners] = {}

    @classmethod
    def of(cls, group: Any, timeout: float, device: torch.device) -> "PeerGroup | None":
        """The ranks of `group`; None for NO_GROUP, and for None where there are no other ranks.

        Raises ValueError for None in a process of torchrun without a torch.distributed: it is what
        `torch.distributed.group.WORLD` is then.
        """
        if group is None:
            lacks = not (dist.is_available() and dist.is_initialized())
            if lacks and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(_NOT_INITIALISED)
            return None
        if isinstance(group, NoGroup):
            return None
        found = cls(group, timeout, device)
        if dist.get_world_size() == 1 < int(os.environ.get("WORLD_SIZE", "1")):
            _log.warning(
                "torch.distributed has one rank in this process, but WORLD_SIZE is %s: the cache "
                "is not shared; init_process_group() without arguments has all ranks of torchrun",
                os.environ["WORLD_SIZE"],
            )
        return found

    def __len__(self) -> int:
        return len(self.ranks)

    def owners_of(self, paths: Sequence[str], fingerprint: Any) -> Owners:
        """The owners of a list of files; the same for all pipelines over the same list.

        A list that has files of others begins with the owners that these have.
        """
        key = (len(paths), fingerprint)
        owners = self._owners.pop(key, None)
        if owners is None:
            owners = Owners(paths, [*self._owners.values()])
        while len(self._owners) >= _MOST_LISTS:  # the same ones on all ranks
            del self._owners[next(iter(self._owners))]
        self._owners[key] = owners
        return owners

    def figures(self) -> dict[str, int]:
        """What has come from other ranks: see StoreStats."""
        return {"files_received": self.files_received, "bytes_received": self.bytes_received}

    def open(self) -> None:
        """Connect the ranks, the first time. Collective. Raises RankError if they do not come."""
        if self._connection is None:
            group = self._group()
            if group is None:
                raise RuntimeError("process_group= of the store was destroyed: make a new store")
            self._connection = Connection.of(group, self.ranks, self._timeout, self._device)
            self._number = self._connection.stores

    @property
    def connection(self) -> Connection:
        """What connects the ranks, after `open`."""
        assert self._connection is not None
        return self._connection

    def waiting(self, where: str) -> AbstractContextManager[None]:
        """See Connection."""
        return self.connection.waiting(where)

    # Steps

    def begin(self, where: str, settings: Mapping[str, Any]) -> int:
        """Begin an epoch on all ranks; returns the point of its first step. Collective.

        Args:
            where: the same in words.
            settings: what must be the same on all ranks.

        Raises:
            RankError: another rank is somewhere else, or has other settings.
        """
        self.connection.passes += 1
        point = self.connection.passes * _STEPS
        settings = {**settings, "store number": self._number}
        self.agree(0, point, where, settings)
        return point + 1

    def interrupted(self, where: str) -> None:
        """Note that this rank has left a step in the midst of it."""
        if self._connection is not None:
            self._connection.fail(f"it was interrupted at {where}")

    def settle(self, where: str) -> None:
        """Wait for messages of epochs that were broken off, which all ranks have sent.

        On the stream of the exchange: their memory goes back to it.
        """
        with self.waiting(where):
            while self.left:
                for work in self.left.popleft().works:
                    work.wait()

    def agree(
        self, status: int, point: int, where: str, settings: Mapping[str, Any] | None = None
    ) -> int:
        """The greatest status of all ranks, which must be at the same point. Collective.

        Args:
            status: of this rank.
            point: where it is; one number for each step of each epoch.
            where: the same in words.
            settings: what must be the same on all ranks, too.

        Raises:
            RankError: ranks are at different points, or one does not answer.
        """
        with self.waiting(where):
            host = self.connection.host()
            seal = 0 if settings is None else zlib.crc32(repr(settings).encode())
            worst, together = agree_at(status, point + (seal << 64), host)
            if together:
                return worst
            points = dict(zip(self.ranks, points_of(point, host), strict=True))
            differences = {}
            if settings is not None and set(points.values()) == {point}:
                differences = self._differences(settings)
        if differences:
            raise RankError(differences, "has")
        self.connection.fail(f"ranks were at different batches at {where}")
        others = {
            rank: f"{_in_words(at)}, and this rank at {_in_words(point)}"
            for rank, at in points.items()
            if at != point
        }
        raise RankError(others, "is at", ": all ranks must begin epochs and take batches alike")

    def _differences(self, settings: Mapping[str, Any]) -> dict[int, str]:
        """The first setting that is another one in other ranks. Collective."""
        told: list[Any] = [None] * len(self)
        dist.all_gather_object(told, dict(settings), group=self.connection.host())
        for name, value in settings.items():
            others = {
                rank: f"{name} {theirs[name]!r}, and this rank {value!r}"
                for rank, theirs in zip(self.ranks, told, strict=True)
                if theirs[name] != value
            }
            if others:
                return others
        raise AssertionError(told)

    def error_of_all(self, error: Exception | None, where: str) -> Exception:
        """What this rank raises where one has said FAILS. Collective."""
        with self.waiting(where):
            return error_of_all(error, self.connection.host())


def _in_words(point: int) -> str:
    """A point, as a user counts: epochs that were begun, and batches from 0."""
    epoch, step = divmod(point, _STEPS)
    return f"batch {step - 1} of pass {epoch}" if step else f"the beginning of pass {epoch}"
