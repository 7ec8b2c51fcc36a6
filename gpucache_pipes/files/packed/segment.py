"""A packed segment: an immutable safetensors file that holds many features.

Its tensor `data` has the records of all features, end to end: the leaves of a feature as in its
layout, with zeros in between, filled up to a multiple of 16 bytes. The other tensors are tables
with a row for each record, or for each layout:

    starts [n]              first byte of the record in `data`
    checksums [n]           CRC-32 of the record
    hashes [n, 2]           of the name, see `name_hashes`
    versions [n, 2]         of the file it was made of: size in bytes, modification time in ns
    layouts [n]             row of the tables of layouts
    name_ends [n]           where its name ends in `names`, UTF-8
    value_ends [n]          where its plain values end in `values`, JSON
    layout_kinds [m]        position in `kinds`, JSON: tree, dtypes, ranks
    size_ends [m]           where the sizes of its dimensions end in `sizes`

Where all features are single tensors of one shape, `data` has their dtype and the shape [n, ...].
The format of the file: https://github.com/huggingface/safetensors#format
"""

import hashlib
import io
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.layout import ALIGNMENT, Layout
from gpucache_pipes.files.packed.codec import decode_kind, decode_values

FORMAT = "gpucache_pipes.segment.1"
"""Changes when older readers would misread a segment."""

DATA_START = 4096
"""Where `data` begins in the file: the header is filled up with spaces."""

TABLES: dict[str, tuple[str, tuple[int, ...]]] = {
    # Wide numbers first: each begins at a multiple of its size. [-1] is any number of rows.
    "starts": ("<i8", (-1,)),
    "hashes": ("<u8", (-1, 2)),
    "versions": ("<i8", (-1, 2)),
    "name_ends": ("<i8", (-1,)),
    "value_ends": ("<i8", (-1,)),
    "size_ends": ("<i8", (-1,)),
    "sizes": ("<i8", (-1,)),
    "checksums": ("<u4", (-1,)),
    "layouts": ("<i4", (-1,)),
    "layout_kinds": ("<i4", (-1,)),
    "kinds": ("|u1", (-1,)),
    "values": ("|u1", (-1,)),
    "names": ("|u1", (-1,)),
}
DTYPES = {"<i8": "I64", "<u8": "U64", "<u4": "U32", "<i4": "I32", "|u1": "U8"}
_OF_RECORDS = ("name_ends", "value_ends", "checksums", "layouts")
_MOST_HEADER = DATA_START - 8


class DamagedSegmentError(ValueError):
    """A file is not a whole segment of this format."""


class Record(NamedTuple):
    """Where a feature is in a segment.

    Attributes:
        start: its first byte in the file.
        nbytes: its size, gaps and filling included.
        checksum: of these bytes.
        layout: of the feature.
        values: its plain values.
    """

    start: int
    nbytes: int
    checksum: int
    layout: Layout
    values: tuple[Any, ...]


class Records(NamedTuple):
    """The same of several features, in columns.

    Attributes:
        starts: int64 [n].
        nbytes: int64 [n].
        checksums: uint32 [n].
        layouts: different layouts.
        which: which of them each feature has, int64 [n].
        values: the plain values of each feature; empty if none has any.
    """

    starts: npt.NDArray[np.int64]
    nbytes: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32]
    layouts: list[Layout]
    which: npt.NDArray[np.int64]
    values: list[tuple[Any, ...]]


