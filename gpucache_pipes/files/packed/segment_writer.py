"""Writes packed segments: each is complete under its name, or not there."""

import contextlib
import functools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.layout import Layout
from gpucache_pipes.files.packed.codec import LayoutKind, encode_kind
from gpucache_pipes.files.packed.segment import (
    DATA_START,
    DTYPES,
    FORMAT,
    TABLES,
    encoded_name,
    header,
)
from gpucache_pipes.files.safetensors import DTYPE_NAMES

TABLE_BYTES = 80
"""Of a record in the tables, with those of a layout of its own, but for its sizes and texts."""


class Records(NamedTuple):
    """Features in host memory, as they are written: see `records.py`.

    Attributes:
        names: of the files.
        hashes: of the names, uint64 [n, 2].
        versions: of the files, int64 [n, 2].
        layouts: of the features.
        values: their plain values, encoded.
        starts: where each begins in `data`.
        data: the records, end to end, uint8.
    """

    names: list[str]
    hashes: npt.NDArray[np.uint64]
    versions: npt.NDArray[np.int64]
    layouts: list[Layout]
    values: list[bytes]
    starts: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]

    def checksums(self) -> npt.NDArray[np.uint32]:
        """Of each record. Without the interpreter lock, for records of 5 KB and more."""
        ends = [*self.starts[1:].tolist(), len(self.data)]
        parts = zip(self.starts.tolist(), ends, strict=False)
        return np.array([zlib.crc32(self.data[begin:end].data) for begin, end in parts], np.uint32)

    @property
    def file_bytes(self) -> int:
        """The bytes that they take in a segment, at most."""
        texts = sum(len(encoded_name(name)) for name in self.names)
        texts += sum(map(len, self.values))
        layouts = {id(layout): layout for layout in self.layouts}.values()
        kinds = {id(layout.kind): layout for layout in layouts}.values()
        texts += sum(_kind_bytes(layout) for layout in kinds)
        sizes = sum(8 * len(leaf.shape) for layout in layouts for leaf in layout.leaves)
        return len(self.data) + texts + sizes + len(self.names) * TABLE_BYTES

    def only(self, kept: npt.NDArray[np.bool_]) -> "Records":
        """Those records that are marked."""
        if kept.all():
            return self
        at = np.flatnonzero(kept).tolist()
        ends = np.append(self.starts[1:], len(self.data))
        parts = [self.data[self.starts[n] : ends[n]] for n in at]
        sizes = [len(part) for part in parts]
        return Records(
            [self.names[n] for n in at], self.hashes[kept], self.versions[kept],
            [self.layouts[n] for n in at], [self.values[n] for n in at],
            np.cumsum([0, *sizes], dtype=np.int64)[:-1],
            np.concatenate(parts) if parts else np.empty(0, np.uint8),
        )  # fmt: skip


def joined_records(parts: Sequence[Records]) -> Records:
    """Several groups of records as one. There is at least one group."""
    if len(parts) == 1:
        return parts[0]
    begins = np.cumsum([0, *[len(part.data) for part in parts]])[:-1].tolist()
    return Records(
        [name for part in parts for name in part.names],
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.versions for part in parts]),
        [layout for part in parts for layout in part.layouts],
        [values for part in parts for values in part.values],
        np.concatenate([part.starts + at for part, at in zip(parts, begins, strict=True)]),
        np.concatenate([part.data for part in parts]),
    )


@functools.lru_cache(maxsize=256)
def _kind_bytes(layout: Layout) -> int:
    """The bytes of the kind of a layout in a segment, at most."""
    return len(json.dumps(encode_kind(LayoutKind.of(layout)))) + 4 * len(layout.leaves) + 2


