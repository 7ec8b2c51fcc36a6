"""Finding the feature files of a source."""

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any

GLOB_CHARACTERS = frozenset("*?[")


def find_files(source: Any, pattern: str, recursive: bool) -> list[str]:
    """The files of a directory, a glob or one file, sorted; or of a sequence of paths, as it is.

    Raises FileNotFoundError if there are none, and TypeError for what is no path.
    """
    if isinstance(source, (str, os.PathLike)):
        return list_files(os.fspath(source), pattern, recursive)
    paths: Sequence[Any] = source
    found = [os.fspath(path) for path in paths]
    if not found:
        raise FileNotFoundError("the sequence of paths is empty")
    for path in found:
        if not isinstance(path, str):
            raise TypeError(f"a path must be a str or an os.PathLike of one, not {path!r:.200}")
    return found


class GivenPaths:
    """Paths as they were given, for as long as they mean the same.

    A relative path means what it meant when it was given: once the current directory is another
    one, what was relative is absolute. May be pickled.

    Attributes:
        given: the paths as they were.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.given = self._now = paths
        # If the first and the last path in the order of texts begin with a slash, all do.
        some_relative = bool(paths) and not (
            os.path.isabs(min(paths)) and os.path.isabs(max(paths))
        )
        self._cwd = os.getcwd() if some_relative else None

    def now(self) -> Sequence[str]:
        """The paths. Takes a microsecond where some are relative."""
        if self._cwd is not None and _current_directory() != self._cwd:
            self._now = [os.path.join(self._cwd, path) for path in self.given]
            self._cwd = None
        return self._now


def _current_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def list_files(source: str, pattern: str, recursive: bool) -> list[str]:
    """The files that `source` means, sorted: a directory, a glob, or one file.

    In a directory, those whose name matches `pattern`; as in a shell, names that begin with a
    dot match only a pattern that does. Raises FileNotFoundError, naming directory and pattern,
    if there are none, and what the system raises if a directory cannot be read.
    """
    if os.path.isdir(source):
        hidden = pattern.startswith(".")
        match = fnmatch.filter
        found = [
            os.path.join(directory, name)
            for directory, names in _directories(source, recursive)
            for name in match(names, pattern)
            if hidden or not name.startswith(".")
        ]
        where = f"in directory {source!r} with pattern {pattern!r}" + (
            "" if recursive else " (recursive=True looks into subdirectories too)"
        )
    elif os.path.isfile(source):
        return [source]
    elif GLOB_CHARACTERS.intersection(source):
        found = [path for path in glob.iglob(source, recursive=True) if not os.path.isdir(path)]
        where = f"for the glob {source!r}"
    else:
        raise FileNotFoundError(f"no such file or directory: {source!r} (pattern {pattern!r})")
    if not found:
        raise FileNotFoundError(f"no files {where}")
    return sorted(found)


def _directories(root: str, recursive: bool) -> Iterator[tuple[str, list[str]]]:
    """Each directory with the names of what is no directory in it."""
    pending = [root]
    while pending:
        directory = pending.pop()
        names = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if not _is_directory(entry):
                    names.append(entry.name)
                elif recursive and not entry.is_symlink():  # a link may lead back up
                    pending.append(entry.path)
        yield directory, names


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself: an error of that file, when it is its turn
        return False
