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
"""Seconds beyond the timeout in which ranks whose exchange has failed say so to each other."""

_made: dict[tuple[Any, ...], "Connection"] = {}
"""By ranks, timeout and type of device, for all stores of this process."""


class Connection:
    """Process groups of some ranks: one on the host, and one for device memory if it can be sent.

    They belong to this package alone, so that nothing here can be mixed up with other operations of
    the program. All stores with the same ranks share them.

    Making one is a collective operation.

    Args:
        ranks: global ranks of the members, ascending.
        timeout: seconds that a rank waits for the others.
        device: where features are.

    Attributes:
        passes: how many epochs the ranks have begun.
        stores: how many stores have used it.
        failure: why it can no longer be used.
    """

    def __init__(self, ranks: list[int], timeout: float, device: torch.device) -> None:
        self.passes = self.stores = 0
        self.failure: str | None = None
        self._ranks = ranks
        self._timeout = timeout
        self._key = (*ranks, timeout, device.type)
        options: dict[str, Any] = {
            "ranks": ranks, "timeout": timedelta(seconds=timeout),
            "use_local_synchronization": len(ranks) < dist.get_world_size(),
        }  # fmt: skip
        # Weak references: torch joins the threads of a group with the last reference to it. If that
        # is only when the interpreter ends, the process may abort.
        self._host: Callable[[], Any] = weakref.ref(dist.new_group(backend="gloo", **options))
        self._data: Callable[[], Any] | None = None
        backend = dist.get_default_backend_for_device(device)
        if device.type != "cpu" and backend != "gloo":
            self._data = weakref.ref(dist.new_group(backend=backend, **options))

    @classmethod
    def of(cls, ranks: list[int], timeout: float, device: torch.device) -> "Connection":
        """The one of these ranks, made if need be. Raises RankError if they do not come."""
        key = (*ranks, timeout, device.type)
        made = _made.get(key)
        if made is None or made._host() is None:
            try:
                made = _made[key] = cls(ranks, timeout, device)
            except RuntimeError as error:
                others = [rank for rank in ranks if rank != dist.get_rank()]
                text = "not at the first batch of this pipeline, or another one is missing"
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
        self.failure = self.failure or reason
        if _made.get(self._key) is self:
            del _made[self._key]

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
                f"the caches of the ranks can no longer be shared, since {self.failure}: end all "
                "ranks, and resume"
            )
        self.host()  # raises where it was destroyed
        start = time.monotonic()
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            self.fail(f"the exchange has failed at {where}")
            if is_device_error(error) or is_out_of_memory(error):
                raise
            raise self._missing(where, start, time.monotonic() - start) from error
        except Exception as error:
            self.fail(f"{type(error).__name__} at {where}")
            raise
        except BaseException:
            self.fail(f"this rank was interrupted at {where}")
            raise

    def _missing(self, where: str, start: float, waited: float) -> RankError:
        """The error that names the ranks which do not say that the exchange failed for them, too.

        They say so in the key-value store of the group, which does not need the others.
        """
        others = [rank for rank in self._ranks if rank != dist.get_rank()]
        missing = others
        try:
            store = self.host().get_group_store()
            store.set(f"gpucache_pipes/failed/{dist.get_rank()}", where)

            def silent() -> list[int]:
                return [r for r in others if not store.check([f"gpucache_pipes/failed/{r}"])]

            if not silent():
                text = f"no longer waiting for this rank, which was late at {where}"
                return RankError(dict.fromkeys(others, text), "is")
            dead = self._disconnected(silent()) if waited < 0.9 * self._timeout else []
            if dead:
                text = f"not at {where}: the connection to it has ended"
                return RankError(dict.fromkeys(dead, text), "is")
            # Ranks that are not connected to the one that is missing wait for as long as they may.
            while time.monotonic() < start + self._timeout + _GRACE and (found := silent()):
                missing = found
                time.sleep(0.05)
        except Exception:  # the store is gone, as with the process that has it
            missing = missing or others
        text = f"not at {where}, for which this rank has waited {waited:.0f} s"
        if waited >= 0.9 * self._timeout:
            text += " (exchange_timeout= of the store sets how long ranks wait for each other)"
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
