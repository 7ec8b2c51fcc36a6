"""Where the records of a `torch.save` file lie, by its zip directory.

Only what torch.save itself writes is understood: records that are stored and not compressed,
one prefix for all names, no comment, no encryption, one disk. Anything else is Unsupported.
The format is described in PKWARE's APPNOTE.TXT, sections 4.3 and 4.4.
"""

import struct
from operator import itemgetter
from typing import NamedTuple

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import Bytes

END_BYTES = 22
ZIP64_LOCATOR_BYTES = 20
ZIP64_END_BYTES = 56
_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")
_HEADER = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s22x2H")
LOCAL_BYTES = 30
LOCAL_SIGNATURE = b"PK\x03\x04"


class Record(NamedTuple):
    """A record: its bytes lie `LOCAL_BYTES + name + extra` behind its local header."""

    header: int
    name_bytes: int
    size: int


class Directory:
    """The records of one file by their names without the prefix, and a pattern of the bytes.

    Files of one data set have the same directory but for the prefix and the checksums. `same`
    tells that of another file's bytes in about a microsecond, by one precompiled struct.

    Attributes:
        offset, nbytes: where it lies, up to the end of the file.
        records: by their names without the prefix.
    """

    def __init__(self, file: Bytes) -> None:
        count, size, self.offset = _find(file)
        self.nbytes = file.size - self.offset
        self._raw = file.read(self.offset, self.nbytes)
        raw = self._raw[:size]
        self.records: dict[str, Record] = {}
        at, prefix = 0, None
        # Bytes of the prefix, and of all that follows it, for each record.
        self._lengths: list[tuple[int, int]] = []
        for _ in range(count):
            if at + 46 > len(raw):
                raise Unsupported("the zip directory is cut short")
            (signature, _, _, flags, method, _, _, _, packed, size, name_bytes, extra_bytes,
             comment_bytes, disk, _, attributes, header) = _HEADER.unpack_from(raw, at)  # fmt: skip
            end = at + 46 + name_bytes + extra_bytes + comment_bytes
            if signature != b"PK\x01\x02" or end > len(raw):
                raise Unsupported("the zip directory is damaged")
            if method or packed != size or flags & ~0x808 or disk or comment_bytes or attributes:
                raise Unsupported("compressed, encrypted, split or other unusual records")
            name = raw[at + 46 : at + 46 + name_bytes]
            first, slash, rest = name.partition(b"/")
            if not slash or (prefix is not None and first != prefix):
                raise Unsupported("records without a common prefix")
            prefix = first
            size, header = _wide(size, header, raw[at + 46 + name_bytes : end])
            key = rest.decode("ascii", "replace")
            if key in self.records:
                raise Unsupported("two records of one name")
            self.records[key] = Record(header, name_bytes, size)
            self._lengths.append((len(first), len(rest) + 1 + extra_bytes))
            at = end
        if at != len(raw) or not count:
            raise Unsupported("the zip directory is not as long as it says")
        # Made for the first file that is compared: where each file is of its own kind, none is.
        self._pattern: struct.Struct | None = None

    def same(self, data: bytes, at: int) -> bool:
        """Whether this directory is what ends `data`, from `at`, but for prefix and checksums."""
        if self._pattern is None:
            self._make_pattern()
            assert self._pattern is not None
        fields = self._pattern.unpack_from(data, at)
        prefixes: tuple[bytes, ...] = fields[2::3]
        prefix = prefixes[0]
        return (
            self._constants(fields) == self._expected
            and prefixes.count(prefix) == len(prefixes)
            and b"/" not in prefix
        )

    def _make_pattern(self) -> None:
        """For each record: what is constant, twice, around the checksum, and the prefix."""
        codes = ["<16s"]
        for prefix_bytes, rest_bytes in self._lengths:
            codes.append(f"4x26s{prefix_bytes}s{rest_bytes + 16}s")
        ends = self.nbytes - sum(46 + sum(lengths) for lengths in self._lengths)
        codes[-1] = f"4x26s{prefix_bytes}s{rest_bytes + ends}s"
        self._pattern = struct.Struct("".join(codes))
        fields = self._pattern.unpack(self._raw)
        self._constants = itemgetter(*(n for n in range(len(fields)) if n % 3 != 2))
        self._expected = self._constants(fields)


def _wide(size: int, header: int, extra: bytes) -> tuple[int, int]:
    """Size and offset, taken from the zip64 field where the short ones have no room."""
    if size != 0xFFFFFFFF and header != 0xFFFFFFFF:
        return size, header
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1 and at + 4 + length <= len(extra):
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                if size == 0xFFFFFFFF:
                    size = wide.pop(0)
                    if wide.pop(0) != size:  # the compressed size
                        raise Unsupported("compressed records")
                if header == 0xFFFFFFFF:
                    header = wide.pop(0)
            except IndexError:
                break
            return size, header
        at += 4 + length
    raise Unsupported("a zip64 field is missing")


def _find(file: Bytes) -> tuple[int, int, int]:
    """The directory's number of entries, size and offset, by what ends the file."""
    file_size = file.size
    tail = file.read(max(0, file_size - TAIL_BYTES), min(file_size, TAIL_BYTES))
    if len(tail) < END_BYTES:
        raise Unsupported("too short for a zip file")
    signature, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(
        tail, len(tail) - END_BYTES
    )
    if signature != b"PK\x05\x06" or comment or disk or first_disk or here != count:
        raise Unsupported("no plain end of a zip file")
    end = file_size - END_BYTES
    at = len(tail) - END_BYTES - ZIP64_LOCATOR_BYTES
    if at >= 0 and tail[at : at + 4] == b"PK\x06\x07":
        _, disk, where, disks = _ZIP64_LOCATOR.unpack_from(tail, at)
        at -= ZIP64_END_BYTES
        end = where
        if at < 0 or disk or disks != 1 or where != file_size - len(tail) + at:
            raise Unsupported("an unusual zip64 end")
        signature, length, _, _, disk, first_disk, here, count, size, offset = (
            _ZIP64_END.unpack_from(tail, at)
        )
        if signature != b"PK\x06\x06" or length != 44 or disk or first_disk or here != count:
            raise Unsupported("an unusual zip64 end")
    if offset + size != end:
        raise Unsupported("the zip directory does not end where the file says")
    return count, size, offset


TAIL_BYTES = END_BYTES + ZIP64_LOCATOR_BYTES + ZIP64_END_BYTES


def data_offset(record: Record, file: Bytes) -> int:
    """Where the bytes of a record begin, by its local header."""
    signature, name_bytes, extra_bytes = _LOCAL.unpack(file.read(record.header, LOCAL_BYTES))
    start: int = record.header + LOCAL_BYTES + name_bytes + extra_bytes
    if signature != LOCAL_SIGNATURE or name_bytes != record.name_bytes:
        raise Unsupported("a local header does not agree with the directory")
    if start + record.size > file.size:
        raise Unsupported("a record ends behind the end of the file")
    return start
