"""DiskCache: a source over another one, which keeps what was read on a local disk."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.packed.checks import FileChecks
from gpucache_pipes.files.packed.codec import UnpackableError
from gpucache_pipes.files.packed.disk_directory import DiskDirectory
from gpucache_pipes.files.packed.index import STALE, Index
from gpucache_pipes.files.packed.packed_features import PackedFeatures
from gpucache_pipes.files.packed.packed_group import PackedGroup
from gpucache_pipes.files.packed.packer import Packer
from gpucache_pipes.files.packed.records import Named, Packable, copy_records
from gpucache_pipes.files.packed.segment import DamagedSegmentError, name_hashes, record_bytes
from gpucache_pipes.files.packed.segment_files import SegmentFiles
from gpucache_pipes.files.packed.segment_writer import TABLE_BYTES
from gpucache_pipes.files.source import OpenFeature, Progress, Source, VersionedFeature

_log = logging.getLogger("gpucache_pipes")

_UNKNOWN = (-1, -1)


class DiskCache:
    """A `Source` that answers from packed segments, and has packed what it lacks.

    It asks the source below for identities and versions of files, and for the features that are
    not in a segment. What was read is copied and written in the background: see `Packer`.

    Args:
        below: where features come from. Its `file_versions` says when files change.
        directory: where segments are.
        check: whether a file is compared with the one that was packed before its first use: "stat"
            looks at each file, "listing" only whether its directory still lists it, "never" not.
        prefix: tells features apart that are made in other ways of the same files.
        always: check files before each use.

    Attributes:
        hits: features that came from segments.
        unpackable: features that cannot be packed.
    """

    def __init__(
        self,
        below: Source,
        directory: DiskDirectory,
        check: str = "stat",
        prefix: str = "",
        always: bool = False,
    ) -> None:
        self._below = below
        self._directory = directory
        self._check = check
        self._checks = FileChecks(below, check, always)
        self._prefix = prefix
        self._files = SegmentFiles(directory.used)
        self._features = PackedFeatures(self._files)
        self._packable = Packable()
        self._packer = Packer(directory, self._files)
        # The versions of files that this thread has opened below, by key.
        self._opened = threading.local()
        self._counting = threading.RLock()  # a signal handler may read in the midst of it
        self._expected: dict[object, int] = {}  # files, by pipeline
        self.hits = 0
        self.unpackable = 0
        # Identity is the business of the source below.
        self.absolute: Callable[[str, str], str] = below.absolute
        self.key: Callable[[str], str] = below.key
        self.are_keys: Callable[[str, str, int], bool] = below.are_keys
        self.is_link: Callable[[str], bool] = below.is_link
        self.version: Callable[[str], bytes | None] = below.version
        self.is_current: Callable[[str, bytes | None], bool] = below.is_current
        self.size: Callable[[str], int] = below.size
        self.sample_sizes: Callable[[Sequence[str]], list[int]] = below.sample_sizes
        self._open_below: Any = getattr(below, "open_many", lambda *arguments: [])
        self._told = getattr(below, "tell_versions", None)

    def figures(self) -> dict[str, int]:
        """What it has done: see StoreStats."""
        return {
            "disk_hits": self.hits,
            "disk_written": self._packer.written,
            "disk_unpackable": self.unpackable,
            "disk_bytes": self._directory.nbytes,
        }

    def holds(self, keys: Sequence[str]) -> list[bool]:
        """Whether there are records of these files that may be used, as far as is known."""
        index = self._packer.index
        found = index.find(name_hashes(keys, self._prefix))
        if not len(index):
            return [False] * len(keys)
        usable: list[bool] = ((found >= 0) & (index.states[found] != STALE)).tolist()
        return usable

    @property
    def fingerprint(self) -> str | None:
        """See Source."""
        return self._prefix

    def tell_versions(self, keys: Sequence[str]) -> list[bool]:
        """See Source."""
        return [False] * len(keys)

    def file_versions(self, keys: Sequence[str], progress: Progress) -> npt.NDArray[np.int64]:
        """See Source."""
        return self._checks.versions(keys, progress, ())

    def forget_checks(self, keys: Sequence[str] | None = None) -> None:
        """Look at these files again before their next use; None is all."""
        index = None
        while index is not self._packer.index:  # it may be replaced meanwhile
            index = self._packer.index
            index.forget(None if keys is None else name_hashes(keys, self._prefix))

    # Opening

    def open(self, key: str, path: str) -> OpenFeature:
        """See Source."""
        if key in self._opened.__dict__.get("versions", ()):
            return self._below.open(key, path)  # `open_many` has just looked for it
        index = self._packer.index
        [position] = self._usable(index, [key], Progress()).tolist()
        if position >= 0:
            try:
                feature = self._features.open(
                    index, position, partial(self._version, index, position, key),
                    partial(self._again, key, path),
                )  # fmt: skip
            except (OSError, DamagedSegmentError):
                index.mark_stale(position)
                self._note([key])
            else:
                self._count(1)
                self._opened.__dict__.get("versions", {}).pop(key, None)
                return feature
        return self._below.open(key, path)

    def open_group(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> PackedGroup | None:
        """See Source. Those that are in segments."""
        index = self._packer.index
        self._opened.versions = {}
        if not len(index):
            return None
        positions = self._usable(index, keys, progress)
        numbers = np.flatnonzero(positions >= 0)
        if not len(numbers):
            return None
        where = dict(zip(numbers.tolist(), positions[numbers].tolist(), strict=True))
        group = PackedGroup(
            index, self._files, positions[numbers], numbers.tolist(),
            lambda n: self._version(index, where[n], keys[n]),
            lambda n: self._count(-1),
        )  # fmt: skip
        self._count(len(group))
        return group

    def open_many(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> "list[VersionedFeature | None]":
        """See Source. First those that are in segments, and then the others, in one go each."""
        known = self._opened.__dict__.get("versions", {})
        if known and not any(key in known for key in keys):  # of an earlier task
            self._opened.versions = {}
        index = self._packer.index
        positions = self._usable(index, keys, progress)
        end = len(positions)
        features: list[VersionedFeature | None] = [None] * end
        packed = np.flatnonzero(positions >= 0).tolist()
        others = np.flatnonzero(positions < 0).tolist()
        if packed:
            of = positions[packed]
            found = self._features.open_many(
                index, of,
                lambda n: self._version(index, int(of[n]), keys[packed[n]]),
                lambda n: self._again(keys[packed[n]], paths[packed[n]]),
                progress, packed,
            )  # fmt: skip
            for n, feature in zip(packed, found, strict=False):
                features[n] = feature
            end = packed[len(found)] if len(found) < len(packed) else end
        others = [n for n in others if n < end]
        if others:
            progress.enter(others)
            opened = self._open_below(
                [keys[n] for n in others], [paths[n] for n in others], progress
            )
            if opened:
                for n, feature in zip(others, opened, strict=False):
                    features[n] = feature
                end = others[len(opened)] if len(opened) < len(others) else end
            elif progress.stopped:
                end = others[0]
        packed_ones = sum(features[n] is not None for n in packed if n < end)
        self._count(packed_ones)
        return features[:end] if any(features[:end]) else []

    def _again(self, key: str, path: str) -> OpenFeature:
        """Open a feature below whose record has turned out to be damaged."""
        self._count(-1)
        self._note([key])
        return self._below.open(key, path)

    def _usable(
        self, index: Index, keys: Sequence[str], progress: Progress
    ) -> npt.NDArray[np.int64]:
        """The positions of the records to use for files, -1 for none, of the first of them.

        Looks at files that were not looked at before, and notes the versions of the others.
        """
        positions = index.find(name_hashes(keys, self._prefix))
        if not len(index):
            positions[:] = -1
            self._note(keys, progress)
            return positions
        positions = self._checks.usable(index, positions, keys, progress)
        missing = np.flatnonzero(positions < 0).tolist()
        if missing:
            self._note([keys[n] for n in missing], progress, missing)
        return positions

    def _note(
        self, keys: Sequence[str], progress: Progress | None = None, numbers: Sequence[int] = ()
    ) -> None:
        """Remember the versions of files that are about to be opened below, and do not tell."""
        if self._packer.takes:
            if self._told is not None and any(told := self._told(keys)):
                at = [n for n, is_told in enumerate(told) if not is_told]
                keys = [keys[n] for n in at]
                numbers = [numbers[n] for n in at] if numbers else at
            known = self._opened.__dict__.setdefault("versions", {})
            if known:
                at = [n for n, key in enumerate(keys) if key not in known]
                keys = [keys[n] for n in at]
                numbers = [numbers[n] for n in at] if numbers else at
            if not keys:
                return
            found = self._checks.versions(keys, progress or Progress(), numbers).tolist()
            versions = self._opened.__dict__.setdefault("versions", {})
            versions.update(zip(keys, map(tuple, found), strict=False))

    def _version(self, index: Index, position: int, key: str) -> bytes | None:
        """The version of a file as the source below has it, if it is the one that was packed."""
        version = self._below.version(key)
        if self._check != "stat":
            return version
        found = self._checks.versions([key], Progress(), ())
        return version if (found == index.versions[position]).all() else None

    def _count(self, hits: int) -> None:
        with self._counting:
            self.hits += hits

    # Keeping

    def keep(
        self,
        keys: Sequence[str],
        features: Sequence[OpenFeature],
        memory: memoryview | None,
        offsets: Sequence[int],
        buffers: Callable[[int], list[memoryview]],
        kept_above: Sequence[bool],
    ) -> None:
        """Have those of these features written that were opened below.

        All of them, if the budget has room for all files that pipelines have named; else those that
        no tier above keeps, so that the tiers together serve more.

        Called by the thread that opened them, after their bytes were read. They are copied.

        Args:
            keys: of the files.
            features: what was opened.
            memory: where the features are that are in one piece.
            offsets: where each begins in it, negative for the others.
            buffers: `buffers(n)` gives those of the n-th feature.
            kept_above: whether a tier above keeps each.
        """
        versions: dict[str, tuple[int, int]] = self._opened.__dict__.get("versions", {})
        if not self._packer.takes:
            return
        at: list[int] = []
        noted: list[tuple[int, int]] = []
        values: list[bytes] = []
        unpackable = 0
        for n, (key, feature) in enumerate(zip(keys, features, strict=True)):
            version = versions.pop(key, None) or getattr(feature, "file_version", None)
            if version is None or (version == _UNKNOWN and self._check != "never"):
                continue
            if kept_above[n] and self._is_scarce(feature):
                continue
            try:
                values.append(self._packable.values(feature))
            except UnpackableError as error:
                unpackable += 1
                if not self.unpackable:
                    _log.info("%r is not kept on the disk: %s", key, error)
                continue
            at.append(n)
            noted.append(version)
        if unpackable:
            with self._counting:
                self.unpackable += unpackable
        if at:
            names = [keys[n] for n in at]
            named = Named(names, name_hashes(names, self._prefix), np.array(noted, np.int64))
            self._packer.put(
                copy_records(
                    named, [features[n].layout for n in at], values, memory,
                    [offsets[n] for n in at], lambda n: buffers(at[n]),
                )
            )  # fmt: skip

    def expect_files(self, owner: object, count: int) -> None:
        """So many different files will be requested. A hint; takes no lock."""
        self._expected[owner] = count

    def _is_scarce(self, feature: OpenFeature) -> bool:
        """Whether the budget has no room for all files, if they are like this one."""
        files = max(sum(self._expected.values()), len(self._packer.index))
        return files * (record_bytes(feature.layout) + TABLE_BYTES) > self._directory.max_bytes

    def flush(self) -> None:
        """An epoch begins. Has the segment at hand completed, and finds those of others."""
        self._packer.flush()

    def wait(self, seconds: float) -> bool:
        """Wait until what was read is in segments, at most this long. Whether it is."""
        self._packer.flush()
        return self._packer.wait(seconds)

    def end(self) -> None:
        """Have the last segment completed in the background. Takes no lock."""
        self._packer.end()
        self._files.end()

    def close(self, seconds: float) -> None:
        """Complete the last segment, at most this long, and close all."""
        self._packer.end()
        self._packer.join(seconds)
        self._files.close()
