"""One number for each file, however its path is spelled."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath

PathLike = str | os.PathLike[str]


class PathTable:
    """Remembers spellings of paths.

    A file is known by its key, the absolute path with symbolic links resolved. Directories are
    resolved once and remembered: a link that is changed afterwards is not noticed, as little as
    a file that changes; but with `follow_links`, links to files themselves are looked at each time.
    `numbers_of(files)` gives the numbers of files, each of which is a key
    and its first spelling, made absolute; it must be safe to call from several threads.
    """

    def __init__(
        self,
        numbers_of: Callable[[Sequence[tuple[str, str]]], Sequence[int]],
        follow_links: bool = False,
    ) -> None:
        self._numbers_of = numbers_of
        self._follow_links = follow_links
        # Spellings whose last part is a link.
        self._links: set[PathLike] = set()
        self._numbers: dict[PathLike, int] = {}
        self._directories: dict[str, str] = {}
        # What relative spellings in _numbers refer to.
        self._cwd: str | None = None

    def numbers(self, paths: Iterable[PathLike]) -> list[int]:
        """The numbers of `paths`; well under 1 us for a spelling that was seen before.

        Raises TypeError, with what is wrong, for a single path or for what is no path.
        """
        if isinstance(paths, (str, os.PathLike)):
            raise TypeError(f"a sequence of paths is needed, not the single path {paths!r}")
        paths = list(paths)
        if self._cwd is not None and self._cwd != os.getcwd():
            self._numbers = {p: n for p, n in self._numbers.items() if os.path.isabs(p)}
            self._cwd = None
        numbers = self._numbers
        if self._links and not self._links.isdisjoint(paths):
            for path in self._links.intersection(paths):
                numbers.pop(path, None)
        try:
            return list(map(numbers.__getitem__, paths))
        except (KeyError, TypeError):
            spellings = list(map(_spelling, paths))
            new = list(dict.fromkeys(path for path in spellings if path not in numbers))
            files = [self._file(os.fspath(path)) for path in new]
            numbers.update(zip(new, self._numbers_of(files), strict=True))
            if self._follow_links:
                self._links.update(path for path in new if os.path.islink(path))
            return list(map(numbers.__getitem__, spellings))

    def _file(self, path: str) -> tuple[str, str]:
        """The key of a path, and the path made absolute."""
        if not os.path.isabs(path):
            # Not normalised: `..` behind a link is for the system to understand.
            self._cwd = os.getcwd()
            path = os.path.join(self._cwd, path)
        return self._key(path), path

    def _key(self, path: str) -> str:
        """The key of an absolute path; costs a few microseconds."""
        head, _, name = path.rpartition("/")
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        directory = self._directories.get(head)
        if directory is None:
            directory = self._directories.setdefault(head, os.path.realpath(head or "/"))
        plain = f"{directory.rstrip('/')}/{name}"
        # islink answers False for what does not exist: the reader will say so, naming the path.
        return os.path.realpath(plain) if os.path.islink(plain) else plain


def _spelling(path: object) -> str | PurePath:
    """What a path is remembered by: not by objects of unknown kinds, which may change."""
    if not isinstance(path, (str, PurePath)):
        if not isinstance(path, os.PathLike):
            raise TypeError(f"a path must be a non-empty str or an os.PathLike, not {path!r}")
        path = os.fspath(path)
    if not path or not isinstance(path, (str, PurePath)):
        raise TypeError(f"a path must be a non-empty str or an os.PathLike, not {path!r}")
    return path
