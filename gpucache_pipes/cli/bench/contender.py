"""What a loader must provide to be measured: `Contender` and `Run`."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpucache_pipes.cli.bench.work import Work

KINDS = {
    "ours": "gpucache_pipes",
    "peer": "others that read the same files",
    "format": "the same data, written in another format before",
    "limit": "limits",
}


class Run(NamedTuple):
    """An open contender.

    Attributes:
        epoch: takes the number of an epoch and returns its batches, on the device.
        hit_rate: returns the hit rate of the epochs after the first; None if there is no cache that
            counts hits.
    """

    epoch: Callable[[int], Iterable[Any]]
    hit_rate: Callable[[], float] | None = None


Opener = Callable[[Work, float], Iterator[Run]]
"""A generator function of the work and the fraction of the data that may be cached."""


class NotApplicableError(Exception):
    """The contender cannot produce the batches of this work. The text says why."""


@dataclass(frozen=True)
class Contender:
    """A loader that turns files into batches, or a limit that loaders are compared with.

    Attributes:
        name: its name in tables.
        kind: a key of KINDS.
        run: a generator function that yields one `Run`. The code before the `yield` counts as part
            of the first epoch; the code after it closes the contender.
        caches: whether it keeps features, so that later epochs are faster than the first and the
            fraction that may be cached matters.
        needs: name of a module that must be installed.
        cases: the cases that a limit applies to; None means all.
        makes_batches: False for a limit that does less than produce batches.
    """

    name: str
    kind: str
    run: Opener
    caches: bool = False
    needs: str | None = None
    cases: tuple[str, ...] | None = None
    makes_batches: bool = True

    @property
    def installed(self) -> bool:
        """Whether the module that it needs is installed."""
        if self.needs is None:
            return True
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:  # the parent package of `needs`
            return False

    def open(self, work: Work, share: float) -> AbstractContextManager[Run]:
        """A context manager that opens the contender.

        Args:
            work: files and batches.
            share: fraction of the data that it may cache.

        Raises:
            NotApplicableError: on entering, or in an epoch: it cannot produce these batches.
        """
        return contextmanager(self.run)(work, share)
