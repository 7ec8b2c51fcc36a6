"""AnyFiles: local files, and objects that are named by URLs, as one source."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.formats import alike
from gpucache_pipes.files.local import LocalFiles
from gpucache_pipes.files.packed.packed_group import PackedGroup
from gpucache_pipes.files.remote.remote_files import RemoteFiles
from gpucache_pipes.files.remote.urls import is_url, local_path
from gpucache_pipes.files.source import OpenFeature, Progress, VersionedFeature

_Reader = LocalFiles | RemoteFiles


class AnyFiles:
    """A `Source` of all paths: URLs go to RemoteFiles, and others to LocalFiles.

    What is done for many files at once is done for the first of them that are of one kind.

    Args:
        load_fn: see LocalFiles. It gets URLs as well, so that nothing goes to RemoteFiles.
        weights_only, keys, dtype: see LocalFiles.
        storage_options: see RemoteFiles.
    """

    def __init__(
        self,
        load_fn: Callable[[str], Any] | None = None,
        weights_only: bool = True,
        keys: Any = None,
        dtype: Any = None,
        storage_options: Any = None,
    ) -> None:
        self._local = LocalFiles(load_fn, weights_only, keys, dtype)
        self._remote = RemoteFiles(storage_options, weights_only, keys, dtype)
        self._has_load_fn = load_fn is not None

    def _is_remote(self, path: str) -> bool:
        # Most paths are told apart by one look for a string.
        return "://" in path and not self._has_load_fn and is_url(path)

    def _of(self, path: str) -> _Reader:
        return self._remote if self._is_remote(path) else self._local

    def _first(self, keys: Sequence[str]) -> tuple[_Reader, int]:
        """What reads the first of these files, and how many of those after it."""
        return self._of(keys[0]), alike(map(self._is_remote, keys))

    def end(self) -> None:
        """The store that has made it is closed."""
        self._remote.end()

    # Identity

    def absolute(self, path: str, cwd: str) -> str:
        """See Source."""
        if "://" in path and not self._has_load_fn:
            path = local_path(path)
        return self._of(path).absolute(path, cwd)

    def key(self, path: str) -> str:
        """See Source."""
        return self._of(path).key(path)

    def are_keys(self, directory: str, names_end: str, files: int) -> bool:
        """See Source."""
        if "://" in directory and not self._has_load_fn and not is_url(directory + "/"):
            return False
        return self._of(directory).are_keys(directory, names_end, files)

    def is_link(self, path: str) -> bool:
        """See Source."""
        return self._of(path).is_link(path)

    # Contents

    def open(self, key: str, path: str) -> OpenFeature:
        """See Source."""
        return self._of(key).open(key, path)

    def probe(self, path: str) -> tuple[OpenFeature, str | None]:
        """The feature, and why `torch.load` read it, or None. Raises as `open` does."""
        return self._of(path).probe(path)

    def open_many(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> "list[VersionedFeature | None]":
        """See Source."""
        source, count = self._first(keys)
        return source.open_many(keys[:count], paths[:count], progress)

    def open_group(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> PackedGroup | None:
        """See Source."""
        source, count = self._first(keys)
        if isinstance(source, RemoteFiles):
            return None
        return source.open_group(keys[:count], paths[:count], progress)

    # Versions and sizes

    def version(self, key: str) -> bytes | None:
        """See Source."""
        return self._of(key).version(key)

    def is_current(self, path: str, version: bytes | None) -> bool:
        """See Source."""
        return self._of(path).is_current(path, version)

    @property
    def fingerprint(self) -> str | None:
        """See Source."""
        return self._local.fingerprint

    def tell_versions(self, keys: Sequence[str]) -> list[bool]:
        """See Source."""
        return [self._is_remote(key) for key in keys]

    def file_versions(self, keys: Sequence[str], progress: Progress) -> npt.NDArray[np.int64]:
        """See Source."""
        source, count = self._first(keys) if keys else (self._local, 0)
        if count == len(keys):
            return source.file_versions(keys, progress)
        found = np.full((len(keys), 2), -1, np.int64)
        begin = 0
        while begin < len(keys):
            source, count = self._first(keys[begin:])
            progress.enter(range(begin, begin + count))
            versions = source.file_versions(keys[begin : begin + count], progress)
            found[begin : begin + len(versions)] = versions
            begin += len(versions)
            if len(versions) < count:
                break
        return found[:begin]

    def size(self, path: str) -> int:
        """See Source."""
        return self._of(path).size(path)

    def sample_sizes(self, paths: Sequence[str]) -> list[int]:
        """See Source."""
        if not paths:
            return []
        source, count = self._first(paths)
        return source.sample_sizes(paths[:count])
