"""Finding the feature files of a source."""

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any

GLOB_CHARACTERS = frozenset("*?[")


def find_files(source: Any, pattern: str, recursive: bool) -> list[str]:
    """The files of a directory, a glob or one file, sorted; or of a sequence of paths, as it is.

    Raises FileNotFoundError if there are none.
    """
    if isinstance(source, (str, os.PathLike)):
        return list_files(os.fspath(source), pattern, recursive)
    paths: Sequence[Any] = source
    found = [os.fspath(path) for path in paths]
    if not found:
        raise FileNotFoundError("the sequence of paths is empty")
    return found


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
                if not entry.is_dir():
                    names.append(entry.name)
                elif recursive and not entry.is_symlink():  # a link may lead back up
                    pending.append(entry.path)
        yield directory, names
