"""The table of known files."""

from collections.abc import Sequence
from itertools import repeat

from gpucache_pipes.cache.entry import NOT_READY, Entry, State


class Entries(dict[int, Entry]):
    """Entries of files by number. An entry is made when it is first looked up.

    So announcing a million files costs a few lists and no million objects.

    A file that has changed while a pending batch needed its old bytes has several entries, one for
    each version. All but the latest serve such batches only.

    Attributes:
        rows: see Cache.
        paths: by number, the first spelling of each file, absolute.
        newer: for the number of an entry that is not the latest of its file, the number of that.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.paths: list[str] = []
        self.newer: dict[int, int] = {}
        self._keys: list[str] = []
        # All versions of files that have had more than one, by the number of the first.
        self._versions: dict[int, list[Entry]] = {}

    def add(self, keys: Sequence[str], paths: Sequence[str]) -> int:
        """Add new files with these keys and paths; returns the number of the first of them."""
        start = len(self.rows)
        # Slices, so that what an interrupted call left behind is overwritten.
        self._keys[start:] = keys
        self.paths[start:] = paths
        self.rows.extend(repeat(NOT_READY, len(keys)))
        return start

    def __missing__(self, number: int) -> Entry:
        entry = self[number] = Entry(self._keys[number], self.paths[number], number, number)
        return entry

    def current(self, numbers: Sequence[int]) -> Sequence[int]:
        """The numbers of the latest versions of the files of these entries."""
        newer = self.newer
        return [newer.get(number, number) for number in numbers] if newer else numbers

    def latest(self, file: int) -> Entry:
        """The entry of the latest version of a file, by the number of its first version."""
        return self[self.newer.get(file, file)]

    def files(self, numbers: Sequence[int]) -> Sequence[int]:
        """The keys by which policies know these entries."""
        return [self[number].file for number in numbers] if self._versions else numbers

    def renew(self, entry: Entry) -> None:
        """Replace `entry`, the latest version of its file, by an ABSENT one."""
        # An older version that no batch needs any more is used again: there are never more entries
        # of a file than versions of it in flight at one time.
        versions = self._versions.setdefault(entry.file, [entry])
        latest = next((e for e in versions if e.state is State.ABSENT), None)
        if latest is None:
            number = self.add([entry.key], [entry.path])
            latest = self[number] = Entry(entry.key, entry.path, number, entry.file)
            versions.append(latest)
        for version in versions:
            self.newer[version.number] = latest.number
        del self.newer[latest.number]
