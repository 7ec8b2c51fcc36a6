"""Where the records of a `torch.save` file lie, by its zip directory.

Only what torch.save itself writes is understood: records that are stored and not compressed,
one prefix for all names, no comment, no encryption, one disk. Anything else is Unsupported.
The format is described in PKWARE's APPNOTE.TXT, sections 4.3 and 4.4.
"""

import struct
from operator import itemgetter

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import Bytes

END_BYTES = 22
ZIP64_LOCATOR_BYTES = 20
ZIP64_END_BYTES = 56
_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")
HEADER = struct.Struct("<4s6H3L5H2L")
_NUMBERS = struct.Struct("<2L14sL")
WIDE = 0xFFFFFFFF
_NEWEST = 45
"""Of the versions of the format: the one that has zip64."""
_MOST_SHAPES = 64
_LARGEST_SHAPE = 64 << 10
_LOCAL = struct.Struct("<4s22x2H")
LOCAL_BYTES = 30
LOCAL_SIGNATURE = b"PK\x03\x04"


Record = tuple[int, int, int]
"""Offset of the local header, length of the name, size: the bytes of a record lie `LOCAL_BYTES`,
name and extra field behind its local header. No class of its own: a file has many."""


class DirectoryTemplate:
    """What the directories of a data set have in common: all but prefix, checksums and numbers.

    The numbers of a record are its size, twice, and the offset of its header. By one precompiled
    struct a directory is told to be of this shape in about a microsecond.

    Raises Unsupported for what torch.save does not write.
    """

    def __init__(self, raw: bytes, count: int) -> None:
        self._names: list[str] = []
        self._name_bytes: list[int] = []
        self._starts: list[int] = []
        codes = ["<16s"]
        at, prefix = 0, None
        for _ in range(count):
            if at + 46 > len(raw):
                raise Unsupported("the zip directory is cut short")
            (signature, _, needed, flags, method, _, _, _, _, _, name_bytes, extra_bytes,
             comment_bytes, disk, _, attributes, _) = HEADER.unpack_from(raw, at)  # fmt: skip
            end = at + 46 + name_bytes + extra_bytes + comment_bytes
            if signature != b"PK\x01\x02" or end > len(raw):
                raise Unsupported("the zip directory is damaged")
            unusual = flags & ~0x808 or needed > _NEWEST or disk or comment_bytes or attributes
            if method or unusual:
                raise Unsupported("compressed, encrypted, split or other unusual records")
            name = raw[at + 46 : at + 46 + name_bytes]
            first, slash, rest = name.partition(b"/")
            if (
                not slash
                or b"\0" in name
                or not first.isascii()
                or (prefix is not None and first != prefix)
            ):
                raise Unsupported("records without a common prefix")
            prefix = first
            self._names.append(rest.decode("ascii", "replace"))
            self._name_bytes.append(name_bytes)
            self._starts.append(at)
            # Checksum, numbers, prefix; what follows is constant into the next header.
            rest_bytes = end - at - 46 - len(first)
            codes.append(f"4x26s{len(first)}s{rest_bytes + 16 * (len(codes) < count)}s")
            at = end
        if at != len(raw) or not count:
            raise Unsupported("the zip directory is not as long as it says")
        if len(set(self._names)) != count:
            raise Unsupported("two records of one name")
        self._pattern = struct.Struct("".join(codes))
        fields = self._pattern.unpack(raw)
        self._constants = itemgetter(*range(0, len(fields), 3))
        self._expected = self._constants(fields)
        # Of the 26 bytes of numbers, those in the middle are lengths: constant.
        self._lengths = [numbers[8:22] for numbers in fields[1::3]]

    def numbers(self, data: bytes, at: int = 0) -> tuple[bytes, ...] | None:
        """What tells one directory of this shape from others; None if it is of another."""
        fields = self._pattern.unpack_from(data, at)
        prefixes = fields[2::3]
        prefix = prefixes[0]
        if (
            self._constants(fields) != self._expected
            or prefixes.count(prefix) != len(prefixes)
            or b"/" in prefix
            or b"\0" in prefix
            or not prefix.isascii()
        ):
            return None
        numbers: tuple[bytes, ...] = fields[1::3]
        return numbers

    def parse(self, raw: bytes) -> tuple[tuple[bytes, ...], dict[str, Record]] | None:
        """The numbers of a directory, and its records by their names; None if of another shape."""
        found = self.numbers(raw)
        if found is None:
            return None
        records: dict[str, Record] = {}
        for name, name_bytes, lengths, numbers in zip(
            self._names, self._name_bytes, self._lengths, found, strict=True
        ):
            packed, size, middle, header = _NUMBERS.unpack(numbers)
            if middle != lengths:
                return None
            if WIDE in (packed, size, header):
                extra = self._extra(len(records), raw)
                packed, size, header = wide(packed, size, header, extra)
            if packed != size:
                raise Unsupported("compressed records")
            records[name] = (header, name_bytes, size)
        return found, records

    def _extra(self, number: int, raw: bytes) -> bytes:
        """The extra field of a record."""
        start = self._starts[number] + 46 + self._name_bytes[number]
        [extra_bytes] = struct.unpack_from("<H", self._lengths[number], 2)
        return raw[start : start + extra_bytes]

    def sizes_of(self, number: int) -> slice:
        """Where in a directory the sizes of a record are."""
        start = self._starts[number] + 20
        return slice(start, start + 8)


