"""Who owns which file, and who sends what to whom in each step: arithmetic, alike on all ranks."""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.intp]
"""Positions in the list of files."""

_NOBODY = -1


class Owners:
    """Which rank owns each file of a list: the one that needs it first.

    So nothing is sent in the epoch in which files are read, each by one rank. Orders that are
    shuffled give each rank a random part of the files, of equal number and, nearly, of equal bytes:
    the sizes are not known before the files are read.

    Args:
        paths: of the files. Held.
        others: of other lists. Files that are in these too have the owner that they have there.

    Attributes:
        ranks: by position of a file, its owner among the ranks of the group; -1 for none.
    """

    def __init__(self, paths: Sequence[str], others: "Sequence[Owners]" = ()) -> None:
        self.ranks = np.full(len(paths), _NOBODY, np.int16)
        self._paths = paths
        known: dict[str, int] = {}
        for other in others:
            known.update(zip(other._paths, other.ranks.tolist(), strict=True))
        if known:
            self.ranks[:] = [known.get(path, _NOBODY) for path in paths]

    def assigned(self, orders: Positions, batch: int) -> NDArray[np.int16]:
        """The owners, with those of files that have none and that these orders need.

        Args:
            orders: [ranks, requests], the files in the order in which each rank needs them.
            batch: how many requests are made at once, in a step.

        >>> Owners("abcd").assigned(np.array([[0, 1], [1, 3]]), batch=1).tolist()
        [0, 1, -1, 1]
        """
        ranks = self.ranks.copy()
        files = in_time(orders, batch)
        free = np.flatnonzero(ranks[files] == _NOBODY)
        if len(free):
            users = np.broadcast_to(np.arange(len(orders))[:, None], orders.shape)
            some, first = np.unique(files[free], return_index=True)
            ranks[some] = in_time(users, batch)[free[first]]
        return ranks

    @property
    def checksum(self) -> int:
        """Of all owners: it is the same on all ranks."""
        return zlib.crc32(self.ranks.data)


class Schedule:
    """What each rank needs from each other one, step by step.

    Args:
        orders: [ranks, requests], the files in the order in which each rank needs them.
        batch: requests in a step; the last step may have fewer.
        owners: of the files, as in `Owners.ranks`; each file in `orders` has one.
        me: which rank this is.

    Attributes:
        steps: how many there are.
        crosses: [steps], bool: whether any rank needs a file that another one owns.
    """

    def __init__(self, orders: Positions, batch: int, owners: NDArray[np.int16], me: int) -> None:
        self._orders = orders
        self._batch = batch
        self._owners = owners
        self._me = me
        ranks, requests = orders.shape
        self.steps = -(-requests // batch)
        foreign = (owners[orders] != np.arange(ranks)[:, None]).any(axis=0)
        starts = np.arange(0, requests, batch)
        self.crosses = np.logical_or.reduceat(foreign, starts) if requests else foreign

    def _step(self, step: int) -> Positions:
        return self._orders[:, step * self._batch : (step + 1) * self._batch]

    def own(self, step: int) -> Positions:
        """The files that this rank needs."""
        own: Positions = self._step(step)[self._me]
        return own

    def served(self, step: int) -> tuple[Positions, NDArray[np.intp]]:
        """The files that this rank sends, those for rank 0 first, and how many each rank gets."""
        files = self._step(step)
        mine = self._owners[files] == self._me
        return files[mine], mine.sum(axis=1)

    def sources(self, step: int) -> NDArray[np.int16]:
        """The rank from which this one gets each of the files that it needs."""
        return self._owners[self.own(step)]

    def all_served(self) -> Positions:
        """The files that this rank serves in all steps, in that order."""
        files = in_time(self._orders, self._batch)
        mine: Positions = files[self._owners[files] == self._me]
        return mine


def in_time(orders: Positions, batch: int) -> Positions:
    """What all ranks request, step by step, and within a step rank by rank.

    >>> in_time(np.array([[0, 1, 2], [5, 6, 7]]), batch=2).tolist()
    [0, 1, 5, 6, 2, 7]
    """
    ranks, requests = orders.shape
    whole = requests - requests % batch
    full = orders[:, :whole].reshape(ranks, -1, batch).swapaxes(0, 1)
    return np.concatenate([full.reshape(-1), orders[:, whole:].reshape(-1)])
