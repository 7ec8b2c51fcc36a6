"""One number for each file, however its path is spelled."""

import os
from collections.abc import Callable, Iterable
from pathlib import PurePath

PathLike = str | os.PathLike[str]


class PathTable:
    """Remembers spellings of paths.

    A file is known by its key, the absolute path with symbolic links resolved. Directories are
    resolved once and remembered: a link that is changed afterwards is not noticed, as little as
    a file that changes. `number_of(key, path)` gives the number of a key, whose first spelling,
    made absolute, is `path`; it must be safe to call from several threads.
    """

    def __init__(self, number_of: Callable[[str, str], int]) -> None:
        self._number_of = number_of
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
        try:
            return list(map(self._numbers.__getitem__, paths))
        except (KeyError, TypeError):
            return [self._number(path) for path in paths]

    def _number(self, path: PathLike) -> int:
        if isinstance(path, PurePath):
            number = self._numbers.get(path)
            if number is None:
                number = self._numbers[path] = self._number(str(path))
            return number
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        if not isinstance(path, str) or not path:
            raise TypeError(f"a path must be a non-empty str or an os.PathLike, not {path!r}")
        number = self._numbers.get(path)
        if number is None:
            whole = path
            if not os.path.isabs(path):
                # Not normalised: `..` behind a link is for the system to understand.
                self._cwd = os.getcwd()
                whole = os.path.join(self._cwd, path)
            number = self._numbers[path] = self._number_of(self._key(whole), whole)
        return number

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
