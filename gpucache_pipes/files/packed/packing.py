"""Packs a directory of feature files into a directory of few large files."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import secrets
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpucache_pipes.files.listing import list_files
from gpucache_pipes.files.local import LocalFiles
from gpucache_pipes.files.packed.codec import encode_values
from gpucache_pipes.files.packed.packed_directory import (
    FORMAT,
    MARKER,
    PackedDirectory,
    forget_packed,
    read_marker,
)
from gpucache_pipes.files.packed.records import Named, Packable, read_records
from gpucache_pipes.files.packed.segment import DamagedSegmentError, Segment, name_hashes
from gpucache_pipes.files.packed.segment_writer import Records, SegmentWriter, sync_directory
from gpucache_pipes.files.remote.urls import is_url
from gpucache_pipes.files.source import Progress

_SEGMENT_BYTES = 1 << 30
_CHUNK_FILES = 256
_CHUNK_BYTES = 16 << 20
_READERS = 8
_SEGMENT = re.compile(r"packed([0-9]{5,})\.safetensors", re.ASCII)
_PART = re.compile(r"packed-[0-9a-f]{8}\.part")


class PackReport(NamedTuple):
    """What `pack` has done.

    Attributes:
        files: in the packed directory.
        read: those that were read now; the others were there.
        segments: the files that hold them.
        nbytes: their size.
        failed: the errors of files that could not be packed, by path. The directory is not
            complete then.
    """

    files: int
    read: int
    segments: int
    nbytes: int
    failed: dict[str, BaseException]


class _Job(NamedTuple):
    """What threads need to read files."""

    source: LocalFiles
    root: str
    packable: Packable

    def read(self, names: Sequence[str]) -> tuple[list[Records], dict[int, BaseException]]:
        """The records of these files, and the errors of others by position."""
        keys = [self.source.key(os.path.join(self.root, name)) for name in names]
        versions = self.source.file_versions(keys, Progress())
        named = Named(list(names), name_hashes(names), versions)
        groups, failed = read_records(self.source, keys, named, self.packable)
        # What was read of a file that changes meanwhile may be neither the one nor the other.
        now = self.source.file_versions(keys, Progress())
        for n in np.flatnonzero((now != versions).any(axis=1)).tolist():
            failed.setdefault(n, OSError("it has changed while it was read"))
        return groups, failed


def pack(
    source: str,
    target: str,
    *,
    pattern: str = "*.pt",
    recursive: bool = False,
    keys: Any = None,
    dtype: Any = None,
    weights_only: bool = True,
    readers: int = _READERS,
    segment_bytes: int = _SEGMENT_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackReport:
    """Pack the features of a directory. May be interrupted, and called again: it goes on then.

    Files that were packed before, and have the same size and modification time, are not read
    again. `source` may be a packed directory, too.

    Args:
        source: the directory.
        target: the directory that is made of it; a path that is not there, or where files were
            packed before.
        pattern: which files of `source`, as for PathLister.
        recursive: look into subdirectories too.
        keys: what is kept of each feature: see GPUFeatureStore.
        dtype: likewise.
        weights_only: as in `torch.load`.
        readers: how many threads read.
        segment_bytes: the size at which a file of `target` is full.
        progress: called with how many files are packed, and how many there are.

    Raises:
        FileNotFoundError: `source` has no files.
        ValueError: `target` holds something else, or was packed with other `keys` or `dtype`.
        OSError: `target` cannot be written.
    """
    _require_apart(source, target)
    found = list_files(source, pattern, recursive)
    names = [os.path.relpath(path, source) for path in found]
    job = _Job(LocalFiles(None, weights_only, keys, dtype), os.path.realpath(source), Packable())
    os.makedirs(target, exist_ok=True)
    about = {"format": FORMAT, "keys": repr(keys), "dtype": repr(dtype)}
    with _lock(target):
        kept = _begin(target, about, names, job)
        there = {name for _, held in kept for name in held}
        wanted = [name for name in names if name not in there]
        segments = [segment for segment, _ in kept]
        progress(len(there), len(names))
        failed: dict[str, BaseException] = {}
        writer: SegmentWriter | None = None
        done = len(there)
        try:
            for chunk, (groups, errors) in _read(job, wanted, readers):
                failed.update((os.path.join(source, chunk[n]), e) for n, e in errors.items())
                for records in groups:
                    if writer is not None and writer.nbytes + len(records.data) > segment_bytes:
                        segments.append(_finish(writer, target))
                        writer = None
                    if len(records.names):
                        writer = writer or SegmentWriter(os.path.join(target, _part()))
                        writer.append(records)
                done += len(chunk)
                progress(done, len(names))
            if writer is not None:
                segments.append(_finish(writer, target))
                writer = None
        finally:
            if writer is not None:
                # What was read is kept, also when there was an interrupt.
                try:
                    _finish(writer, target)
                except OSError:
                    writer.abandon()
        _write_marker(target, {**about, "segments": segments, "complete": not failed})
        forget_packed(target)
    sizes = [os.stat(os.path.join(target, name)).st_size for name in segments]
    return PackReport(len(names), len(wanted), len(segments), sum(sizes), failed)


def _require_apart(source: str, target: str) -> None:
    """Raise ValueError unless `target` is another directory, and neither is in the other."""
    if is_url(source):
        raise ValueError(f"pack reads local files, not {source!r}: disk_cache= packs objects")
    if not os.path.exists(source):
        raise FileNotFoundError(f"no such directory: {source!r}")
    if not os.path.isdir(source):
        raise ValueError(f"{source!r} is not a directory: pack takes a directory, and a pattern")
    one, other = os.path.realpath(source), os.path.realpath(target)
    if os.path.commonpath([one, other]) in (one, other):
        raise ValueError(f"{target!r} and {source!r} are one in the other: give a path elsewhere")


def _begin(
    target: str, about: dict[str, Any], names: Sequence[str], job: _Job
) -> list[tuple[str, list[str]]]:
    """The segments that are there and hold nothing but what is to be packed, with their names.

    Removes the others, and what was left unfinished.
    """
    if os.path.exists(os.path.join(target, MARKER)):
        before = read_marker(target)
        for option in ("keys", "dtype"):
            if before[option] != about[option]:
                raise ValueError(
                    f"{target!r} was packed with {option}={before[option]}, not {about[option]}: "
                    "give another directory"
                )
    elif others := os.listdir(target):
        raise ValueError(
            f"{target!r} holds {min(others)!r}: give a directory that is empty or not there"
        )
    for name in os.listdir(target):
        if _PART.fullmatch(name):
            os.unlink(os.path.join(target, name))
    _write_marker(target, {**about, "segments": [], "complete": False})
    wanted = set(names)
    seen: set[str] = set()
    kept = []
    for name in sorted(filter(_is_ours, os.listdir(target))):
        path = os.path.join(target, name)
        try:
            segment = Segment(path, with_names=True)
            held = segment.names()
            keys = [job.source.key(os.path.join(job.root, one)) for one in held]
            now = job.source.file_versions(keys, Progress())
            same = bool((now == segment.versions).all() and (now[:, 1] >= 0).all())
            if same and wanted.issuperset(held) and seen.isdisjoint(held):
                kept.append((name, held))
                seen.update(held)
                continue
        except DamagedSegmentError:
            pass
        os.unlink(path)
    return kept


def _read(
    job: _Job, names: Sequence[str], readers: int
) -> Iterator[tuple[Sequence[str], tuple[list[Records], dict[int, BaseException]]]]:
    """Read files in threads, a chunk at a time; chunks in order."""
    sizes = job.source.sample_sizes([os.path.join(job.root, name) for name in names])
    mean = sum(sizes) / max(1, len(sizes))
    files = max(1, min(_CHUNK_FILES, int(_CHUNK_BYTES / max(mean, 1.0))))
    chunks = (names[at : at + files] for at in range(0, len(names), files))
    pending: deque[tuple[Sequence[str], Future[Any]]] = deque()
    with ThreadPoolExecutor(readers, "gpucache-pack") as pool:
        try:
            for chunk in itertools.islice(chunks, 2 * readers):
                pending.append((chunk, pool.submit(job.read, chunk)))
            while pending:
                chunk, future = pending.popleft()
                yield chunk, future.result()
                for more in itertools.islice(chunks, 1):
                    pending.append((more, pool.submit(job.read, more)))
        finally:
            for _, future in pending:
                future.cancel()


def verify(
    source: str | None,
    target: str,
    *,
    keys: Any = None,
    dtype: Any = None,
    weights_only: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Read a packed directory, and compare it with the files that it was made of.

    Args:
        source: the directory of these files; None compares with nothing, and only looks at
            checksums.
        target: the packed directory.
        keys: as it was packed with.
        dtype: likewise.
        weights_only: as in `torch.load`.
        progress: see `pack`.

    Returns:
        What is wrong with features, by their names; empty if nothing is.

    Raises:
        ValueError, OSError: `target` cannot be read at all.
    """
    directory = PackedDirectory(os.path.realpath(target))
    job = None
    if source is not None:
        files = LocalFiles(None, weights_only, keys, dtype)
        job = _Job(files, os.path.realpath(source), Packable())
    wrong: dict[str, str] = {}
    done = 0
    for segment in directory.index.segments:
        names = Segment(segment.path, with_names=True).names()
        with Path(segment.path).open("rb", buffering=0) as file:
            for at in range(0, len(names), _CHUNK_FILES):
                chunk = names[at : at + _CHUNK_FILES]
                records = [segment.record(row) for row in range(at, at + len(chunk))]
                for name, record in zip(chunk, records, strict=True):
                    data = os.pread(file.fileno(), record.nbytes, record.start)
                    if len(data) != record.nbytes or zlib.crc32(data) != record.checksum:
                        wrong[name] = "its record is damaged"
                if job is not None:
                    wrong.update(_differences(job, chunk, records))
                done += len(chunk)
                progress(done, len(directory.index))
    return wrong


