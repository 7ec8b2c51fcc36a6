"""Feature files in the local file system: identity, versions, sizes, and how to open them."""

import os
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.formats import FileOpener
from gpucache_pipes.files.links import LinkFinder
from gpucache_pipes.files.packed import native
from gpucache_pipes.files.packed.packed_directory import PackedDirectory, find_packed
from gpucache_pipes.files.packed.packed_group import PackedGroup
from gpucache_pipes.files.paths import URL
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import LoadedFeature, OpenFeature, Progress, VersionedFeature
from gpucache_pipes.files.versions import RACY_NS, is_racy, version_of

_NOT_A_NAME = ("/", "/.", "/..")
"""Ends of paths whose last part is not the name of a file."""

_SAMPLED = 64
_FEW = 8


class LocalFiles:
    """A `Source` of files in the local file system, or of whatever a `load_fn` makes of a path.

    Identity, links, versions and sizes of files are known here and in the modules that it uses. No
    other folder calls `realpath`, `islink`, `stat` or `scandir` for a feature file.

    The real paths of directories are remembered for the life of the source, so a link among the
    directories of a path must not change. Links to files are followed once, at the first request.

    Methods may be called by any number of threads: what they remember is kept in dicts that are
    only added to, one key at a time. Each such step is atomic, with and without the global
    interpreter lock, and two threads that meet in one compute the same value.

    Args:
        load_fn: `load_fn(path) -> feature`. It gets each path as the caller of the store wrote it:
            `str` or what `os.fspath` makes of it. Only after the current directory has changed does
            it get a relative path as an absolute one, which then still means the same file.
        weights_only: as in `torch.load`, for files without a `load_fn`.
        keys, dtype: what is kept of each feature: see GPUFeatureStore.
    """

    def __init__(
        self,
        load_fn: Callable[[str], Any] | None = None,
        weights_only: bool = True,
        keys: Any = None,
        dtype: Any = None,
    ) -> None:
        self._load_fn = load_fn
        self._selection = Selection.of(keys, dtype)
        self._opener = FileOpener(weights_only, self._selection)
        self._real_directories: dict[str, str] = {}
        self._link_finder = LinkFinder()

    # Identity

    def absolute(self, path: str, cwd: str) -> str:
        """`path` as it will be opened, for a caller whose current directory is `cwd`.

        Joined and not normalised: what `..` means after a link only the system knows. A URL
        ("s3://bucket/a.pt") is absolute already.
        """
        if URL.match(path):
            return path
        joined = os.path.join(cwd, path)
        if self._load_fn is None or joined == path:
            return joined
        return _FromRelative(joined, cwd, path)

    def key(self, path: str) -> str:
        """The identity of an absolute path: equal for all spellings of one file.

        The path without links. A path that the system refuses to look at is its own key, and so is
        a URL: opening it will say what is wrong. Takes a few microseconds.
        """
        if URL.match(path):
            return path
        head, _, name = path.rpartition("/")
        try:
            if path.endswith(_NOT_A_NAME):
                return os.path.realpath(path)
            directory = self._real_directory(head)
            plain = path if directory == head else f"{directory}/{name}"
            # islink is False for a file that does not exist: opening it will name the path.
            return os.path.realpath(plain) if os.path.islink(plain) else plain
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return path

    def are_keys(self, directory: str, names_end: str, files: int) -> bool:
        """Whether `files` paths `directory`/name are their own keys, without looking at each.

        Args:
            directory: an absolute path without a slash at its end.
            names_end: the names, each followed by a zero character.
            files: how many of the directory's files are asked about; a directory is listed when
                enough of its files have been asked about.
        """
        try:
            return (
                not any(f"{end}\0" in names_end for end in _NOT_A_NAME)
                and self._real_directory(directory) == directory
                and not self._link_finder.may_find(directory, files)
            )
        except (OSError, ValueError):
            return False

    def is_link(self, path: str) -> bool:
        """Whether the file may be replaced by changing a link."""
        return os.path.islink(path)

    def _real_directory(self, head: str) -> str:
        """A directory without links, and without a slash at its end. Raises OSError, ValueError."""
        directory = self._real_directories.get(head)
        if directory is None:
            found = os.path.realpath(head or "/").rstrip("/")
            directory = self._real_directories.setdefault(head, found)
        return directory

    # Contents

    def open(self, key: str, path: str) -> OpenFeature:
        """See Source."""
        if self._load_fn is None:
            return self._opener.probe(key)[0]
        # `path` is the first spelling of the file, as `absolute` returned it.
        if isinstance(path, _FromRelative) and current_directory() == path.cwd:
            feature = self._load_fn(path.written)
        else:
            feature = self._load_fn(str(path))
        selection = self._selection
        return LoadedFeature(feature if selection is None else selection.feature(feature))

    def probe(self, path: str) -> tuple[OpenFeature, str | None]:
        """The feature in a file, and why `torch.load` read it, or None. Raises as `open` does."""
        return self._opener.probe(path)

    def open_many(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> "list[VersionedFeature | None]":
        """See Source. A `load_fn` opens its files one by one."""
        return [] if self._load_fn is not None else self._opener.open_many(keys, progress)

    def open_group(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> PackedGroup | None:
        """See Source. Those that are in a packed directory."""
        return None if self._load_fn is not None else self._opener.open_group(keys)

    def version(self, key: str) -> bytes | None:
        """See Source. From device, inode, size and modification time.

        None for a file that was written less than two seconds ago: it may change again without a
        change of its modification time.
        """
        try:
            status = os.stat(key)
        except (FileNotFoundError, NotADirectoryError):
            packed = self._packed(key)
            return None if packed is None else packed[0].stored_version(packed[1])
        except (OSError, ValueError):
            return None
        return None if is_racy(status) else version_of(status)

    def _packed(self, key: str) -> tuple[PackedDirectory, int] | None:
        """The packed directory that a file is in, and where in it. Raises nothing."""
        try:
            directory = find_packed(key) if self._load_fn is None else None
            return None if directory is None else (directory, directory.position(key))
        except (OSError, ValueError):
            return None

    @property
    def fingerprint(self) -> str | None:
        """See Source."""
        if self._load_fn is not None:
            return None
        return "" if self._selection is None else self._selection.text

    def tell_versions(self, keys: Sequence[str]) -> list[bool]:
        """See Source."""
        return [False] * len(keys)

    def file_versions(self, keys: Sequence[str], progress: Progress) -> npt.NDArray[np.int64]:
        """See Source. Size and modification time, which network file systems do not change."""
        found = native.versions(keys, progress)
        found[found[:, 1] > time.time_ns() - RACY_NS] = -1
        for n in np.flatnonzero(found[:, 1] < 0).tolist():
            packed = self._packed(keys[n])
            if packed is not None:
                found[n] = packed[0].index.versions[packed[1]]
        return found

    def is_current(self, path: str, version: bytes | None) -> bool:
        """See Source."""
        try:
            return version is not None and version_of(os.stat(path)) == version
        except (FileNotFoundError, NotADirectoryError):
            packed = self._packed(path)
            return (
                packed is not None
                and packed[0].is_current()
                and packed[0].stored_version(packed[1]) == version
            )
        except (OSError, ValueError):
            return False

    def size(self, path: str) -> int:
        """See Source."""
        return file_size(path)

    def sample_sizes(self, paths: Sequence[str]) -> list[int]:
        """See Source. Of fewer than eight files, their neighbours in the directory count, too."""
        if paths and len(paths) < _FEW:
            directory, name = os.path.split(paths[0])
            suffix = os.path.splitext(name)[1]
            try:
                with os.scandir(directory) as entries:
                    similar = (e.path for e in entries if e.name.endswith(suffix))
                    paths = [*paths, *islice(similar, _SAMPLED)]
            except (OSError, ValueError):
                return []
        sizes = []
        for path in paths[:: max(1, len(paths) // _SAMPLED)]:
            try:
                sizes.append(self.size(path))
            except (OSError, ValueError):  # features need not be files
                continue
        return sizes


class _FromRelative(str):
    """An absolute path that was made of a relative one, as it was written in that directory."""

    __slots__ = ("cwd", "written")

    def __new__(cls, absolute: str, cwd: str, written: str) -> "_FromRelative":
        path = super().__new__(cls, absolute)
        path.cwd, path.written = cwd, written
        return path

    cwd: str
    written: str


def file_size(path: str) -> int:
    """The size of a file in bytes. Raises OSError, or ValueError for a name no file can have.

    Of a feature in a packed directory, the size that it has there.
    """
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        packed = find_packed(path)
        if packed is None:
            raise
        return packed.size(os.path.realpath(path))


def current_directory() -> str | None:
    """The current directory; None if it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def is_same_file(one: Any, other: str) -> bool:
    """Whether two paths are spellings of one file; False for what is not a path."""
    try:
        return str(os.path.realpath(one)) == os.path.realpath(other)
    except (OSError, TypeError, ValueError):
        return False
