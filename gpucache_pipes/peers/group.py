"""PeerGroup: the ranks whose caches are one, and the collective operations among them."""

import contextlib
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from gpucache_pipes.errors import RankError
from gpucache_pipes.peers.agreement import MOST_RANKS, agree_at, error_of_all, places_of
from gpucache_pipes.peers.schedule import Owners

_GRACE = 5.0
"""Seconds beyond the timeout in which ranks whose exchange has failed say so to each other."""

_STEPS = 1 << 32
"""More than an epoch has."""


class _Groups(NamedTuple):
    """Weak references: torch joins the threads of a group with the last reference to it. If that is
    only when the interpreter ends, the process may abort.
    """

    host: Callable[[], Any]
    data: Callable[[], Any] | None


_made: dict[tuple[Any, ...], _Groups] = {}
"""By ranks, timeout and type of device, for all stores of this process."""


def _groups_of(ranks: list[int], timeout: float, device: torch.device) -> _Groups:
    """A group on the host, and one for device memory if it can be sent. Collective, once."""
    key = (*ranks, timeout, device.type)
    made = _made.get(key)
    if made is not None and made.host() is not None:
        return made
    options: dict[str, Any] = {
        "ranks": ranks, "timeout": timedelta(seconds=timeout),
        "use_local_synchronization": len(ranks) < dist.get_world_size(),
    }  # fmt: skip
    host = dist.new_group(backend="gloo", **options)
    data = None
    backend = dist.get_default_backend_for_device(device)
    if device.type != "cpu" and backend != "gloo":
        data = weakref.ref(dist.new_group(backend=backend, **options))
    made = _made[key] = _Groups(weakref.ref(host), data)
    return made


def _in_words(place: int) -> str:
    """A place, as a user counts: epochs that were begun, and batches from 0."""
    epoch, step = divmod(place, _STEPS)
    return f"batch {step - 1} of pass {epoch}" if step else f"the beginning of pass {epoch}"


def _alive(group: Callable[[], Any] | None) -> Any:
    found = None if group is None else group()
    if found is None:
        raise RuntimeError("the process group of the store was destroyed: make a new store")
    return found


