"""Sequences of requests, and what is known of them in advance."""

from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """Requests that one pipeline makes in a row.

    Attributes:
        owner: the pipeline; None for direct use of a store.
        begins: whether these are the first of an epoch.
        upcoming: what the pipeline announces at this moment, if it knows: the rest of this epoch
            and all of the next one; `left` of these are in this epoch.
    """

    owner: object
    keys: "array[int]"
    begins: bool = False
    upcoming: "array[int] | None" = None
    left: int = 0


class Trace:
    """Turns, over files that are numbered from 0 on.

        Trace(["a", "b", "a"])                                  # requests, and nothing else
        Trace.epochs([["a", "b"], ["b", "a"]], known=True)      # of one pipeline
        Trace.pipelines([train, validation], turns)             # of several

    Attributes:
        turns: the requests.
        names: what the numbers stand for.
    """

    def __init__(self, requests: Iterable[Hashable] = ()) -> None:
        self.names: list[Hashable] = []
        self._numbers: dict[Hashable, int] = {}
        keys = self._numbered(requests)
        self.turns = [Turn(None, keys)] if keys else []

    @classmethod
    def epochs(cls, epochs: Sequence[Iterable[Hashable]], *, known: bool = True) -> "Trace":
        """One pipeline: the requests of each epoch. `known`: it announces its order."""
        return cls.pipelines([epochs], ((0, None) for _ in epochs), known=known)

    @classmethod
    def pipelines(
        cls,
        pipelines: Sequence[Sequence[Iterable[Hashable]]],
        turns: Iterable[tuple[int, int | None]],
        *,
        known: bool = True,
    ) -> "Trace":
        """Several pipelines, each a sequence of epochs, which take turns.

        A turn is (which, how many requests); None is the rest of its epoch. A turn ends with the
        epoch, and those of a pipeline that has no more epochs are left out.
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
            trace.turns.append(Turn(which, keys[begin:end], begin == 0, upcoming, len(keys)))
        return trace

    def _numbered(self, requests: Iterable[Hashable]) -> "array[int]":
        numbers = self._numbers
        found = array("i", [numbers.setdefault(name, len(numbers)) for name in requests])
        self.names.extend(list(numbers)[len(self.names) :])
        return found

    def __len__(self) -> int:
        """Requests."""
        return sum(len(turn.keys) for turn in self.turns)
