"""Refuses files that would harm the process in `torch.load`, before `torch.load` sees them.

The fast reader leaves to `torch.load` what it does not know. With damaged or hostile files, even
`torch.load(weights_only=True)` does the following:

- It hashes and allocates whatever the pickle says. See `pickle_scan`.
- It takes a record that is marked as a directory for one without bytes, and returns tensors that
  hold whatever is in memory.
- It stops early where compressed bytes are damaged; the rest of the tensor holds whatever is in
  memory.
- In the format before torch 1.6 it believes the sizes and the list of storages in the file.
- It unpacks a compressed record to any size that the record states.

No data set has such files, so refusing them costs nothing. A file that this module cannot read as
`torch.load` would read it is refused as well. Reading it leniently does not work: if two readers
understand one file differently, the file passes the check of the first and harms the second. For
zip files that means one way to find the directory (where the end of the file says it is, instead of
searching for it), and names that are compared without regard to case, as miniz in torch does.
"""

import io
import os
import stat
import struct
import zlib
from typing import IO, NamedTuple

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import Windows
from gpucache_pipes.files.pt.directory import (
    CENTRAL_HEADER,
    CENTRAL_SIGNATURE,
    LOCAL_HEADER_BYTES,
    LOCAL_SIGNATURE,
    ZIP64_MARK,
    find_directory,
    zip64_numbers,
)
from gpucache_pipes.files.pt.names import storage_itemsize
from gpucache_pipes.files.pt.pickle_scan import Scan

_LENGTHS = struct.Struct("<HH")

_DIRECTORY_ATTRIBUTE = 0x10
"""The attribute of MS-DOS that marks a directory; torch looks at this one."""

_STORED, _DEFLATED = 0, 8

_MAX_UNPACKED_RATIO = 256
"""Unpacked bytes of the compressed records, for each byte of the file."""

_CHUNK_BYTES = 1 << 20
"""Bytes that are read or unpacked at once."""

_MAX_PACKED_PICKLE_BYTES = 64 << 20
"""The unpacked size of a compressed pickle. A pickle that is stored without compression, as
torch.save writes it, may be as large as the file."""

_LEGACY_PICKLES = 5
"""Pickles at the start of a file before torch 1.6: magic number, protocol, system, feature, and the
keys of the storages."""


class _Record(NamedTuple):
    """A record, as the zip directory describes it."""

    name: str
    flags: int
    method: int
    checksum: int
    packed: int
    size: int
    attributes: int
    header: int


