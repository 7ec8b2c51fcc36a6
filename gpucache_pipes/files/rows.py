"""RowFiles: a source of samples that lie many to a file."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.formats import FileOpener
from gpucache_pipes.files.listing import find_files
from gpucache_pipes.files.local import LocalFiles, file_size
from gpucache_pipes.files.planned import PlannedFeature
from gpucache_pipes.files.remote.urls import is_url
from gpucache_pipes.files.row_plans import RowPlans
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import OpenFeature, Progress, VersionedFeature
from gpucache_pipes.files.versions import is_racy, version_of

_MAX_COST = 256 << 20
"""Host bytes for what is remembered of files."""

_SAMPLED = 64
_DIGITS = 18
_LOCAL = "RowFiles reads local files, not {!r}: copy them, or save one object for each sample"


class RowFiles:
    """A `Source` of samples that lie many to a file: rows of tensors, or the items of a list.

        rows = RowFiles()
        paths = rows.paths("shards/", pattern="*.npy")     # ["shards/0.npy#0", ...]
        loader = GPUCachedPathDataLoader(PathLister(paths, batch_size=256), source=rows)

    Sample 17 of a file is named by "file.pt#17". A file that holds a list has its items for
    samples. Of any other, sample n is row n of each tensor, by its first dimension, and item n of
    each list that has as many items as there are rows; numbers, strings and tensors without
    dimensions belong to each sample. Only the bytes of the sample are read. Formats are those of
    `LocalFiles`; files that torch.load would have to read, such as compressed ones, are errors.

    Args:
        keys, dtype: what is kept of each sample: see GPUFeatureStore.
    """

    def __init__(self, keys: Any = None, dtype: Any = None) -> None:
        self._files = LocalFiles()
        self._opener = FileOpener(weights_only=True)
        self._selection = Selection.of(keys, dtype)
        # By file, its version and its plans. Shared by threads without a lock: single operations
        # of a dict are atomic, and what is lost is made again. So the bound is approximate.
        self._known: dict[str, tuple[bytes, RowPlans]] = {}
        self._cost = 0

    def paths(self, files: Any, pattern: str = "*.pt", recursive: bool = False) -> list[str]:
        """The names of all samples of a directory, a glob, a file, or a sequence of files.

        Reads the header of each file. Raises as PathLister does, and ValueError for a file that
        has no rows.
        """
        if isinstance(files, str) and is_url(files):
            raise ValueError(_LOCAL.format(files))
        found = find_files(files, pattern, recursive)
        return [f"{file}#{number}" for file in found for number in range(self.count(file))]

    def count(self, file: str) -> int:
        """How many samples are in a file. Raises OSError, and ValueError for one without rows."""
        feature, plans = self._open(file)
        feature.close()
        return plans.count

    # Identity

    def absolute(self, path: str, cwd: str) -> str:
        """See Source."""
        return self._files.absolute(path, cwd)

    def key(self, path: str) -> str:
        """See Source."""
        file, number = _split(path)
        return self._files.key(path) if number is None else f"{self._files.key(file)}#{number}"

    def are_keys(self, directory: str, names_end: str, files: int) -> bool:
        """See Source."""
        odd = any(part in names_end for part in ("#0", "#+", "/#", "/.#", "/..#"))
        # "#0" alone is a sample; "#01" is another spelling of "#1".
        if odd and any(self.key(name) != name for name in names_end.split("\0") if name):
            return False
        return self._files.are_keys(directory, names_end, files)

    def is_link(self, path: str) -> bool:
        """See Source."""
        return self._files.is_link(_split(path)[0])

    # Contents

    def open(self, key: str, path: str) -> OpenFeature:
        """See Source. Raises ValueError for a path that names no sample of its file."""
        file, number = _split(key)
        if is_url(file):
            raise ValueError(_LOCAL.format(file))
        if number is None:
            raise ValueError(
                f"{path!r} names no sample: RowFiles takes the path of a file, '#' and a position, "
                "as in 'file.pt#17'"
            )
        try:
            feature, plans = self._open(file)
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, error.strerror, path) from error
        try:
            if number >= plans.count:
                raise ValueError(f"{file!r} has {plans.count} samples: there is no #{number}")
            feature.follow(plans.plan(number), b"")
        except BaseException:
            feature.close()
            raise
        return feature

    def _open(self, file: str) -> tuple[PlannedFeature, RowPlans]:
        """A file, and the plans of its samples."""
        known = self._known.get(file)
        if known is not None:
            feature = PlannedFeature(file)
            try:
                if version_of(os.fstat(feature.fd)) == known[0]:
                    return feature, known[1]
            except BaseException:
                feature.close()
                raise
            feature.close()
        feature = self._opener.open_planned(file)
        try:
            status = os.fstat(feature.fd)
            version = version_of(status)
            try:
                plans = RowPlans(feature.plan, self._selection)
            except ValueError as error:
                raise ValueError(f"{file!r} cannot be read by rows: {error}") from error
            if not is_racy(status):
                if self._cost + plans.cost > _MAX_COST:
                    self._known, self._cost = {}, 0
                self._known[file] = version, plans
                self._cost += plans.cost
        except BaseException:
            feature.close()
            raise
        return feature, plans

    def open_many(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> "list[VersionedFeature | None]":
        """See Source. Samples are opened one by one."""
        return []

    def version(self, key: str) -> bytes | None:
        """See Source. That of the file."""
        return self._files.version(_split(key)[0])

    @property
    def fingerprint(self) -> str | None:
        """See Source."""
        return "rows" + ("" if self._selection is None else self._selection.text)

    def tell_versions(self, keys: Sequence[str]) -> list[bool]:
        """See Source."""
        return [False] * len(keys)

    def file_versions(self, keys: Sequence[str], progress: Progress) -> npt.NDArray[np.int64]:
        """See Source. Those of the files that the samples are in."""
        return self._files.file_versions([_split(key)[0] for key in keys], progress)

    def is_current(self, path: str, version: bytes | None) -> bool:
        """See Source."""
        return self._files.is_current(_split(path)[0], version)

    def size(self, path: str) -> int:
        """See Source. That of the file, divided by its samples."""
        file, _ = _split(path)
        return math.ceil(file_size(file) / max(1, self.count(file)))

    def sample_sizes(self, paths: Sequence[str]) -> list[int]:
        """See Source."""
        sizes = []
        for path in paths[:: max(1, len(paths) // _SAMPLED)]:
            try:
                sizes.append(self.size(path))
            except (OSError, ValueError):
                continue
        return sizes


def _split(path: str) -> tuple[str, int | None]:
    """A file and the position of a sample in it; None where a path has no position.

    >>> _split("a#b.pt#17"), _split("a#b.pt")
    (('a#b.pt', 17), ('a#b.pt', None))
    """
    file, mark, number = path.rpartition("#")
    if not mark or not (number.isascii() and number.isdigit()) or len(number) > _DIGITS:
        return path, None
    return file, int(number)
