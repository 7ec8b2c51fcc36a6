"""Connection: the process groups of some ranks, and what is said when one of them is missing."""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gpucache_pipes.device import is_device_error, is_out_of_memory
from gpucache_pipes.errors import RankError

_GRACE = 5.0
"""Seconds of the timeout, at most a quarter, in which ranks whose exchange has failed say so."""

_KEY = "gpucache_pipes/ended/{}"
"""Where a rank says, in the key-value store of the group, why it cannot go on."""

_made: dict[tuple[Any, ...], "Connection"] = {}
"""By ranks, timeout and type of device, for all stores of this process."""


class Connection:
    """Process groups of some ranks: one on the host, and one for device memory if it can be sent.

    They belong to this package alone, so that nothing here can be mixed up with other operations of
    the program. All stores with the same ranks share them.

    Making one is a collective operation.

    Args:
        group: that of the user.
        ranks: global ranks of its members, ascending.
        timeout: seconds after which a rank that waits for the others has an error.
        device: where features are.

    Attributes:
        passes: how many epochs the ranks have begun.
        stores: how many stores have used it.
        failure: why it can no longer be used.
    """

    def __init__(self, group: Any, ranks: list[int], timeout: float, device: torch.device) -> None:
        self.passes = self.stores = 0
        self.failure: str | None = None
        self._ranks = ranks
        self._timeout = timeout
        self._grace = min(_GRACE, timeout / 4)
        self._key = (*ranks, timeout, device.type)
        whole = len(ranks) == dist.get_world_size()
        # Weak references: torch joins the threads of a group with the last reference to it. If that
        # is only when the interpreter ends, the process may abort.
        self._host: Callable[[], Any] = weakref.ref(
            dist.new_group(
                ranks, timedelta(seconds=timeout - self._grace), "gloo",
                use_local_synchronization=not whole,
            )
        )  # fmt: skip
        self._data: Callable[[], Any] | None = None
        backend = dist.get_default_backend_for_device(device)
        if device.type != "cpu" and backend != "gloo":
            if whole:
                # Its watchdog ends the process, so the host must hear of a missing rank before.
                limit = timedelta(seconds=max(600, 2 * timeout))
                self._data = weakref.ref(dist.new_group(ranks, limit, backend))
            elif backend in dist.get_backend_config(group):
                # Making another communicator for some of the ranks may need all of them.
                self._data = weakref.ref(group)

    @classmethod
    def of(cls, group: Any, ranks: list[int], timeout: float, device: torch.device) -> "Connection":
        """The one of these ranks, made if need be. Raises RankError if they do not come."""
        key = (*ranks, timeout, device.type)
        made = _made.get(key)
        if made is None or made._host() is None:
            try:
                made = _made[key] = cls(group, ranks, timeout, device)
            except RuntimeError as error:
                others = [rank for rank in ranks if rank != dist.get_rank()]
                text = (
                    f"perhaps not at the first batch of this pipeline: not all ranks have come "
                    f"within {timeout:g} s (exchange_timeout= of the store)"
                )
                raise RankError(dict.fromkeys(others, text), "is") from error
        made.stores += 1
        return made

    @property
    def sends_device_memory(self) -> bool:
        """Whether rows are sent from device memory."""
        return self._data is not None

    def host(self) -> Any:
        """The process group on the host. Raises RuntimeError if it was destroyed."""
        return _alive(self._host)

    def data(self) -> Any:
        """The process group for device memory. Raises RuntimeError if it was destroyed."""
        assert self._data is not None
        return _alive(self._data)

    # Failures

    def fail(self, reason: str) -> None:
        """It can no longer be used: ranks may have lost step. A new store makes a new one."""
        if self.failure is not None:
            return
        self.failure = reason
        if _made.get(self._key) is self:
            del _made[self._key]
        with contextlib.suppress(Exception):  # the store may be gone
            self._store().set(_KEY.format(dist.get_rank()), reason)

    def _store(self) -> Any:
        return self.host().get_group_store()

    @contextlib.contextmanager
    def waiting(self, where: str) -> Iterator[None]:
        """A context for collective operations; names the ranks that did not take part.

        Args:
            where: the step, in words.

        Raises:
            RankError: in place of the RuntimeError of an operation that has failed.
            RuntimeError: it can no longer be used.
        """
        if self.failure is not None:
            raise RuntimeError(
                f"this rank can no longer share its cache ({self.failure}): end all ranks, and "
                "resume"
            )
        self.host()  # raises where it was destroyed
        start = time.monotonic()
        try:
            yield
        except RankError:
            self.fail(f"ranks have lost step at {where}")
            raise
        except RuntimeError as error:
            if is_device_error(error) or is_out_of_memory(error):
                self.fail(f"{type(error).__name__} at {where}")
                raise
            waited = time.monotonic() - start
            self.fail(f"it has waited {waited:.0f} s for others at {where} (exchange_timeout=)")
            raise self._missing(where, start, waited) from error
        except Exception as error:
            self.fail(f"{type(error).__name__} at {where}")
            raise
        except BaseException:
            self.fail(f"it was interrupted at {where}")
            raise

    def _missing(self, where: str, start: float, waited: float) -> RankError:
        """The error that names the ranks which do not say that they cannot go on, either.

        They say so in the key-value store of the group, which does not need the others.
        """
        others = [rank for rank in self._ranks if rank != dist.get_rank()]
        missing = others
        try:
            store = self._store()

            def silent() -> list[int]:
                return [r for r in others if not store.check([_KEY.format(r)])]

            if not silent():
                texts = {r: store.get(_KEY.format(r)).decode() for r in others}
                return RankError(texts, "has given up:")
            dead = self._disconnected(silent()) if waited < self._timeout / 2 else []
            if dead:
                text = f"not at {where}: the connection to it has ended"
                return RankError(dict.fromkeys(dead, text), "is")
            # Ranks that are not connected to the one that is missing wait for as long as they may.
            while len(others) > 1 and time.monotonic() < start + self._timeout:
                if not (found := silent()):
                    break
                missing = found
                time.sleep(0.05)
        except Exception:  # the store is gone, as with the process that has it
            missing = missing or others
        text = (
            f"not at {where}, for which this rank has waited {waited:.0f} s (exchange_timeout= of "
            "the store sets how long ranks wait for each other)"
        )
        return RankError(dict.fromkeys(missing, text), "is")

    def _disconnected(self, ranks: list[int]) -> list[int]:
        """Those of these ranks to which nothing can be sent: their processes have ended."""
        found = []
        for rank in ranks:
            try:
                dist.isend(torch.zeros(1, device="cpu"), rank, group=self.host())
            except RuntimeError:
                found.append(rank)
        return found


def _alive(group: Callable[[], Any]) -> Any:
    found = group()
    if found is None:
        raise RuntimeError("the process group of the store was destroyed: make a new store")
    return found
