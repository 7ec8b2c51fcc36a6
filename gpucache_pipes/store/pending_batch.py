"""A batch that is on its way."""

from collections.abc import Sequence
from typing import Any, Protocol

from gpucache_pipes.batches import FeatureBatch
from gpucache_pipes.cache import Entry
from gpucache_pipes.files import LoadedFeature


class Issuer(Protocol):
    """Who makes tickets and takes them back."""

    def collect(self, tickets: Sequence["PendingBatch"]) -> FeatureBatch:
        """Make a batch of them."""

    def cancel(self, tickets: Sequence["PendingBatch"]) -> None:
        """Take them back unused."""

    def abandon(self, number: int) -> None:
        """Take one back later, without a lock."""

    def settle(self, ticket: "PendingBatch") -> dict[int, Exception]:
        """Wait for its files; what failed, by position."""

    def replace(self, ticket: "PendingBatch", position: int, feature: LoadedFeature | None) -> None:
        """Put a feature in the place of one that failed, or nothing."""


class PendingBatch:
    """Holds the features of one batch from the request until they are gathered.

    Made by `GPUFeatureStore.request`. Use it up once, by `result`, `cancel` or the store's
    `collect`; a ticket that is dropped is cancelled.
    """

    def __init__(self, issuer: Issuer, number: int, numbers: Sequence[int]) -> None:
        # The entries, as numbers; and their rows, if all were there when the ticket was opened.
        self.numbers = numbers
        self.rows: Sequence[int] | None = None
        # Entries that are still loading, and what became of those that failed. Under the lock
        # of the store.
        self.pending = 0
        self.errors: dict[Entry, BaseException] = {}
        # What is taken, by position, instead of features that failed; None leaves one out.
        self.instead: dict[int, LoadedFeature | None] = {}
        # What must live for as long as this: the store.
        self.holder: object = None
        self._issuer = issuer
        # A list, since taking the last item out of one happens at once, in whatever thread.
        self._number = [number]

    def result(self) -> FeatureBatch:
        """The features, gathered on the current stream of this thread; waits for files."""
        return self._issuer.collect([self])

    def wait(self) -> dict[int, Exception]:
        """Wait until all files have been read. The errors of those that failed, by position.

        They are what `result` would raise.
        """
        return self._issuer.settle(self)

    def replace(self, position: int, feature: Any = None) -> None:
        """Take `feature` instead of the one at that position, which has failed.

        Without one, it is left out of the result, which is shorter then.
        """
        found = None if feature is None else LoadedFeature(feature)
        self._issuer.replace(self, position, found)

    def cancel(self) -> None:
        """Let go. Harmless if the ticket was used."""
        self._issuer.cancel([self])

    def is_from(self, issuer: Issuer) -> bool:
        """Whether that made it."""
        return self._issuer is issuer

    @property
    def used(self) -> bool:
        """Whether there is nothing more to have from it."""
        return not self._number

    def use_up(self) -> int | None:
        """The ticket's number for the one caller who closes it, None for all others."""
        try:
            return self._number.pop()
        except IndexError:
            return None

    def abandon(self) -> None:
        """Let go at some later time. Takes no lock: finalizers may call this."""
        number = self.use_up()
        if number is not None:
            self._issuer.abandon(number)