class Directory:
    """Where the records of one file lie.

    `shapes` are those of other files, by number of records and size; a new one is added.

    Attributes:
        offset, nbytes: where the directory lies, up to the end of the file.
        numbers: see DirectoryTemplate.
        records: by their names without the prefix.
    """

    def __init__(self, file: Bytes, shapes: dict[tuple[int, int], DirectoryTemplate]) -> None:
        count, size, self.offset = find_directory(file)
        self.nbytes = file.size - self.offset
        data = file.read(self.offset, self.nbytes)
        raw = data[:size]
        shape = shapes.get((count, size))
        parsed = shape.parse(raw) if shape is not None else None
        if shape is None or parsed is None:
            shape = DirectoryTemplate(raw, count)
            parsed = shape.parse(raw)
            assert parsed is not None
            if size <= _LARGEST_SHAPE:
                if len(shapes) >= _MOST_SHAPES:
                    shapes.clear()
                shapes[count, size] = shape
        self.numbers, self.records = parsed
        self._shape = shape
        self._end = data[size:]
        # Where files differ at all, they differ in the sizes of their largest record.
        self._probe: slice | None = None

    def same(self, data: bytes, at: int) -> bool:
        """Whether this directory is what ends `data`, from `at`, but for prefix and checksums."""
        if self._probe is None:
            sizes = [size for _, _, size in self.records.values()]
            number = sizes.index(max(sizes))
            self._probed = self.numbers[number][:8]
            self._probe = self._shape.sizes_of(number)  # last: other threads look at it
        if data[at + self._probe.start : at + self._probe.stop] != self._probed:
            return False
        return (
            self._shape.numbers(data, at) == self.numbers
            and data[at + self.nbytes - len(self._end) :] == self._end
        )


def wide(packed: int, size: int, header: int, extra: bytes) -> tuple[int, int, int]:
    """Sizes and offset, taken from the zip64 field where the short ones have no room.

    Raises Unsupported if there is none.
    """
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1 and at + 4 + length <= len(extra):
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                size = next(numbers) if size == WIDE else size
                packed = next(numbers) if packed == WIDE else packed
                header = next(numbers) if header == WIDE else header
            except StopIteration:
                break
            return packed, size, header
        at += 4 + length
    raise Unsupported("a zip64 field is missing")


def find_directory(file: Bytes) -> tuple[int, int, int]:
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
    header, expected, size = record
    signature, name_bytes, extra_bytes = file.unpack(_LOCAL, header)
    start: int = header + LOCAL_BYTES + name_bytes + extra_bytes
    if signature != LOCAL_SIGNATURE or name_bytes != expected:
        raise Unsupported("a local header does not agree with the directory")
    if start + size > file.size:
        raise Unsupported("a record ends behind the end of the file")
    return start
