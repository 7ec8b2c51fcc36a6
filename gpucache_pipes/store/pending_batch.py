"""A batch that was requested and has not been gathered."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from gpucache_pipes.batches import FeatureBatch
from gpucache_pipes.cache import Entry
from gpucache_pipes.device import DeviceMemoryError, is_device_error, is_out_of_memory
from gpucache_pipes.files import LoadedFeature, PathLike, load_error


class Issuer(Protocol):
    """Makes pending batches and takes them back: the request manager of a store."""

    def collect(self, batches: "Sequence[PendingBatch]") -> FeatureBatch:
        """Gather them into one batch."""

    def cancel(self, batches: "Sequence[PendingBatch]") -> None:
        """Take them back unused."""

    def abandon(self, number: int) -> None:
        """Take one back later, without a lock."""

    def wait(self, batch: "PendingBatch") -> dict[int, Exception]:
        """Wait for its files; the errors of those that failed, by position."""

    def replace(self, batch: "PendingBatch", position: int, feature: LoadedFeature | None) -> None:
        """Replace a feature that failed, or leave it out."""


class PendingBatch:
    """Keeps the features of one batch on the device from the request until they are gathered.

    Made by `GPUFeatureStore.request`. Consume it once, by `result`, by `cancel`, or by the store's
    `collect`. A pending batch that is dropped is cancelled. May be used from any thread.

    Attributes:
        numbers: of the entries, in order; repeats are allowed.
        paths: of their files, as they were requested, absolute.
        rows: theirs in the cache, if all were READY in one page at the request.
        pending: how many entries are still LOADING.
        errors: for the number of each entry that failed, its path and the exception.
        issuer: what made it.
        claim: holds the number of the batch until one caller takes it: see `use_up`.
        substitutes: by position, features that replace entries that failed; None leaves one out.

    `pending`, `errors` and `substitutes` change with the lock of the store held.
    """

    def __init__(
        self,
        issuer: Issuer,
        number: int,
        numbers: Sequence[int],
        paths: Sequence[PathLike],
        rows: Sequence[int] | None,
        keep_alive: object,
    ) -> None:
        self.numbers = numbers
        self.paths = paths
        self.rows = rows
        self.pending = 0
        self.errors: dict[int, tuple[str, BaseException]] = {}
        self.substitutes: dict[int, LoadedFeature | None] = {}
        # The store: one that is dropped while a caller waits for a batch would not read it.
        self._keep_alive = keep_alive
        self.issuer = issuer
        # A list, because `list.pop` is atomic, with and without the global interpreter lock: of all
        # threads that consume or cancel the batch, one gets the number.
        self.claim = [number]

    def result(self) -> FeatureBatch:
        """Wait for the files, and gather the features on the current stream of this thread.

        Raises what loading a file raised (FeatureLoadError, FileNotFoundError, MemoryError), the
        first by position; RuntimeError if the batch was consumed, or the store closed.
        """
        return self.issuer.collect([self])

    def wait(self) -> dict[int, Exception]:
        """Wait until all files have been read. Returns the errors of those that failed.

        By position in the batch; `result` would raise the first of them. Raises what a failure of
        the device has raised, which is no error of a file.
        """
        return self.issuer.wait(self)

    def replace(self, position: int, feature: Any = None) -> None:
        """Use `feature` in place of the one at `position`, which failed to load.

        With None that position is left out, and the result is shorter. Raises IndexError for a
        position beyond the batch, ValueError for a feature that has not failed, TypeError for one
        that cannot be cached.
        """
        substitute = None if feature is None else LoadedFeature(feature)
        self.issuer.replace(self, position, substitute)

    def cancel(self) -> None:
        """Give the batch up. Does nothing if it was consumed."""
        self.issuer.cancel([self])

    @property
    def used(self) -> bool:
        """Whether the batch has been consumed or cancelled."""
        return not self.claim

    @property
    def left_out(self) -> set[int]:
        """The positions that `replace` has left out."""
        return {at for at, feature in self.substitutes.items() if feature is None}

    # For the store and the pipelines

    def use_up(self) -> int | None:
        """The number of the batch for the one caller that closes it, None for all others."""
        try:
            return self.claim.pop()
        except IndexError:
            return None

    def abandon(self) -> None:
        """Cancel at some later time. Takes no lock, so finalizers may call it."""
        number = self.use_up()
        if number is not None:
            self.issuer.abandon(number)

    def forget_rows(self) -> None:
        """The features have moved to other pages. With the lock held."""
        self.rows = None

    def expect(self) -> None:
        """One more entry is LOADING. With the lock held."""
        self.pending += 1

    def arrived(self, count: int) -> bool:
        """Count entries that are not LOADING any more; returns whether that was the last of them.

        With the lock held.
        """
        self.pending -= count
        return not self.pending

    def fail(self, entry: Entry, error: BaseException) -> None:
        """An entry, which arrives as well, could not be loaded. With the lock held."""
        self.errors[entry.number] = (entry.path, error)

    def failures(self) -> Iterator[tuple[int, Exception]]:
        """The positions of features that failed and have no substitute, each with a new exception.

        With the lock held. Raises the error of the device, if it has failed.
        """
        if self.errors:
            for position, number in enumerate(self.numbers):
                if number in self.errors and position not in self.substitutes:
                    yield position, self.error_of(number)

    def error_of(self, number: int) -> Exception:
        """A new exception for an entry that failed: each consumer gets its own.

        Raises a failure of the device itself, which is not to be blamed on the file or left out.
        """
        path, cause = self.errors[number]
        if is_device_error(cause):
            raise cause
        error = load_error(path, cause)
        if is_out_of_memory(cause):
            error = DeviceMemoryError(f"cannot load {path!r}: {cause}")
        error.__cause__ = cause
        return error


def concatenate(
    batches: Sequence[PendingBatch],
) -> tuple[list[int], list[PathLike], dict[int, LoadedFeature]]:
    """The entries of several batches in order, their paths, and the substitutes by position.

    Features that are left out are not counted.
    """
    numbers: list[int] = []
    paths: list[PathLike] = []
    substitutes: dict[int, LoadedFeature] = {}
    for batch in batches:
        if not batch.substitutes:
            numbers += batch.numbers
            paths += batch.paths
            continue
        for position, number in enumerate(batch.numbers):
            if position in batch.substitutes:
                feature = batch.substitutes[position]
                if feature is None:
                    continue
                substitutes[len(numbers)] = feature
            numbers.append(number)
            paths.append(batch.paths[position])
    return numbers, paths, substitutes