def record_bytes(layout: Layout) -> int:
    """The size of the record of a feature."""
    return -(-layout.span // ALIGNMENT) * ALIGNMENT


def name_hashes(names: Iterable[str], prefix: str = "") -> npt.NDArray[np.uint64]:
    """BLAKE2b of `prefix` and each name: uint64 [n, 2].

    128 bits stand for the name: two of a million names are equal with a probability of 1e-27.
    """
    start = hashlib.blake2b(prefix.encode() + b"\0", digest_size=16)
    digests = []
    for name in names:
        one = start.copy()
        one.update(encoded_name(name))
        digests.append(one.digest())
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def encoded_name(name: str) -> bytes:
    """A name as bytes: as the system has it, if it can have it."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def header(entries: dict[str, Any]) -> bytes:
    """The first DATA_START bytes of a segment whose tensors these are."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    if len(text) > _MOST_HEADER:
        raise ValueError("a segment has too long a header")
    return struct.pack("<Q", _MOST_HEADER) + text.ljust(_MOST_HEADER)


class Segment:
    """The tables of a segment. The file is read once, and closed again.

    Args:
        path: of the segment.
        with_names: whether `names` can be called.

    Attributes:
        path: of the segment.
        identity: device, inode and size of the file.
        hashes: see above.
        versions: see above.
        stale: rows that must not be used: see Index.

    Raises:
        DamagedSegmentError: it is none, or not whole.
        OSError: it cannot be read.
    """

    def __init__(self, path: str, with_names: bool = False) -> None:
        self.path = path
        self.stale: set[int] = set()
        with io.FileIO(path, opener=open_quickly) as file:
            status = os.fstat(file.fileno())
            self.identity = status.st_dev, status.st_ino, status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise DamagedSegmentError("it is not a regular file")
            try:
                self._read(file, with_names)
            except DamagedSegmentError:
                raise
            except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
                    RecursionError, MemoryError, struct.error) as error:  # fmt: skip
                raise DamagedSegmentError(f"it cannot be read ({error!r:.200})") from error

    def _read(self, file: io.FileIO, with_names: bool) -> None:
        size = self.identity[2]
        data_bytes, places, checksum = _parse_header(file.read(DATA_START), size)
        start = DATA_START + data_bytes
        rest = bytearray(size - start)
        _read_all(file.fileno(), rest, start)
        if zlib.crc32(rest) != checksum:
            raise DamagedSegmentError("its tables have another checksum")
        tables = {}
        for name, (dtype, shape) in TABLES.items():
            begin, end = places[name]
            # A copy, but for `names`, which are then dropped with the rest.
            part = np.frombuffer(rest, dtype, (end - begin) // np.dtype(dtype).itemsize, begin)
            tables[name] = part.reshape(shape).copy()
        if not with_names:
            del tables["names"], tables["name_ends"]
        self._tables: dict[str, npt.NDArray[Any]] = tables
        self.hashes: npt.NDArray[np.uint64] = tables.pop("hashes")
        self.versions: npt.NDArray[np.int64] = tables.pop("versions")
        self._check(data_bytes)
        self._kinds = [decode_kind(kind) for kind in json.loads(tables.pop("kinds").tobytes())]
        self._layouts: dict[int, Layout] = {}  # of those that were asked for

    def _check(self, data_bytes: int) -> None:
        """Raise DamagedSegmentError unless the tables fit each other."""
        t = self._tables
        count = len(t["starts"])
        lengths = [len(self.hashes), len(self.versions)]
        lengths += [len(t[name]) for name in _OF_RECORDS if name in t]
        ends = [("value_ends", "values"), ("size_ends", "sizes")]
        ends += [("name_ends", "names")] if "names" in t else []
        sound = (
            all(length == count for length in lengths)
            and len(t["layout_kinds"]) == len(t["size_ends"])
            and _within(t["layouts"], len(t["layout_kinds"]))
            and _within(t["starts"], data_bytes + 1)
            and not (t["starts"] % ALIGNMENT).any()
        )
        for end, of in ends:
            cuts = np.concatenate([[0], t[end]])
            sound = sound and bool((np.diff(cuts) >= 0).all()) and int(cuts[-1]) <= len(t[of])
        if not sound:
            raise DamagedSegmentError("its tables do not fit each other")
        self._data_bytes = data_bytes

    def __len__(self) -> int:
        return len(self._tables["starts"])

    @property
    def file_bytes(self) -> int:
        """The size of the file."""
        return self.identity[2]

    def record(self, row: int) -> Record:
        """Where a feature is, and what. Raises DamagedSegmentError."""
        t = self._tables
        try:
            layout = self._layout(int(t["layouts"][row]))
            begin = int(t["value_ends"][row - 1]) if row else 0
            end = int(t["value_ends"][row])
            values = decode_values(t["values"][begin:end].tobytes()) if end > begin else ()
        except (ValueError, ArithmeticError, MemoryError) as error:
            raise DamagedSegmentError(str(error)) from error
        start, nbytes = int(t["starts"][row]), record_bytes(layout)
        if start + nbytes > self._data_bytes or len(values) != layout.plain:
            raise DamagedSegmentError("a record is not within its segment")
        return Record(DATA_START + start, nbytes, int(t["checksums"][row]), layout, values)

    def records(self, rows: npt.NDArray[np.int64]) -> Records:
        """The same of several features. Raises DamagedSegmentError if that is so of any of them."""
        t = self._tables
        of = t["layouts"][rows]
        ordered = np.sort(of)
        known = ordered[np.diff(ordered, prepend=-1) > 0]
        which = np.searchsorted(known, of)
        try:
            layouts = [self._layout(number) for number in known.tolist()]
            starts = t["starts"][rows]
            nbytes = np.array([record_bytes(layout) for layout in layouts], np.int64)[which]
            values: list[tuple[Any, ...]] = []
            plain = np.array([layout.plain for layout in layouts], np.int64)[which]
            if plain.any():
                values = [self.record(row).values for row in rows.tolist()]
        except (ValueError, ArithmeticError, MemoryError) as error:
            raise DamagedSegmentError(str(error)) from error
        if len(rows) and int((starts + nbytes).max()) > self._data_bytes:
            raise DamagedSegmentError("a record is not within its segment")
        return Records(starts + DATA_START, nbytes, t["checksums"][rows], layouts, which, values)

    def _layout(self, number: int) -> Layout:
        layout = self._layouts.get(number)
        if layout is None:
            t = self._tables
            kind = int(t["layout_kinds"][number])
            if not 0 <= kind < len(self._kinds):
                raise ValueError("there is no such kind")
            begin = int(t["size_ends"][number - 1]) if number else 0
            sizes = t["sizes"][begin : int(t["size_ends"][number])].tolist()
            layout = self._layouts.setdefault(number, self._kinds[kind].layout(sizes))
        return layout

    def names(self) -> list[str]:
        """The names of all records. Only if the segment was opened with them."""
        text = self._tables["names"].tobytes()
        ends = self._tables["name_ends"].tolist()
        return [
            text[begin:end].decode("utf-8", "surrogateescape")
            for begin, end in zip([0, *ends], ends, strict=False)
        ]


def _parse_header(text: bytes, size: int) -> tuple[int, dict[str, tuple[int, int]], int]:
    """The size of `data`, where each table is behind it, and the checksum of all tables."""
    try:
        [count] = struct.unpack_from("<Q", text)
        if len(text) != DATA_START or count != _MOST_HEADER:
            raise ValueError("it is not a segment of this package")
        entries = json.loads(text[8:])
        about = entries["__metadata__"]
        if about.get("format") != FORMAT:
            raise ValueError("it is not a segment of this package, or of a later version")
        begin, data_bytes = entries["data"]["data_offsets"]
        end, places = data_bytes, {}
        if type(data_bytes) is not int:
            raise ValueError("its data are nowhere")
        for name, (dtype, _) in TABLES.items():
            entry = entries[name]
            first, after = entry["data_offsets"]
            if not (type(first) is type(after) is int and first <= after):
                raise ValueError("its tables are nowhere")
            row = np.dtype(dtype).itemsize * (2 if TABLES[name][1][1:] else 1)
            if entry["dtype"] != DTYPES[dtype] or first != end or (after - first) % row:
                raise ValueError("its tables are of another kind")
            places[name] = first - data_bytes, after - data_bytes
            end = after
        if begin != 0 or not 0 <= data_bytes <= end or DATA_START + end != size:
            raise ValueError("it does not end where its tensors do")
        return data_bytes, places, int(about["checksum"])
    except (ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
        raise DamagedSegmentError(str(error)) from error


def open_quickly(path: str, flags: int) -> int:
    """`os.open`, which does not block for a FIFO."""
    return os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))


def _within(numbers: npt.NDArray[Any], end: int) -> bool:
    return not len(numbers) or (int(numbers.min()) >= 0 and int(numbers.max()) < end)


def _read_all(fd: int, target: bytearray, start: int) -> None:
    view = memoryview(target)
    while view:
        count = os.preadv(fd, [view], start)
        if not count:
            raise DamagedSegmentError("it ends early")
        view, start = view[count:], start + count