def require_sound(path: str, pickles: bool) -> None:
    """Check that the file does not harm the process in `torch.load`.

    An empty file passes, and so does what is not a regular file; `torch.load` has errors for them.

    Args:
        path: the file.
        pickles: whether to scan the pickles. With `weights_only=False` a pickle may run any code,
            so that a scan would be pointless.

    Raises:
        ValueError: the file is refused.
        OSError: the file cannot be read.
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
    """Check a file of the format before torch 1.6: five pickles, followed by the storages.

    `torch.load` leaves the memory of a storage as it is if the file does not hold the storage. So
    the storages in the file must be those that the feature names, with the sizes that it names.
    """
    scans = []
    for _ in range(_LEGACY_PICKLES):
        scan = Scan()
        scan.run(file)
        scans.append(scan)
        if file.tell() >= size:
            break
    if len(scans) < _LEGACY_PICKLES:
        return  # torch.load raises an error for a file that ends here
    storages, keys = scans[3].storages, scans[4].strings
    if scans[4].has_tuples or set(storages) != set(keys) or len(set(keys)) != len(keys):
        raise ValueError("the file is damaged: its storages are not those that its pickle names")
    for key in keys:
        kind, count = storages[key]
        start = file.read(8)
        itemsize = storage_itemsize(kind)
        if itemsize is None or start != count.to_bytes(8, "little"):
            raise ValueError(f"the file is damaged: the storage {key!r:.40} has another size")
        file.seek(count * itemsize, os.SEEK_CUR)
        if file.tell() > size:
            raise ValueError("the file is damaged: it ends early")


def _require_sound_archive(file: IO[bytes], size: int, pickles: bool) -> None:
    """Check a zip file: its directory, its compressed records, and its pickles."""
    records = _records(file, size)
    if len({record.name.lower() for record in records}) != len(records):
        raise ValueError("the file is damaged: two records have one name")
    for record in records:
        if record.attributes & _DIRECTORY_ATTRIBUTE and not record.name.endswith("/"):
            raise ValueError(
                f"the file is damaged: its record {record.name!r} is marked as a directory"
            )
        if record.method not in (_STORED, _DEFLATED) or record.flags & 1:
            raise ValueError(
                f"the record {record.name!r} is encrypted, or compressed in an unusual way; save "
                "the file again by torch.save"
            )
        if record.method == _STORED and record.packed != record.size:
            raise ValueError(f"the file is damaged: its record {record.name!r} has two sizes")
    unpacked = sum(record.size for record in records if record.method)
    if unpacked > _MAX_UNPACKED_RATIO * size:
        raise ValueError(
            f"the file has {size} bytes and unpacks to {unpacked}, over {_MAX_UNPACKED_RATIO} "
            "times as many; save it again by torch.save, which does not compress"
        )
    for record in records:
        # torch reads by miniz, which finds names without regard to case.
        is_pickle = pickles and record.name.lower().endswith("data.pkl")
        content = b""
        if record.method:
            content = _unpack(file, record, is_pickle)
        elif is_pickle:
            _seek(file, record)
            content = file.read(record.size)
        if is_pickle:
            Scan().run(io.BytesIO(content))


def _records(file: IO[bytes], size: int) -> list[_Record]:
    """Return the records in the directory that the end of a zip file names. Raises ValueError."""
    try:
        count, length, offset = find_directory(Windows(file.fileno(), size))
    except (Unsupported, struct.error) as error:
        raise ValueError(f"a damaged or unusual zip file ({error})") from error
    raw = os.pread(file.fileno(), length, offset)
    found, at = [], 0
    for _ in range(count):
        if at + CENTRAL_HEADER.size > len(raw):
            raise ValueError("the file is damaged: its zip directory is cut short")
        (signature, _, _, flags, method, _, _, checksum, packed, unpacked, name_bytes, extra_bytes,
         comment_bytes, _, _, attributes, header) = CENTRAL_HEADER.unpack_from(raw, at)  # fmt: skip
        start = at + CENTRAL_HEADER.size
        at = start + name_bytes + extra_bytes + comment_bytes
        if signature != CENTRAL_SIGNATURE or at > len(raw):
            raise ValueError("the file is damaged: its zip directory is shorter than it states")
        name = raw[start : start + name_bytes].decode("utf-8", "replace")
        if ZIP64_MARK in (packed, unpacked, header):
            extra = raw[start + name_bytes : start + name_bytes + extra_bytes]
            packed, unpacked, header = zip64_numbers(packed, unpacked, header, extra)
        found.append(_Record(name, flags, method, checksum, packed, unpacked, attributes, header))
    if at != len(raw):
        raise ValueError("the file is damaged: its zip directory is longer than it states")
    return found


def _seek(file: IO[bytes], record: _Record) -> None:
    """Seek to the bytes of a record by its local header, as torch does. Raises ValueError."""
    file.seek(record.header)
    header = file.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES or header[:4] != LOCAL_SIGNATURE:
        raise ValueError(f"the file is damaged: its record {record.name!r} has no local header")
    name_bytes, extra_bytes = _LENGTHS.unpack_from(header, 26)
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)


def _unpack(file: IO[bytes], record: _Record, keep: bool) -> bytes:
    """Check the size and the checksum of a compressed record. Return its bytes if `keep`."""
    if keep and record.size > _MAX_PACKED_PICKLE_BYTES:
        raise ValueError(
            f"the compressed pickle unpacks to {record.size} bytes, and the limit is "
            f"{_MAX_PACKED_PICKLE_BYTES}; save the file again by torch.save, which does not "
            "compress"
        )
    _seek(file, record)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    left, size, checksum, kept = record.packed, 0, 0, []
    try:
        while left and not unpacker.eof:
            packed = file.read(min(left, _CHUNK_BYTES))
            if not packed:
                break
            left -= len(packed)
            while packed and size <= record.size:
                part = unpacker.decompress(packed, _CHUNK_BYTES)
                packed = unpacker.unconsumed_tail
                size += len(part)
                checksum = zlib.crc32(part, checksum)
                if keep:
                    kept.append(part)
    except zlib.error as error:
        raise ValueError(f"the file is damaged in the record {record.name!r} ({error})") from error
    if not unpacker.eof or size != record.size or checksum != record.checksum:
        raise ValueError(f"the file is damaged in the record {record.name!r}")
    return b"".join(kept)
