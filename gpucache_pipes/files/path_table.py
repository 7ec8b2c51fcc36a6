"""One number for each file, however its path is spelled."""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import PurePath
from typing import Any

from gpucache_pipes.files.links import LinkFinder

PathLike = str | os.PathLike[str]

_MANY = 8
"""New files of a directory that are worth numbering together."""

_NO_NAMES = ("/", "/.", "/..")
"""Ends of paths whose last part is not the name of a file."""


class PathTable:
    """Remembers spellings of paths.

    A file is known by its key, the absolute path with symbolic links resolved. Directories are
    resolved once and remembered: a link that is changed afterwards is not noticed, as little as
    a file that changes; but with `follow_links`, links to files themselves are looked at each time.
    A path that the system refuses to look at is its own key: who opens it is told why.

    A relative path means what it means when it is given here. For any number of threads, also
    while one of them changes the current directory.

    `add(keys, paths)` is told, under `lock`, of files that are new, each with its key and its first
    spelling, made absolute; it returns the number of the first of them.
    """

    def __init__(
        self,
        add: Callable[[Sequence[str], Sequence[str]], int],
        lock: AbstractContextManager[Any],
        follow_links: bool = False,
    ) -> None:
        self._add = add
        self._lock = lock
        self._follow_links = follow_links
        # Spellings whose last part is a link.
        self._links: set[PathLike] = set()
        # Of absolute spellings; keys are spellings, too. Nothing is ever taken out.
        self._numbers: dict[PathLike, int] = {}
        # A current directory, and what was asked for together with paths relative to it. Replaced
        # as a whole, so that another thread never sees one without the other.
        self._relative: tuple[str, dict[PathLike, int]] = ("", {})
        self._directories: dict[str, str] = {}
        self._link_finder = LinkFinder()

    def numbers(self, paths: Iterable[PathLike]) -> list[int]:
        """The numbers of `paths`; well under 1 us for a spelling that was seen before.

        Raises TypeError, with what is wrong, for a single path or for what is no path.
        """
        if isinstance(paths, (str, os.PathLike)):
            raise TypeError(f"a sequence of paths is needed, not the single path {paths!r}")
        paths = list(paths)
        if not self._links or self._links.isdisjoint(paths):
            try:
                return list(map(self._numbers.__getitem__, paths))
            except (KeyError, TypeError):
                if (first := self._learn_directory(paths)) is not None:
                    return list(range(first, first + len(paths)))
        spellings = list(map(_spelling, paths))
        cwd, table = None, self._numbers
        if not all(map(os.path.isabs, spellings)):
            cwd = os.getcwd()
            known = self._relative
            if known[0] != cwd:
                known = self._relative = (cwd, {})
            table = known[1]
        links = self._links
        found: dict[PathLike, int] = {
            p: table[p] for p in spellings if p in table and p not in links
        }
        if new := [path for path in dict.fromkeys(spellings) if path not in found]:
            found.update(self._learn(new, cwd))
            table.update(found)
        return list(map(found.__getitem__, spellings))

    def _learn_directory(self, paths: Sequence[PathLike]) -> int | None:
        """Number new files of one directory, at well under 1 us each; None if these are not such.

        Nothing here takes a step of Python for each file: it adds up when a million are announced.
        """
        if len(paths) < _MANY or not isinstance(paths[0], str):
            return None
        head = paths[0].rpartition("/")[0]
        try:
            text = "\0".join(["", *paths, ""])  # type: ignore[list-item]
        except TypeError:
            return None
        count = len(paths)
        if (
            not head.startswith("/")
            or text.count("\0") != count + 1
            or text.count(f"\0{head}/") != count
            or text.count("/") != count * (head.count("/") + 1)
            or any(f"{end}\0" in text for end in _NO_NAMES)
            or self._has_links(head)
            or self._link_finder.may_find(head, count)
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

    def _has_links(self, head: str) -> bool:
        try:
            return self._directory(head) != head
        except (OSError, ValueError):
            return True

    def _learn(self, spellings: Sequence[PathLike], cwd: str | None) -> dict[PathLike, int]:
        """Number these spellings, which are new, or links; relative ones start at `cwd`."""
        # Joined and not normalised: `..` behind a link is for the system to understand.
        paths = [os.fspath(path) if cwd is None else os.path.join(cwd, path) for path in spellings]
        keys = list(map(self._key, paths))
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
            self._links.update(spelling for spelling, path in looked_at if os.path.islink(path))
        return dict(zip(spellings, map(numbers.__getitem__, keys), strict=True))

    def _key(self, path: str) -> str:
        """The key of an absolute path; costs a few microseconds."""
        head, _, name = path.rpartition("/")
        try:
            if path.endswith(_NO_NAMES):
                return os.path.realpath(path)
            directory = self._directory(head)
            plain = path if directory == head else f"{directory}/{name}"
            # islink answers False for what does not exist: the reader will say so, naming the path.
            return os.path.realpath(plain) if os.path.islink(plain) else plain
        except (OSError, ValueError):  # ValueError: no name that the system could have
            return path

    def _directory(self, head: str) -> str:
        """What a directory is without links; no slash at its end. Raises OSError, ValueError."""
        directory = self._directories.get(head)
        if directory is None:
            found = os.path.realpath(head or "/").rstrip("/")
            directory = self._directories.setdefault(head, found)
        return directory


def _spelling(path: object) -> str | PurePath:
    """What a path is remembered by: not by objects of unknown kinds, which may change."""
    if not isinstance(path, (str, PurePath)):
        if not isinstance(path, os.PathLike):
            raise TypeError(f"a path must be a non-empty str or an os.PathLike, not {path!r}")
        path = os.fspath(path)
    if not path or not isinstance(path, (str, PurePath)):
        raise TypeError(f"a path must be a non-empty str or an os.PathLike, not {path!r}")
    return path