class SegmentWriter:
    """A segment that is being written. Not for several threads at a time.

    Args:
        partial: the path of the file until it is complete. It must not be there.
        reserved: the size that the file shows until then, in bytes.

    Attributes:
        nbytes: of records so far.
        file_bytes: the size that the file will have, at most.
        files: how many.
        fd: the descriptor.

    Raises:
        OSError: it cannot be written. The caller calls `abandon`.
    """

    LEAST_BYTES = DATA_START + 1024
    """Of the header, and of a kind of layouts."""

    def __init__(self, partial: str, reserved: int = 0) -> None:
        self._partial = partial
        self.nbytes = 0
        self.file_bytes = self.LEAST_BYTES
        self.files = 0
        self._is_done = False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self.fd = os.open(partial, flags, 0o600)
        try:
            os.ftruncate(self.fd, reserved)
        except OSError:
            self.abandon()
            raise
        self._columns: dict[str, list[npt.NDArray[Any]]] = {}
        self._kinds: dict[LayoutKind, int] = {}
        self._encoded: list[Any] = []
        self._layouts: dict[Layout, int] = {}  # by identity: equal layouts are one object
        self._layout_kinds: list[int] = []
        self._sizes: list[int] = []
        self._size_ends: list[int] = []

    def append(self, records: Records) -> None:
        """Write records, the layouts of which `encode_kind` can encode."""
        numbers = [self._number(layout) for layout in records.layouts]
        _write_all(self.fd, records.data.data, DATA_START + self.nbytes)
        names = [encoded_name(name) for name in records.names]
        for name, part in (
            ("starts", records.starts + self.nbytes),
            ("hashes", records.hashes),
            ("versions", records.versions),
            ("layouts", np.array(numbers)),
            ("checksums", records.checksums()),
            ("name_ends", np.array([len(one) for one in names])),
            ("value_ends", np.array([len(one) for one in records.values])),
            ("names", np.frombuffer(b"".join(names), np.uint8)),
            ("values", np.frombuffer(b"".join(records.values), np.uint8)),
        ):
            self._columns.setdefault(name, []).append(part)
        self.nbytes += len(records.data)
        self.file_bytes += records.file_bytes
        self.files += len(names)

    def _number(self, layout: Layout) -> int:
        number = self._layouts.get(layout)
        if number is None:
            kind = LayoutKind.of(layout)
            if kind not in self._kinds:
                self._encoded.append(encode_kind(kind))
                self._kinds[kind] = len(self._kinds)
            for leaf in layout.leaves:
                self._sizes += leaf.shape
            self._size_ends.append(len(self._sizes))
            self._layout_kinds.append(self._kinds[kind])
            number = self._layouts[layout] = len(self._layouts)
        return number

    def finish(self, path: str) -> None:
        """Make the segment complete under its name, also after a crash of the machine."""
        tables = {}
        for name, (dtype, shape) in TABLES.items():
            parts = self._columns.get(name, [np.empty(0, dtype).reshape(0, *shape[1:])])
            tables[name] = np.concatenate(parts).astype(dtype).reshape(shape)
        for name in ("name_ends", "value_ends"):
            tables[name] = np.cumsum(tables[name], dtype="<i8")
        tables["sizes"] = np.array(self._sizes, "<i8")
        tables["size_ends"] = np.array(self._size_ends, "<i8")
        tables["layout_kinds"] = np.array(self._layout_kinds, "<i4")
        tables["kinds"] = np.frombuffer(json.dumps(self._encoded).encode(), np.uint8)
        rest = b"".join(tables[name].tobytes() for name in TABLES)
        entries = dict(self._described(tables))
        entries["__metadata__"] = {"format": FORMAT, "checksum": str(zlib.crc32(rest))}
        _write_all(self.fd, memoryview(rest), DATA_START + self.nbytes)
        os.ftruncate(self.fd, DATA_START + self.nbytes + len(rest))
        _write_all(self.fd, memoryview(header(entries)), 0)
        os.fsync(self.fd)
        os.close(self.fd)
        self.fd = -1
        os.rename(self._partial, path)
        self._is_done = True
        sync_directory(os.path.dirname(path))

    def _described(self, tables: dict[str, npt.NDArray[Any]]) -> Iterator[tuple[str, Any]]:
        """The entries of the header."""
        end = self.nbytes
        dtype, shape = self._data_shape()
        yield "data", {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
        for name, (kind, _) in TABLES.items():
            table = tables[name]
            begin, end = end, end + table.nbytes
            shape = list(table.shape)
            yield name, {"dtype": DTYPES[kind], "shape": shape, "data_offsets": [begin, end]}

    def _data_shape(self) -> tuple[str, list[int]]:
        """The dtype and the shape of `data`: see `segment.py`."""
        if len(self._layouts) == 1:
            [layout] = self._layouts
            if len(layout.leaves) == 1 and layout.nbytes * self.files == self.nbytes > 0:
                [leaf] = layout.leaves
                if leaf.dtype in DTYPE_NAMES:
                    return DTYPE_NAMES[leaf.dtype], [self.files, *leaf.shape]
        return "U8", [self.nbytes]

    def abandon(self) -> None:
        """Remove what was written. Raises nothing."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1
        if not self._is_done:
            with contextlib.suppress(OSError):
                os.unlink(self._partial)


def sync_directory(directory: str) -> None:
    """Have the names in a directory survive a crash of the machine."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: "memoryview[Any]", start: int) -> None:
    data = data.cast("B")
    while data:
        count = os.pwrite(fd, data, start)
        data, start = data[count:], start + count
