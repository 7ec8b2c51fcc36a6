"""Request traces, with the access plans that pipelines announce on the way."""

from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from gpucache_pipes.units import counted


@dataclass(frozen=True)
class Turn:
    """Consecutive requests of one pipeline.

    Attributes:
        owner: the owner that names the pipeline, or None for direct use of a store.
        keys: the requested keys.
        begins: whether the turn begins an epoch.
        upcoming: the requests that the pipeline announces before the turn, or None: the rest of
            this epoch and all of the next one.
        left: how many of the announced requests belong to this epoch.
        ends: whether the pipeline ends with the turn, and retracts what it has announced.
    """

    owner: object
    keys: "array[int]"
    begins: bool = False
    upcoming: "array[int] | None" = None
    left: int = 0
    ends: bool = False


class Trace:
    """A sequence of requests, as turns of pipelines, over files that are numbered from 0 on.

    The constructor takes plain requests, without epochs. `Trace.epochs` is for one pipeline, and
    `Trace.pipelines` for several.

        >>> trace = Trace(["a", "b", "a"])
        >>> len(trace), trace.names, trace.turns[0].keys.tolist()
        (3, ['a', 'b'], [0, 1, 0])
        >>> trace = Trace.epochs([["a", "b"], ["b", "a"]])
        >>> trace.turns[0].upcoming.tolist(), trace.turns[0].left
        ([0, 1, 1, 0], 2)
        >>> trace = Trace.pipelines([["ab", "ba"], ["c"]], [(0, 1), (1, None), (0, None)])
        >>> [(turn.owner, turn.keys.tolist()) for turn in trace.turns]
        [(0, [0]), (1, [2]), (0, [1])]

    Args:
        requests: the requested files in order, by any hashable names.

    Attributes:
        turns: the turns, in order.
        names: the name of each file, by key.
    """

    def __init__(self, requests: Iterable[Hashable] = ()) -> None:
        self.names: list[Hashable] = []
        self._numbers: dict[Hashable, int] = {}
        keys = self._numbered(requests)
        self.turns = [Turn(None, keys)] if keys else []

    @classmethod
    def epochs(cls, epochs: Sequence[Iterable[Hashable]], *, known: bool = True) -> "Trace":
        """The trace of one pipeline.

        Args:
            epochs: the requests of each epoch.
            known: whether the pipeline announces its access plan at the beginning of each epoch.
        """
        return cls.pipelines([epochs], ((0, None) for _ in epochs), known=known)

    @classmethod
    def pipelines(
        cls,
        pipelines: Sequence[Sequence[Iterable[Hashable]]],
        turns: Iterable[tuple[int, int | None]],
        *,
        known: bool = True,
    ) -> "Trace":
        """The trace of several pipelines that take turns. Each is named by its index.

        Args:
            pipelines: for each pipeline, the requests of each epoch.
            turns: (index of the pipeline, number of requests) of each turn; None means the rest of
                the epoch. A turn ends with the epoch at the latest. Turns of a pipeline that has no
                epochs left are ignored.
            known: whether each pipeline announces its access plan at the beginning of each epoch.
        """
        trace = cls()
        numbered = [[trace._numbered(epoch) for epoch in epochs] for epochs in pipelines]
        at = [(0, 0)] * len(numbered)  # epoch and position of each
        for which, count in turns:
            epoch, begin = at[which]
            if epoch == len(numbered[which]):
                continue
            keys = numbered[which][epoch]
            following = numbered[which][epoch + 1 : epoch + 2]
            end = len(keys) if count is None else min(begin + count, len(keys))
            at[which] = (epoch, end) if end < len(keys) else (epoch + 1, 0)
            upcoming = sum(following, keys) if known and begin == 0 else None
            ends = at[which][0] == len(numbered[which])
            trace.turns.append(Turn(which, keys[begin:end], begin == 0, upcoming, len(keys), ends))
        return trace

    def _numbered(self, requests: Iterable[Hashable]) -> "array[int]":
        numbers = self._numbers
        found = array("i", [numbers.setdefault(name, len(numbers)) for name in requests])
        self.names.extend(list(numbers)[len(self.names) :])
        return found

    def __repr__(self) -> str:
        return f"Trace({counted(len(self), 'request')} of {counted(len(self.names), 'file')})"

    def __len__(self) -> int:
        """The number of requests."""
        return sum(len(turn.keys) for turn in self.turns)
