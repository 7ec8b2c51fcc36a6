"""What is refused before `torch.load` sees it: files that would bring the process down.

The reader leaves to `torch.load` what it does not know. That hashes and allocates whatever a file
says (see `pickle_scan`), takes a record that is marked as a directory for one without bytes, ends
early where compressed bytes are damaged, and in both cases returns whatever its memory holds. No
data set has such files. What cannot be looked at here is refused, too: two readers of one file
that understand it differently are how such checks are passed by.
"""

import io
import os
import stat
import struct
import zlib
from typing import IO, NamedTuple

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import Windows
from gpucache_pipes.files.pt.directory import HEADER, LOCAL_BYTES, WIDE, find_directory, wide
from gpucache_pipes.files.pt.names import storage_itemsize
from gpucache_pipes.files.pt.pickle_scan import Scan

_LENGTHS = struct.Struct("<HH")
_HEADER_BYTES = 46

_DIRECTORY = 0x10
"""The attribute of MS-DOS, which is the one that torch looks at."""

_STORED, _DEFLATED = 0, 8

_MOST_UNPACKED = 256
"""Bytes that a compressed file may hold for each byte of it."""

_AT_ONCE = 1 << 20
"""Bytes that are unpacked at once."""

_LARGEST_PACKED_PICKLE = 64 << 20
"""Bytes. What torch.save writes is not compressed, and may have any size that the file has."""

_LEGACY_PICKLES = 5
"""Of torch.save before 1.6: magic number, protocol, system, feature, keys of the storages."""


class _Record(NamedTuple):
    """An entry of a zip directory."""

    name: str
    flags: int
    method: int
    checksum: int
    packed: int
    size: int
    attributes: int
    header: int


def require_sound(path: str, pickles: bool) -> None:
    """Raise ValueError if the file would harm `torch.load`; with `pickles`, look at these, too.

    Without, as for `weights_only=False`, a pickle may do what it likes. An empty file passes:
    torch.load says so.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        status = os.fstat(file.fileno())
        size = status.st_size
        if not stat.S_ISREG(status.st_mode) or not size:
            return
        start = file.read(4)
        file.seek(0)
        if start[:2] == b"PK":
            _require_sound_archive(file, size, pickles)
        elif pickles:
            _require_sound_legacy(file, size)


def _require_sound_legacy(file: IO[bytes], size: int) -> None:
    """The format before torch 1.6: pickles one behind the other, then the storages."""
    scans = []
    for _ in range(_LEGACY_PICKLES):
        scan = Scan()
        scan.run(file)
        scans.append(scan)
        if file.tell() >= size:
            break
    if len(scans) < _LEGACY_PICKLES:
        return  # torch.load raises an error
    storages, keys = scans[3].storages, scans[4].texts
    if scans[4].has_tuples or set(storages) != set(keys) or len(set(keys)) != len(keys):
        raise ValueError("a damaged file: its storages are not those that it names")
    for key in keys:
        kind, count = storages[key]
        start = file.read(8)
        itemsize = storage_itemsize(kind)
        if itemsize is None or start != count.to_bytes(8, "little"):
            raise ValueError(f"a damaged file: its storage {key!r:.40} is of another size")
        file.seek(count * itemsize, os.SEEK_CUR)
        if file.tell() > size:
            raise ValueError("a damaged file: it ends early")


def _require_sound_archive(file: IO[bytes], size: int, pickles: bool) -> None:
    records = _records(file, size)
    if len({record.name.lower() for record in records}) != len(records):
        raise ValueError("a damaged zip file: two records of one name")
    for record in records:
        if record.attributes & _DIRECTORY and not record.name.endswith("/"):
            raise ValueError(f"a damaged file: its record {record.name!r} is a directory")
        if record.method not in (_STORED, _DEFLATED) or record.flags & 1:
            raise ValueError(
                f"its record {record.name!r} is encrypted, or packed in an unusual way"
            )
        if record.method == _STORED and record.packed != record.size:
            raise ValueError(f"a damaged file: its record {record.name!r} has two sizes")
    unpacked = sum(record.size for record in records if record.method)
    if unpacked > _MOST_UNPACKED * size:
        raise ValueError(
            f"a file of {size} bytes that unpacks to {unpacked}; save it by torch.save, which "
            "does not compress"
        )
    for record in records:
        # miniz, by which torch reads, does not tell capital letters from others.
        is_pickle = pickles and record.name.lower().endswith("data.pkl")
        content = b""
        if record.method:
            content = _unpack(file, record, is_pickle)
        elif is_pickle:
            _find(file, record)
            content = file.read(record.size)
        if is_pickle:
            Scan().run(io.BytesIO(content))


def _records(file: IO[bytes], size: int) -> list[_Record]:
    """The directory of a zip file, from where its end says that it is. Raises ValueError."""
    try:
        count, length, offset = find_directory(Windows(file.fileno(), size))
    except (Unsupported, struct.error) as error:
        raise ValueError(f"a damaged zip file, or an unusual one ({error})") from error
    raw = os.pread(file.fileno(), length, offset)
    found, at = [], 0
    for _ in range(count):
        if at + _HEADER_BYTES > len(raw):
            raise ValueError("a damaged zip file: its directory is cut short")
        (signature, _, _, flags, method, _, _, checksum, packed, unpacked, name_bytes, extra_bytes,
         comment_bytes, _, _, attributes, header) = HEADER.unpack_from(raw, at)  # fmt: skip
        start = at + _HEADER_BYTES
        at = start + name_bytes + extra_bytes + comment_bytes
        if signature != b"PK\x01\x02" or at > len(raw):
            raise ValueError("a damaged zip file: its directory is not as long as it says")
        name = raw[start : start + name_bytes].decode("utf-8", "replace")
        if WIDE in (packed, unpacked, header):
            extra = raw[start + name_bytes : start + name_bytes + extra_bytes]
            packed, unpacked, header = wide(packed, unpacked, header, extra)
        found.append(_Record(name, flags, method, checksum, packed, unpacked, attributes, header))
    if at != len(raw):
        raise ValueError("a damaged zip file: its directory is longer than it says")
    return found


def _find(file: IO[bytes], record: _Record) -> None:
    """Go to the bytes of a record, as torch does: by its local header."""
    file.seek(record.header)
    header = file.read(LOCAL_BYTES)
    if len(header) < LOCAL_BYTES or header[:4] != b"PK\x03\x04":
        raise ValueError(f"a damaged file: its record {record.name!r} is not there")
    name_bytes, extra_bytes = _LENGTHS.unpack_from(header, 26)
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)


def _unpack(file: IO[bytes], record: _Record, keep: bool) -> bytes:
    """Look whether a compressed record is what it says; its bytes, if they are to be kept."""
    if keep and record.size > _LARGEST_PACKED_PICKLE:
        raise ValueError(f"a compressed pickle of {record.size} bytes")
    _find(file, record)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    left, size, checksum, kept = record.packed, 0, 0, []
    try:
        while left and not unpacker.eof:
            packed = file.read(min(left, _AT_ONCE))
            if not packed:
                break
            left -= len(packed)
            while packed and size <= record.size:
                part = unpacker.decompress(packed, _AT_ONCE)
                packed = unpacker.unconsumed_tail
                size += len(part)
                checksum = zlib.crc32(part, checksum)
                if keep:
                    kept.append(part)
    except zlib.error as error:
        raise ValueError(f"a damaged record {record.name!r} ({error})") from error
    if not unpacker.eof or size != record.size or checksum != record.checksum:
        raise ValueError(f"a damaged record {record.name!r}")
    return b"".join(kept)
