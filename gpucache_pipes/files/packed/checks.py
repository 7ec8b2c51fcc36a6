"""Whether files are still those that were packed."""

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.packed.index import CURRENT, STALE, UNCHECKED, Index, Positions
from gpucache_pipes.files.packed.packed_directory import known_packed
from gpucache_pipes.files.packed.segment import name_hashes
from gpucache_pipes.files.source import Progress, Source

CHECKS = ("stat", "listing", "never")


class FileChecks:
    """Looks at each file before the first use of its record. For any number of threads.

    Args:
        below: the source of the files.
        check: how: see DiskCache.
        always: before each use, and by all that `below` knows of versions.
    """

    def __init__(self, below: Source, check: str, always: bool) -> None:
        self._below = below
        self._check = check
        self._always = always
        self._look = getattr(below, "file_versions", None)
        self._listings = Listings()
        self._seen: dict[str, bytes | None] = {}  # versions, where files are always checked

    def versions(
        self, keys: Sequence[str], progress: Progress, numbers: Sequence[int] = ()
    ) -> npt.NDArray[np.int64]:
        """See Source.file_versions. `progress` knows the files by `numbers`."""
        if self._look is None:
            return np.full((len(keys), 2), -1, np.int64)
        progress.restart(numbers)
        found: npt.NDArray[np.int64] = self._look(keys, progress)
        return found

    def usable(
        self, index: Index, positions: Positions, keys: Sequence[str], progress: Progress
    ) -> Positions:
        """The positions of records that may be used, -1 for others; of the first of these files.

        Args:
            index: has the records. What is found out is noted in it.
            positions: of the records, -1 for files that have none.
            keys: of the files.
            progress: is kept up to date. If it says to stop, there may be fewer.
        """
        states = index.states[positions]
        states[positions < 0] = STALE
        if self._always:
            states[states == CURRENT] = UNCHECKED
        look = np.flatnonzero((states == UNCHECKED) & (self._check != "never"))
        if len(look):
            some = [keys[n] for n in look.tolist()]
            if self._check == "listing":
                progress.restart(look.tolist())
                same = np.array([self._listings.lists(key) for key in some], np.bool_)
            else:
                versions = self.versions(some, progress, look.tolist())
                look = look[: len(versions)]
                same = (versions == index.versions[positions[look]]).all(axis=1)
                same &= versions[:, 1] >= 0
            if self._always:
                same &= self._are_seen(some[: len(look)])
            states[look] = index.states[positions[look]] = np.where(same, CURRENT, STALE)
        usable = np.where(states == STALE, -1, positions)
        if self._check == "stat":
            unknown = np.flatnonzero((usable >= 0) & (states == UNCHECKED))
            if len(unknown):  # the call ended early
                usable = usable[: unknown[0]]
        return usable

    def _are_seen(self, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether these files are the ones that this process saw first, by all that is known."""
        now = [self._below.version(key) for key in keys]
        return np.array(
            [
                version is not None and self._seen.setdefault(key, version) == version
                for key, version in zip(keys, now, strict=True)
            ],
            np.bool_,
        )


class Listings:
    """Lists each directory once, and remembers the names in 8 bytes each. For several threads."""

    def __init__(self) -> None:
        # Single operations on it are atomic; what two threads list at once is listed twice.
        self._listed: dict[str, npt.NDArray[np.uint64]] = {}

    def lists(self, path: str) -> bool:
        """Whether the directory of a file listed it. False if it cannot be listed."""
        if known_packed(path) is not None:
            return True
        directory, name = os.path.split(path)
        hashes = self._listed.get(directory)
        if hashes is None:
            try:
                names = os.listdir(directory)
            except (OSError, ValueError):
                names = []
            hashes = self._listed[directory] = np.sort(name_hashes(names)[:, 0])
        if not len(hashes):
            return False
        wanted = name_hashes([name])[0, 0]
        return bool(hashes[np.searchsorted(hashes, wanted) % len(hashes)] == wanted)
