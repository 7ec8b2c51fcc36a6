"""What it takes to be measured."""

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
    """A contender at work.

    Attributes:
        epoch: the number of an epoch -> its batches, on the device.
        hit_rate: of the epochs after the first.
    """

    epoch: Callable[[int], Iterable[Any]]
    hit_rate: Callable[[], float] | None = None


Opener = Callable[[Work, float], Iterator[Run]]


class NotApplicableError(Exception):
    """The contender cannot do this work; says why."""


@dataclass(frozen=True)
class Contender:
    """Something that makes batches of files.

    Attributes:
        name: in tables.
        kind: of KINDS.
        run: a generator function of the work and the part of the data that may be cached.
            What comes before its one `yield` is part of the first epoch.
        caches: whether later epochs are faster than the first, and how much may be cached matters.
        needs: a module that must be installed.
        cases: what a limit is a limit of; None is everything.
        makes_batches: False for a limit that does less.
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
        """Whether it can be had at all."""
        if self.needs is None:
            return True
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:  # of the package that it is in
            return False

    def open(self, work: Work, share: float) -> AbstractContextManager[Run]:
        """Begin, with room for that share of the data."""
        return contextmanager(self.run)(work, share)
