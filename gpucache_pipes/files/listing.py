"""Which files a directory, a glob or a sequence of paths means."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gpucache_pipes.files.local import current_directory
from gpucache_pipes.files.packed.packed_directory import MARKER, is_packed_file, packed_names
from gpucache_pipes.files.paths import PathList, Paths
from gpucache_pipes.files.remote.listing import find_objects
from gpucache_pipes.files.remote.options import RemoteOptions
from gpucache_pipes.files.remote.urls import is_url, local_path
from gpucache_pipes.files.samples import Parts

GLOB_CHARACTERS = frozenset("*?[")
_MANGLED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")


def find_files(
    files: Any, pattern: str, recursive: bool, remote: RemoteOptions | None = None
) -> list[str]:
    """The files of a directory, of a glob, or one file, sorted; a sequence of paths as it is.

    Args:
        files: a path, a URL or a glob; or a sequence of paths, which are not looked at.
        pattern: which names in a directory are meant.
        recursive: look into subdirectories too.
        remote: how to list what a URL means.

    Returns:
        Paths; for a URL an ObjectList, which knows their sizes as long as it is held.

    Raises:
        FileNotFoundError: there are none.
        TypeError: an item of the sequence is not a path.
        OSError: a directory cannot be read.
        ValueError, ImportError: see `find_objects`.
    """
    if isinstance(files, (str, os.PathLike)):
        where = os.fspath(files)
        if isinstance(where, str):
            where = local_path(where)
            if is_url(where):
                return find_objects(where, pattern, recursive, remote or RemoteOptions())
            return list_files(where, pattern, recursive)
        raise TypeError(f"paths are str, not {where!r:.80}: os.fsdecode(path) makes it one")
    found = []
    for path in files:
        name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
        if not isinstance(name, str):
            raise TypeError(
                f"a path is a str or an os.PathLike of one, not {path!r:.80}{_hint(path)}"
            )
        found.append(name)
    if not found:
        raise FileNotFoundError("the sequence of paths is empty")
    return found


def _hint(path: Any) -> str:
    """What to do about an item of a sequence that is no path."""
    if isinstance(path, (tuple, list)) and len(path) == 2:
        return ": give the paths alone, and what belongs to them as labels=[...]"
    if isinstance(path, Mapping):
        return ": give the paths alone, and the other columns as labels={...}"
    if isinstance(path, bytes):
        return ": os.fsdecode(path) makes it one"
    return ""


def directory_prefix(files: Any) -> str:
    """The path of a directory with a separator at its end; "" for everything else."""
    if isinstance(files, str) and is_url(local_path(files)):
        return "" if GLOB_CHARACTERS.intersection(files) else files.removesuffix("/") + "/"
    if isinstance(files, (str, os.PathLike)) and os.path.isdir(files):
        return os.path.join(os.fspath(files), "")
    return ""


class GivenPaths:
    """Paths as the user gave them, for as long as they mean the same files.

    Once the current directory has changed, relative paths become absolute ones, so that they go on
    meaning what they meant. May be pickled.

    Args:
        paths: the paths.
        parts: see `PathList`.

    Attributes:
        given: the paths as they were given.
    """

    def __init__(self, paths: list[str], parts: Parts = ()) -> None:
        self.given = paths
        self._files = PathList.here(paths, parts)

    def label(self, labels: Any) -> None:
        """Let the list carry these labels."""
        self._files.labels = labels

    def files(self) -> PathList:
        """The paths as a list for `Paths`. Takes a microsecond if some are relative."""
        cwd = self._files.cwd
        if cwd is not None and current_directory() != cwd:
            everything = np.arange(len(self.given))
            before = self._files
            self._files = PathList(Paths(before, everything).absolute(), None, before.parts)
            self._files.labels = before.labels
        return self._files

    def now(self) -> list[str]:
        """The paths."""
        return self.files().paths


def list_files(files: str, pattern: str, recursive: bool) -> list[str]:
    """The files of a directory, of a glob, or one file, sorted.

    In a directory, those whose names match `pattern`. As in a shell, a name that begins with a dot
    matches only a pattern that does. Errors as in `find_files`; they name directory and pattern.
    """
    if os.path.isdir(files):
        hidden = pattern.startswith(".")
        found = []
        for directory, names in _directories(files, recursive):
            if MARKER in names:
                names = packed_names(directory, pattern, recursive)
            else:
                names = [name for name in _matching(names, pattern) if hidden or name[0] != "."]
            prefix = os.path.join(directory, "")
            found += [prefix + name for name in names]
        where = f"in directory {files!r} with pattern {pattern!r}" + (
            "" if recursive else " (recursive=True looks into subdirectories too)"
        )
    elif is_feature_file(files):
        return [files]
    elif GLOB_CHARACTERS.intersection(files):
        found = [path for path in glob.iglob(files, recursive=True) if not os.path.isdir(path)]
        where = f"for the glob {files!r}"
    else:
        hint = ""
        if _MANGLED.match(files):
            hint = ": os.path and pathlib make one slash of the two of a URL, so give it as a str"
        raise FileNotFoundError(f"no such file or directory: {files!r} (pattern {pattern!r}){hint}")
    if not found:
        raise FileNotFoundError(f"no files {where}")
    return sorted(found)


def is_feature_file(path: str) -> bool:
    """Whether a path names one file, or a feature of a packed directory."""
    return os.path.isfile(path) or is_packed_file(path)


def _matching(names: list[str], pattern: str) -> list[str]:
    """`fnmatch.filter`; patterns such as "*.pt" take a tenth of its time."""
    end = pattern.removeprefix("*")
    if end != pattern and end == glob.escape(end):
        return [name for name in names if name.endswith(end)]
    return fnmatch.filter(names, pattern)


def _directories(root: str, recursive: bool) -> Iterator[tuple[str, list[str]]]:
    """Each directory, with the names of its entries that are not directories."""
    pending = [root]
    while pending:
        directory = pending.pop()
        names = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if not _is_directory(entry):
                    names.append(entry.name)
                elif recursive and not entry.is_symlink():  # a link may lead to a directory above
                    pending.append(entry.path)
        yield directory, names


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself: opening the file will say what is wrong
        return False
