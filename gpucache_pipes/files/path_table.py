"""One number for each file, however its path is spelled."""

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import PurePath
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.files.paths import URL, PathList, Paths
from gpucache_pipes.files.source import Source

PathLike = str | os.PathLike[str]
Numbers = NDArray[np.intp]

_AHEAD = 16
"""Times as many files as are asked about, at most, for which a directory is looked through."""

_MANY = 8
"""From this many new files of one directory on, they are numbered together."""


class PathTable:
    """Maps spellings of paths to numbers of files, and remembers the spellings.

    A file is identified by its key in the source (`Source.key`), which is asked once for each
    spelling. With `follow_links`, spellings that are links are looked up again at each request.

    A relative path means what it means at the moment it is given here. Methods may be called by
    any number of threads, also while one of them changes the current directory.

    Args:
        source: says which file a path is.
        add: `add(keys, paths)` is called, with `lock` held, for new files: their keys and their
            first spellings, made absolute. It returns the number of the first; the others follow.
        lock: held while files are numbered. It belongs to the owner of the table.
        follow_links: see above.
    """

    def __init__(
        self,
        source: Source,
        add: Callable[[Sequence[str], Sequence[str]], int],
        lock: AbstractContextManager[Any],
        follow_links: bool = False,
    ) -> None:
        self._source = source
        self._add = add
        self._lock = lock
        self._follow_links = follow_links
        # Spellings that are links.
        self._links: set[PathLike] = set()
        # Numbers of absolute spellings. Keys are spellings, too. Only added to, so reading it
        # without the lock finds a number or none.
        self._numbers: dict[PathLike, int] = {}
        # The current directory, and the numbers of paths that were given in it, relative ones among
        # them. The pair is replaced as a whole: another thread never sees one without the other.
        self._relative: tuple[str, dict[PathLike, int]] = ("", {})
        self._listed: WeakKeyDictionary[PathList, _Listed] = WeakKeyDictionary()
        self._latest = _Listed(PathList([]))

    def resolve(self, paths: Iterable[PathLike]) -> tuple[Numbers, Sequence[PathLike] | None]:
        """The number of each path, in order: for `Paths` that are known by one look into an array.

        And the paths themselves, if all are absolute or `Paths`; else None.

        Raises TypeError for a single path instead of a sequence, or for an item that is not a
        non-empty str or os.PathLike; the message names it.
        """
        cwd = None
        if type(paths) is Paths:
            numbers = self._find_listed(paths)
            if numbers is not None:
                return numbers, paths
            cwd = paths.files.cwd
        if isinstance(paths, (str, os.PathLike)):
            raise TypeError(f"a sequence of paths is needed, not the single path {paths!r}")
        paths = list(paths)
        found, absolute = self._find(paths, cwd)
        return np.array(found, np.intp), absolute

    def _find_listed(self, paths: Paths) -> Numbers | None:
        """The numbers of files of a list; None if each spelling has to be looked up."""
        files = paths.files
        if self._links:
            return None
        listed = self._latest
        if listed.files() is not files:
            listed = self._listed.get(files) or self._listed.setdefault(files, _Listed(files))
            self._latest = listed
        numbers: Numbers = listed.numbers[paths.positions]
        if not listed.complete and (numbers < 0).any():
            new = list(dict.fromkeys(paths.positions[numbers < 0].tolist()))
            named = Paths(files, np.array(new, np.intp))
            # Other threads may do so, too: they write the same numbers.
            found = self._find(list(named), files.cwd, len(files.paths))[0]
            if self._links:
                return None
            listed.numbers[named.positions] = found
            listed.complete = not (listed.numbers < 0).any()
            numbers = listed.numbers[paths.positions]
        return numbers

    def _find(
        self, paths: list[PathLike], cwd: str | None = None, expected: int = 0
    ) -> tuple[Sequence[int], list[PathLike] | None]:
        """The numbers of spellings, relative ones in `cwd` or else in the current directory.

        `expected` is how many files there are of which these are the first to be asked about.
        """
        if not self._links or self._links.isdisjoint(paths):
            try:
                return list(map(self._numbers.__getitem__, paths)), paths
            except (KeyError, TypeError):
                if (first := self._add_directory(paths, expected)) is not None:
                    return range(first, first + len(paths)), paths
        spellings = list(map(_spelling, paths))
        table = self._numbers
        if all(map(os.path.isabs, spellings)):
            cwd = None
        else:
            cwd = cwd or os.getcwd()
            known = self._relative
            if known[0] != cwd:
                known = self._relative = (cwd, {})
            table = known[1]
        links = self._links
        found: dict[PathLike, int] = {
            p: table[p] for p in spellings if p in table and p not in links
        }
        if new := [path for path in dict.fromkeys(spellings) if path not in found]:
            found.update(self._add_each(new, cwd))
            table.update(found)
        numbers = list(map(found.__getitem__, spellings))
        return numbers, list(spellings) if cwd is None else None

    def _add_directory(self, paths: Sequence[PathLike], expected: int) -> int | None:
        """Number new files of one directory; None if `paths` are anything else.

        Takes no Python step for each file: a pipeline may announce a million of them.
        """
        # Not too many at once: listing a directory of a million files takes a second.
        expected = max(min(expected, _AHEAD * len(paths)), len(paths))
        if expected < _MANY or not isinstance(paths[0], str):
            return None
        head = paths[0].rpartition("/")[0]
        try:
            text = "\0".join(["", *paths, ""])  # type: ignore[list-item]
        except TypeError:
            return None
        count = len(paths)
        if (
            not (head.startswith("/") or URL.match(head))
            or text.count("\0") != count + 1
            or text.count(f"\0{head}/") != count
            or text.count("/") != count * (head.count("/") + 1)
            or not self._source.are_keys(head, text, expected)
        ):
            return None
        files: list[Any] = list(paths)
        numbers = self._numbers
        if len(set(files)) != count:
            return None
        with self._lock:
            if not numbers.keys().isdisjoint(files):
                return None
            first = self._add(files, files)
            numbers.update(zip(files, range(first, first + count), strict=True))
            return first

    def _add_each(self, spellings: Sequence[PathLike], cwd: str | None) -> dict[PathLike, int]:
        """Number these spellings, which are new or links; relative ones start at `cwd`."""
        source = self._source
        paths = [os.fspath(spelling) for spelling in spellings]
        if cwd is not None:
            paths = [source.absolute(path, cwd) for path in paths]
        keys = list(map(source.key, paths))
        numbers = self._numbers
        with self._lock:
            new: dict[str, str] = {}
            for key, path in zip(keys, paths, strict=True):
                if key not in numbers:
                    new.setdefault(key, path)
            first = self._add(list(new), list(new.values()))
            numbers.update(zip(new, range(first, first + len(new)), strict=True))
        if self._follow_links:
            looked_at = zip(spellings, paths, strict=True)
            self._links.update(spelling for spelling, path in looked_at if source.is_link(path))
        return dict(zip(spellings, map(numbers.__getitem__, keys), strict=True))


class _Listed:
    """The numbers of the files of a list, by position; -1 where a number is not known.

    Attributes:
        files: a weak reference to the list.
        complete: whether all are known.
    """

    __slots__ = ("complete", "files", "numbers")

    def __init__(self, files: PathList) -> None:
        self.files = weakref.ref(files)
        self.numbers: Numbers = np.full(len(files.paths), -1, np.intp)
        self.complete = False


def _spelling(path: object) -> str | PurePath:
    """What to remember a path by: an immutable object, never an os.PathLike of another kind."""
    if not isinstance(path, (str, PurePath)):
        if not isinstance(path, os.PathLike):
            raise TypeError(f"a path must be a non-empty str or an os.PathLike, not {path!r}")
        path = os.fspath(path)
    if not path or not isinstance(path, (str, PurePath)):
        raise TypeError(f"a path must be a non-empty str or an os.PathLike, not {path!r}")
    return path
