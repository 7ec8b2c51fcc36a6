"""A directory that `pack` has made: its features have the paths that they had as files."""

import errno
import fnmatch
import glob
import json
import os
import re
import struct
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.packed.index import Index
from gpucache_pipes.files.packed.packed_features import PackedFeatures
from gpucache_pipes.files.packed.packed_group import PackedGroup
from gpucache_pipes.files.packed.segment import DamagedSegmentError, Segment, name_hashes
from gpucache_pipes.files.packed.segment_files import SegmentFiles
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import OpenFeature, Progress, VersionedFeature
from gpucache_pipes.files.versions import version_of

MARKER = "gpucache-pack.json"
_LOOK_SECONDS = 1.0
FORMAT = 1


class PackedDirectory:
    """The features of a packed directory. For any number of threads.

    Args:
        root: the directory.

    Attributes:
        root: the directory, as its files' keys begin.
        about: what the marker says.
        index: over all segments.
        files: the open segments.
        looked: when it was last compared with the disk.

    Raises:
        ValueError: it is not complete, or of a later version, or a segment is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        marker = os.path.join(root, MARKER)
        self.version = version_of(os.stat(marker))
        self.about = read_marker(root)
        if not self.about["complete"]:
            raise ValueError(
                f"{root!r} is not packed completely: run `gpucache-pipes pack` again, which goes "
                "on where it was interrupted"
            )
        self.looked = time.monotonic()
        self.files = SegmentFiles()
        segments = []
        for name in self.about["segments"]:
            try:
                segments.append(Segment(os.path.join(root, name)))
            except DamagedSegmentError as error:
                raise ValueError(f"{os.path.join(root, name)!r} is damaged: {error}") from error
        self.index = Index(segments)
        self._names: list[str] | None = None

    def is_current(self) -> bool:
        """Whether the directory is still the one that was opened. Raises nothing."""
        try:
            return version_of(os.stat(os.path.join(self.root, MARKER))) == self.version
        except OSError:
            return False

    def names(self) -> list[str]:
        """The names of all features, relative to the directory, sorted."""
        if self._names is None:
            found: list[str] = []
            for segment in self.index.segments:
                found += Segment(segment.path, with_names=True).names()
            self._names = sorted(found)
        return self._names

    def positions(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """The positions of features in the index; -1 for those that there are not.

        Also for those that are not in this directory.
        """
        inside = self.root + "/"
        cut = len(inside)
        names = [key[cut:].lstrip("/") for key in keys if key.startswith(inside)]
        found = self.index.find(name_hashes(names))
        if len(names) == len(keys):
            return found
        positions = np.full(len(keys), -1, np.int64)
        positions[[key.startswith(inside) for key in keys]] = found
        return positions

    def position(self, key: str) -> int:
        """The position of one feature. Raises FileNotFoundError."""
        [position] = self.positions([key]).tolist()
        if position < 0:
            text = f"the packed directory {self.root!r} has no such file"
            raise FileNotFoundError(errno.ENOENT, text, key)
        return int(position)

    def stored_version(self, position: int) -> bytes:
        """A value that changes when the feature or the directory does."""
        return self.version + struct.pack("=qq", *self.index.versions[position].tolist())

    def size(self, key: str) -> int:
        """The bytes of a feature. Raises FileNotFoundError."""
        return self.index.record(self.position(key))[1].layout.span


_NoJSON = json.JSONDecodeError
_known: dict[str, PackedDirectory] = {}
"""By root. Their tables are large, and shared by all stores of the process."""


def open_packed(root: str) -> PackedDirectory:
    """The packed directory at this path, without links. Raises as PackedDirectory."""
    known = _known.get(root)
    if known is None or not known.is_current():
        known = _known[root] = PackedDirectory(root)
    return known


def forget_packed(root: str) -> None:
    """A directory has changed: look at it again."""
    _known.pop(os.path.realpath(root), None)


def is_packed(directory: str) -> bool:
    """Whether a directory has the marker. Raises nothing."""
    return os.path.isfile(os.path.join(directory, MARKER))


def is_packed_file(path: str) -> bool:
    """Whether a path names a feature of a packed directory. Raises nothing."""
    try:
        directory = find_packed(path)
        return directory is not None and directory.positions([os.path.realpath(path)])[0] >= 0
    except (OSError, ValueError):
        return False


def read_marker(root: str) -> dict[str, Any]:
    """What the marker of a directory says. Raises OSError, ValueError."""
    try:
        with Path(root, MARKER).open(encoding="utf-8") as file:
            about = json.load(file)
        if about["format"] != FORMAT:
            raise ValueError(f"{root!r} was packed by a later version of this package")
        names = about["segments"]
        if not all(type(name) is str and os.path.basename(name) == name for name in names):
            raise TypeError("a segment is not in the directory")
        about = {**about, "keys": about["keys"], "dtype": about["dtype"]}
        return {**about, "complete": bool(about["complete"])}
    except (LookupError, TypeError, UnicodeDecodeError, RecursionError, _NoJSON) as error:
        raise ValueError(f"{os.path.join(root, MARKER)!r} cannot be read: {error}") from error


def packed_names(root: str, pattern: str, recursive: bool) -> list[str]:
    """The names in a packed directory that match, as `list_files` would find them as files."""
    names = open_packed(os.path.realpath(root)).names()
    end = pattern.removeprefix("*")
    if end == pattern or not end or end != glob.escape(end) or "/" in end:
        fits = re.compile(fnmatch.translate(pattern)).match
        names = [name for name in names if fits(name.rpartition("/")[2])]
    else:  # such as "*.pt"
        names = [name for name in names if name.endswith(end)]
    if not recursive:
        names = [name for name in names if "/" not in name]
    if pattern.startswith("."):
        return names
    return [name for name in names if name[name.rfind("/") + 1] != "."]


def known_packed(key: str) -> PackedDirectory | None:
    """The packed directory that a path is in, if it was met before. Raises nothing.

    Directories are met when they are listed, or when a file is looked for that there is not, so
    ordinary paths cost nothing.
    """
    for root, directory in list(_known.items()) if _known else ():
        if key.startswith(root) and key[len(root) : len(root) + 1] == "/":
            if time.monotonic() - directory.looked > _LOOK_SECONDS:
                directory.looked = time.monotonic()
                if not directory.is_current():
                    _known.pop(root, None)
                    return None
            return directory
    return None


def find_packed(key: str) -> PackedDirectory | None:
    """The packed directory that a path is in, as it is now. Raises as PackedDirectory."""
    known = known_packed(key)
    if known is not None and known.is_current():
        return known
    directory = os.path.dirname(os.path.realpath(key))
    while not is_packed(directory):
        above = os.path.dirname(directory)
        if above == directory or os.path.isdir(directory):
            return None
        directory = above
    return open_packed(directory)


class PackedPaths:
    """Opens features by their paths in packed directories. For any number of threads.

    Args:
        selection: what is kept of each feature.
    """

    def __init__(self, selection: Selection | None) -> None:
        self._selection = selection
        self._opened: dict[PackedDirectory, PackedFeatures] = {}
        for directory in list(_known.values()):
            directory.looked = 0.0  # look again, for a new store

    def _features(self, directory: PackedDirectory) -> PackedFeatures:
        features = self._opened.get(directory)
        if features is None:
            features = PackedFeatures(directory.files, self._selection)
            self._opened[directory] = features
        return features

    def open(self, directory: PackedDirectory, key: str) -> OpenFeature:
        """Open one feature. Raises OSError, ValueError."""
        position = directory.position(key)
        version = partial(directory.stored_version, position)
        try:
            return self._features(directory).open(
                directory.index, position, version, partial(_damaged, key)
            )
        except DamagedSegmentError:
            _damaged(key)

    def open_many(
        self, directory: PackedDirectory, keys: Sequence[str], progress: Progress
    ) -> "list[VersionedFeature | None]":
        """Open the first of these features, all of one directory. None is left to `open`."""
        positions = directory.positions(keys)
        there = np.flatnonzero(positions >= 0)
        of = positions[there]
        numbers = there.tolist()
        found = self._features(directory).open_many(
            directory.index, of, lambda n: directory.stored_version(int(of[n])),
            lambda n: _damaged(keys[numbers[n]]), progress, numbers,
        )  # fmt: skip
        end = numbers[len(found)] if len(found) < len(numbers) else len(keys)
        features: list[VersionedFeature | None] = [None] * end
        for n, feature in zip(numbers, found, strict=False):
            features[n] = feature
        return features

    def open_group(self, directory: PackedDirectory, keys: Sequence[str]) -> PackedGroup | None:
        """Those of these features that are in a directory; None if a selection is made of them."""
        if self._selection is not None:
            return None
        positions = directory.positions(keys)
        there = np.flatnonzero(positions >= 0)
        where = dict(zip(there.tolist(), positions[there].tolist(), strict=True))
        return PackedGroup(
            directory.index, directory.files, positions[there], there.tolist(),
            lambda n: directory.stored_version(where[n]), lambda n: None,
        )  # fmt: skip


def _damaged(key: str) -> NoReturn:
    raise OSError(
        f"{key!r}: its packed record is damaged; pack it again, or copy the packed directory anew"
    )
