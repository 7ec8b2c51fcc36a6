"""Which files are known, and what has become of them."""

from collections.abc import Sequence
from itertools import repeat

from gpucache_pipes.cache.entry import NOT_READY, Entry, State


class Entries(dict[int, Entry]):
    """The entries of files by their numbers, made when somebody first looks at them.

    So a million files can be announced in advance for the price of a few lists.

    Where a file has changed while a ticket needed what it had been, it has several entries, one
    for each version; all but the latest are there for open tickets only.

    Attributes:
        rows: see Cache.
        paths: the files as they were first spelled, absolute, by number.
        newer: for the numbers of entries that are not the latest of their file, that one.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.paths: list[str] = []
        self.newer: dict[int, int] = {}
        self._keys: list[str] = []
        # All versions of files that have had more than one, by the number of the first.
        self._versions: dict[int, list[Entry]] = {}

    def add(self, keys: Sequence[str], paths: Sequence[str]) -> int:
        """Files that are new, and how to spell them. Returns the number of the first of them."""
        start = len(self.rows)
        # What an interrupt has left behind is overwritten.
        self._keys[start:] = keys
        self.paths[start:] = paths
        self.rows.extend(repeat(NOT_READY, len(keys)))
        return start

    def __missing__(self, number: int) -> Entry:
        entry = self[number] = Entry(self._keys[number], self.paths[number], number, number)
        return entry

    def current(self, numbers: Sequence[int]) -> Sequence[int]:
        """The same, but for entries that others have taken the place of."""
        newer = self.newer
        return [newer.get(number, number) for number in numbers] if newer else numbers

    def latest(self, file: int) -> Entry:
        """The entry of a file, by the number of its first one."""
        return self[self.newer.get(file, file)]

    def files(self, numbers: Sequence[int]) -> Sequence[int]:
        """What policies know these entries by."""
        return [self[number].file for number in numbers] if self._versions else numbers

    def renew(self, entry: Entry) -> None:
        """Let another entry take the place of this one, the latest of its file."""
        # One that nobody needs any more serves again: there are as many as there have been
        # versions in flight at one time.
        versions = self._versions.setdefault(entry.file, [entry])
        latest = next((e for e in versions if e.state is State.ABSENT), None)
        if latest is None:
            number = self.add([entry.key], [entry.path])
            latest = self[number] = Entry(entry.key, entry.path, number, entry.file)
            versions.append(latest)
        for version in versions:
            self.newer[version.number] = latest.number
        del self.newer[latest.number]