class PeerGroup:
    """Ranks that share their caches. Their processes call each method equally often.

    Two process groups of its own, so that nothing here can be mixed up with other operations of the
    program: one on the host (gloo), and where the store is on an accelerator whose memory can be
    sent (NCCL, XCCL), one for that. Both are made when the first pipeline begins, by a collective
    operation.

    Args:
        group: of `torch.distributed`; its ranks take part.
        timeout: seconds that a rank waits for the others.
        device: where features are.

    Attributes:
        ranks: global ranks of the members, in their order in the group.
        index: the place of this rank among them.
        left: messages under way in epochs that were broken off.
        files_received, bytes_received: what has come from the caches of other ranks.

    Raises:
        ValueError: no torch.distributed is initialised, this process is not in the group, or a
            timeout that is not positive.
        TypeError: the group is none.
    """

    def __init__(self, group: Any, timeout: float, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "process_group= needs torch.distributed: call init_process_group before the store "
                "is made"
            )
        if not isinstance(timeout, (int, float)) or not 0 < timeout < 1e6:
            raise ValueError(f"exchange_timeout={timeout!r} must be a positive number of seconds")
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group= is a group that this process does not belong to")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group={group!r:.80} is no group; torch.distributed.group.WORLD is that "
                "of all ranks"
            )
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        if len(self.ranks) > MOST_RANKS:
            raise ValueError(
                f"process_group= has more than {MOST_RANKS} ranks: take several groups"
            )
        self.index = dist.get_rank(group)
        self.timeout = float(timeout)
        self._device = device
        self._groups: _Groups | None = None
        self.files_received = self.bytes_received = 0
        self.left: list[Any] = []
        self._owners: dict[Any, Owners] = {}
        self._sessions = 0
        self._failure: str | None = None

    def __len__(self) -> int:
        return len(self.ranks)

    def owners_of(self, files: int, fingerprint: Any) -> Owners:
        """The owners of a list of files; the same for all pipelines over the same list."""
        return self._owners.setdefault((files, fingerprint), Owners(files))

    def figures(self) -> dict[str, int]:
        """What has come from other ranks: see StoreStats."""
        return {"files_received": self.files_received, "bytes_received": self.bytes_received}

    # Groups

    def open(self) -> None:
        """Make the process groups, the first time. A collective operation.

        Raises:
            RankError: not all ranks have come.
        """
        if self._groups is None:
            try:
                self._groups = _groups_of(self.ranks, self.timeout, self._device)
            except RuntimeError as error:
                others = [rank for rank in self.ranks if rank != self.ranks[self.index]]
                text = "not at the first batch of this pipeline, or another one is missing"
                raise RankError(dict.fromkeys(others, text), "is") from error

    @property
    def sends_device_memory(self) -> bool:
        """Whether rows are sent from device memory."""
        return self._groups is not None and self._groups.data is not None

    def host(self) -> Any:
        """The process group on the host. Raises RuntimeError if it was destroyed."""
        return _alive(None if self._groups is None else self._groups.host)

    def data(self) -> Any:
        """The process group for device memory. Raises RuntimeError if it was destroyed."""
        return _alive(None if self._groups is None else self._groups.data)

    # Steps

    def begin(self, epoch: int, settings: dict[str, Any]) -> int:
        """Begin an epoch on all ranks; returns the place of its first step.

        Raises:
            RankError: another rank is somewhere else, or has other settings.
        """
        self._sessions += 1
        place = self._sessions * _STEPS
        where = f"the beginning of epoch {epoch}"
        self.agree(0, place, where, settings)
        left, self.left = self.left, []
        with self.waiting(where, place):
            for flight in left:  # all ranks have sent these: they end, and then let go of memory
                for work in flight.works:
                    work.wait()
        return place + 1

    def _compare(self, settings: dict[str, Any], where: str, place: int) -> None:
        """Raise RankError for the first setting that is another one in another rank. Collective."""
        told: list[Any] = [None] * len(self.ranks)
        with self.waiting(where, place):
            dist.all_gather_object(told, settings, group=self.host())
        for name, value in settings.items():
            others = {
                rank: f"{name} {theirs[name]!r}, and this rank {value!r}"
                for rank, theirs in zip(self.ranks, told, strict=True)
                if theirs[name] != value
            }
            if others:
                raise RankError(others, "has")

    def agree(
        self, status: int, place: int, where: str, settings: dict[str, Any] | None = None
    ) -> int:
        """The greatest status of all ranks, which must be at the same place. Collective.

        Args:
            status: of this rank.
            place: where it is; one number for each step of each epoch.
            where: the same in words.
            settings: what must be the same on all ranks, too.

        Raises:
            RankError: ranks are at different places, or one does not answer.
        """
        with self.waiting(where, place):
            seal = 0 if settings is None else zlib.crc32(repr(settings).encode())
            worst, together = agree_at(status, place + (seal << 64), self.host())
            if together:
                return worst
            places = places_of(place, self.host())
        self._failure = f"ranks were at different batches at {where}"
        if settings is not None and set(places) == {place}:
            self._failure = None
            self._compare(settings, where, place)
        others = {
            rank: f"{_in_words(at)}, and this rank at {_in_words(place)}"
            for rank, at in zip(self.ranks, places, strict=True)
            if at != place
        }
        raise RankError(others, "is at")

    def error_of_all(self, error: Exception | None, place: int, where: str) -> Exception:
        """What this rank raises where one has said FAILS. Collective."""
        with self.waiting(where, place):
            return error_of_all(error, self.host())

    @contextlib.contextmanager
    def waiting(self, where: str, place: int) -> Iterator[None]:
        """A context for collective operations; names the ranks that did not take part.

        Raises:
            RankError: in place of the RuntimeError of an operation that has failed.
        """
        if self._failure is not None:
            raise RuntimeError(
                f"the caches of the ranks can no longer be shared, since {self._failure}: end all "
                "ranks, and resume"
            )
        start = time.monotonic()
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            waited = time.monotonic() - start
            self._failure = f"the exchange has failed at {where}"
            missing = self._missing(place, start)
            text = f"not at {where}, for which this rank has waited {waited:.0f} s"
            if waited >= 0.9 * self.timeout:
                text += " (exchange_timeout= of the store sets how long ranks wait for each other)"
            raise RankError(dict.fromkeys(missing, text), "is") from error
        except BaseException:
            self._failure = f"this rank was interrupted at {where}"
            raise

    def _missing(self, place: int, start: float) -> list[int]:
        """The ranks that do not say that the exchange has failed for them, too.

        They say so in the key-value store of the group, which does not need the others. All but
        this one if that is gone, as with the process that has it.
        """
        others = [rank for rank in self.ranks if rank != self.ranks[self.index]]
        try:
            store = self.host().get_group_store()
            name = f"gpucache_pipes/{self._sessions}/{{}}".format
            store.set(name(self.ranks[self.index]), str(place))
            # Ranks that are not connected to the one that is missing wait for as long as they may.
            deadline = start + self.timeout + _GRACE
            while time.monotonic() < deadline:
                missing = [rank for rank in others if not store.check([name(rank)])]
                if not missing:
                    return others
                time.sleep(0.05)
        except Exception:
            return others
        return missing