def _differences(job: _Job, names: Sequence[str], records: Sequence[Any]) -> dict[str, str]:
    """How files differ from their records."""
    groups, errors = job.read(names)
    wrong = {names[n]: f"its file cannot be read: {error}" for n, error in errors.items()}
    packed = dict(zip(names, records, strict=True))
    for group in groups:
        checksums = group.checksums().tolist()
        for name, layout, values, checksum in zip(
            group.names, group.layouts, group.values, checksums, strict=True
        ):
            record = packed[name]
            same = layout is record.layout and checksum == record.checksum
            if not same or values != encode_values(record.values):
                wrong[name] = "its file holds something else"
    return wrong


def _part() -> str:
    return f"packed-{secrets.token_hex(4)}.part"


def _finish(writer: SegmentWriter, target: str) -> str:
    """Complete a segment; its name."""
    taken = [int(found[1]) for name in os.listdir(target) if (found := _SEGMENT.fullmatch(name))]
    name = f"packed{max(taken, default=-1) + 1:05d}.safetensors"
    writer.finish(os.path.join(target, name))
    return name


def _is_ours(name: str) -> bool:
    return _SEGMENT.fullmatch(name) is not None


def _write_marker(target: str, about: dict[str, Any]) -> None:
    temporary = os.path.join(target, _part())
    with Path(temporary).open("x", encoding="utf-8") as file:
        json.dump(about, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, os.path.join(target, MARKER))
    sync_directory(target)


@contextlib.contextmanager
def _lock(target: str) -> Iterator[None]:
    """Let one process at a time write to the directory.

    Raises BlockingIOError if another process is writing.
    """
    fd = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is packing into {target!r}") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(fd)
