"""The table of known files: the state of each, and the place of its bytes."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.cache.states import ABSENT, ALLOWED, READY, STATES

Numbers: TypeAlias = NDArray[np.intp]
"""Numbers of entries, in order; repeats are allowed where that is not excluded."""

Pages: TypeAlias = NDArray[np.int64]
"""Numbers of pages."""

LAYOUT_SHIFT: Final = 40
"""A place is (number of the layout << LAYOUT_SHIFT) + first page; see Entries."""

PAGE_MASK: Final = (1 << LAYOUT_SHIFT) - 1
NOWHERE: Final = -(1 << 63)
"""The place of an entry that holds no pages."""


_READY = bytes(state for state in STATES if state >= READY)


class Entries:
    """What the cache holds of each file: one position in a few arrays, 10 bytes, for each.

    A file is numbered when it is first named. One that has changed while a pending batch needed its
    old bytes has several entries, one for each version. All but the latest serve such batches only.

    Attributes:
        count: how many entries there are. Arrays are longer.
        state: of each entry; see states.py.
        evicted: whether it has been evicted at any time.
        place: its layout and first page, in one number, while it has pages; else NOWHERE. The
            complement (`~place`) of an entry whose pages do not lie in a row: see `scattered`. So
            the least and the largest place of a batch tell whether all of it has one layout and
            lies in runs of pages, without a look at each.
        scattered: the pages of entries that do not lie in a row.
        paths: the first spelling of each file, absolute.
        values: the plain values of entries that have pages, where there are any.
        versions: of the files that have been read, where the store revalidates.
        newer: for the number of an entry that is not the latest of its file, the number of that.
    """

    def __init__(self) -> None:
        self.count = 0
        self.state = np.zeros(64, np.uint8)
        self.evicted = np.zeros(64, np.bool_)
        self.place = np.full(64, NOWHERE, np.int64)
        self.scattered: dict[int, Pages] = {}
        self.paths: list[str] = []
        self.values: dict[int, tuple[Any, ...]] = {}
        self.versions: dict[int, bytes | None] = {}
        self.newer: dict[int, int] = {}
        # Keys that differ from the path, which few do.
        self._keys: dict[int, str] = {}
        # All versions of files that have had more than one, by the number of the first; and the
        # first of each of them.
        self._versions: dict[int, list[int]] = {}
        self._file: dict[int, int] = {}

    def __len__(self) -> int:
        return self.count

    def add(self, keys: Sequence[str], paths: Sequence[str]) -> int:
        """Add new files with these keys and paths; returns the number of the first of them."""
        start = self.count
        end = start + len(keys)
        if end > len(self.state):
            size = end + end // 4
            self.state = _longer(self.state, size, ABSENT)
            self.evicted = _longer(self.evicted, size, 0)
            self.place = _longer(self.place, size, NOWHERE)
        self.paths[start:] = paths
        if keys is not paths:
            differ = zip(keys, paths, strict=True)
            self._keys.update((start + n, key) for n, (key, path) in enumerate(differ)
                              if key is not path)  # fmt: skip
        self.count = end
        return start

    def key(self, number: int) -> str:
        """The identity of the file in its source."""
        return self._keys.get(number) or self.paths[number]

    def keys(self, numbers: Sequence[int]) -> list[str]:
        """The identities of files in their source."""
        if not self._keys:
            return [self.paths[number] for number in numbers]
        return [self.key(number) for number in numbers]

    def are_ready(self, numbers: Numbers) -> bool:
        """Whether all of these are READY. By bytes: a fifth of the time of `min()`."""
        return not self.state[numbers].tobytes().translate(None, _READY)

    def in_state(self, state: int) -> Numbers:
        """All entries in this state. Looks at every one of them."""
        return np.flatnonzero(self.state[: self.count] == state)

    def with_pages(self) -> Numbers:
        """All entries that have a place."""
        return np.flatnonzero(self.place[: self.count] != NOWHERE)

    def move(self, numbers: Numbers, to: int) -> None:
        """Change the state of these entries. Raises AssertionError for what states.py forbids."""
        before = self.state[numbers]
        allowed = ALLOWED[to].take(before)
        if not allowed.all():
            at = int(np.argmin(allowed))
            raise AssertionError(
                f"{self.paths[numbers[at]]!r}: {STATES[before[at]][0]} -> {STATES[to][0]}"
            )
        self.state[numbers] = to

    # Versions

    def current(self, numbers: Numbers) -> Numbers:
        """The numbers of the latest versions of the files of these entries."""
        if not self.newer:
            return numbers
        return np.array([self.newer.get(n, n) for n in numbers.tolist()], np.intp)

    def latest(self, file: int) -> int:
        """The latest version of a file, by the number of its first version."""
        return self.newer.get(file, file)

    def file(self, number: int) -> int:
        """The key by which policies know an entry: the number of the first version of its file."""
        return self._file.get(number, number)

    def files(self, numbers: Numbers) -> list[int]:
        """The keys by which policies know these entries."""
        found: list[int] = numbers.tolist()
        return [self._file.get(n, n) for n in found] if self._file else found

    def renew(self, number: int) -> None:
        """Replace an entry, the latest version of its file, by an ABSENT one."""
        # An older version that no batch needs any more is used again: there are never more entries
        # of a file than versions of it in flight at one time.
        file = self.file(number)
        versions = self._versions.setdefault(file, [number])
        latest = next((n for n in versions if self.state[n] == ABSENT), None)
        if latest is None:
            latest = self.add([self.key(number)], [self.paths[number]])
            self._file[latest] = file
            versions.append(latest)
        for version in versions:
            self.newer[version] = latest
        del self.newer[latest]

    def files_with_versions(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Each file that has had several entries, and these."""
        return iter(self._versions.items())


def distinct(numbers: Numbers) -> Numbers:
    """These numbers, none of which is negative, in ascending order and each once.

    `np.unique` does not work here: its first call imports `numpy.ma`, and if a signal handler
    raises or makes a call of its own in the middle of that, numpy stays broken.
    """
    ordered = np.sort(numbers)
    return ordered[np.diff(ordered, prepend=-1) > 0]


def _longer(table: NDArray[Any], size: int, fill: int) -> NDArray[Any]:
    longer = np.full(size, fill, table.dtype)
    longer[: len(table)] = table
    return longer
