"""A batch that was requested and has not been gathered."""

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.batches import FeatureBatch
from gpucache_pipes.cache import Numbers
from gpucache_pipes.device import DeviceMemoryError, is_device_error, is_out_of_memory
from gpucache_pipes.errors import PolicyError
from gpucache_pipes.files import (
    LoadedFeature,
    Parts,
    PathLike,
    Paths,
    load_error,
    with_their_samples,
)
from gpucache_pipes.units import counted

if TYPE_CHECKING:
    from gpucache_pipes.store.requests import RequestManager


class PendingBatch:
    """Keeps the features of one batch on the device from the request until they are gathered.

    Made by `GPUFeatureStore.request`. Consume it once, by `result`, by `cancel`, or by the store's
    `collect`. A pending batch that is dropped is cancelled. May be used from any thread.

    Attributes:
        numbers: of the entries, in order; repeats are allowed.
        paths: of their files, as they were requested, absolute or `Paths`.
        parts: where a sample is several files, the names of its parts; the entries are then part
            after part. Else empty.
        places: theirs in the cache, if all were ready at the request.
        missing: those that are still being loaded, each once.
        errors: for the number of each entry that failed, its path and the exception.
        issuer: what made it.
        claim: holds the number of the batch until one caller takes it: see `use_up`.
        substitutes: by position, features that replace entries that failed; None leaves one out.

    `missing`, `errors` and `substitutes` change with the lock of the store held.
    """

    def __init__(
        self,
        issuer: "RequestManager",
        number: int,
        numbers: Numbers,
        paths: Sequence[PathLike],
        places: NDArray[np.int64] | None,
        keep_alive: object,
        parts: Parts = (),
    ) -> None:
        self.numbers = numbers
        self.paths = paths
        self.parts = parts
        self.places = places
        self.missing: Numbers = _NONE
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
        batch: FeatureBatch = self.issuer.collect([self])
        return batch

    def wait(self) -> dict[int, Exception]:
        """Wait until all files have been read. Returns the errors of those that failed.

        By position in the batch; `result` would raise the first of them. Raises what a failure of
        the device has raised, which is no error of a file.
        """
        return self.issuer.wait(self)

    def replace(self, position: int, feature: Any = None) -> None:
        """Use `feature` in place of the one at `position`, which failed to load.

        With None that position is left out, and the result is shorter; with it the whole sample,
        where a sample is several files. Raises IndexError for a
        position beyond the batch, ValueError for a feature that has not failed, TypeError for one
        that cannot be cached.
        """
        substitute = None if feature is None else LoadedFeature(feature)
        self.issuer.replace(self, position, substitute)

    def cancel(self) -> None:
        """Give the batch up. Does nothing if it was consumed."""
        if self.claim:
            self.issuer.cancel([self])

    @property
    def used(self) -> bool:
        """Whether the batch has been consumed or cancelled."""
        return not self.claim

    @property
    def left_out(self) -> set[int]:
        """The positions that `replace` has left out, with the other files of their samples."""
        left_out = {at for at, feature in self.substitutes.items() if feature is None}
        return with_their_samples(left_out, len(self.numbers), self.parts)

    def __repr__(self) -> str:
        state = "used" if self.used else f"{len(self.missing)} still loading"
        return f"PendingBatch({counted(len(self.numbers), 'file')}, {state})"

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

    def forget_places(self) -> None:
        """The features have moved to other pages. With the lock held."""
        self.places = None

    def fail(self, number: int, path: str, error: BaseException) -> None:
        """An entry could not be loaded: if it is missing, it no longer is. With the lock held."""
        missing = self.missing != number
        if not missing.all():
            # The error first: whoever sees that nothing is missing looks for errors next.
            self.errors[number] = (path, error)
            self.missing = self.missing[missing]

    def failures(self) -> Iterator[tuple[int, Exception]]:
        """The positions of features that failed and have no substitute, each with a new exception.

        With the lock held. Raises the error of the device, if it has failed.
        """
        if self.errors:
            for position, number in enumerate(self.numbers.tolist()):
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
        error.__cause__ = cause.__cause__ if isinstance(cause, PolicyError) else cause
        return error


_NONE: Numbers = np.empty(0, np.intp)


def concatenate(
    batches: Sequence[PendingBatch],
) -> tuple[Numbers, list[PathLike], dict[int, LoadedFeature]]:
    """The entries of several batches in order, their paths, and the substitutes by position.

    Features that are left out are not counted.
    """
    numbers = [_NONE]
    paths: list[PathLike] = []
    substitutes: dict[int, LoadedFeature] = {}
    for batch in batches:
        start = len(paths)
        named = batch.paths.absolute() if isinstance(batch.paths, Paths) else batch.paths
        if not batch.substitutes:
            numbers.append(batch.numbers)
            paths += named
            continue
        keep = np.ones(len(batch.numbers), bool)
        keep[list(batch.left_out)] = False
        numbers.append(batch.numbers[keep])
        paths += compress(named, keep.tolist())
        position = np.cumsum(keep) - 1 + start
        for at, feature in batch.substitutes.items():
            if feature is not None and keep[at]:
                substitutes[int(position[at])] = feature
    return np.concatenate(numbers), paths, substitutes
