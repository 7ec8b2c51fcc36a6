"""The zip directory of a `torch.save` file, which says where the records lie.

Only directories as torch.save writes them are understood: records are stored without compression,
all names have one prefix, and there is no comment, no encryption and a single disk. Anything else
is Unsupported. The format is described in PKWARE's APPNOTE.TXT, sections 4.3 and 4.4.
"""

import struct
from operator import itemgetter

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import Bytes
from gpucache_pipes.files.plans import Run

_END = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")
_TAIL_BYTES = _END.size + _ZIP64_LOCATOR.size + _ZIP64_END.size

CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")
"""The header of a record in the directory; name, extra field and comment follow."""

CENTRAL_SIGNATURE = b"PK\x01\x02"
_LOCAL_HEADER = struct.Struct("<4s22x2H")
LOCAL_HEADER_BYTES = _LOCAL_HEADER.size
LOCAL_SIGNATURE = b"PK\x03\x04"

ZIP64_MARK = 0xFFFFFFFF
"""A size or offset with this value is in the zip64 extra field."""

_NUMBERS = struct.Struct("<2L14sL")
_ZIP64_VERSION = 45
"""The version of the format that introduced zip64; torch.save needs no newer one."""

_MAX_TEMPLATES = 64
_MAX_TEMPLATE_BYTES = 64 << 10

Record = tuple[int, int, int]
"""Offset of the local header, bytes of the name, and bytes of the record. The record itself follows
its local header, name and extra field. A plain tuple, because a file may have many records."""


class DirectoryTemplate:
    """What the zip directories of one data set share: all but prefixes, checksums and numbers.

    The numbers of a record are its compressed size, its size, and the offset of its local header;
    constant fields lie between them. One precompiled struct tells in about a microsecond whether
    another directory fits the template. Templates are immutable, so that threads may share them.

    Raises Unsupported for a directory that torch.save does not write.

    Args:
        raw: the directory of the first file.
        count: the number of its records.
    """

    def __init__(self, raw: bytes, count: int) -> None:
        self._names: list[str] = []
        self._name_bytes: list[int] = []
        self._starts: list[int] = []
        self._prefix_bytes = 0
        codes = ["<16s"]
        at, prefix = 0, None
        for _ in range(count):
            if at + CENTRAL_HEADER.size > len(raw):
                raise Unsupported("the zip directory is cut short")
            fields = CENTRAL_HEADER.unpack_from(raw, at)
            (signature, _, needed, flags, method, _, _, _, _, _, name_bytes, extra_bytes,
             comment_bytes, disk, _, attributes, _) = fields  # fmt: skip
            name_at = at + CENTRAL_HEADER.size
            end = name_at + name_bytes + extra_bytes + comment_bytes
            if signature != CENTRAL_SIGNATURE or end > len(raw):
                raise Unsupported("the zip directory is damaged")
            unusual = (
                flags & ~0x808 or needed > _ZIP64_VERSION or disk or comment_bytes or attributes
            )
            if method or unusual:
                raise Unsupported(
                    "a record is compressed, encrypted or otherwise not as torch.save writes it"
                )
            name = raw[name_at : name_at + name_bytes]
            first, slash, rest = name.partition(b"/")
            if (
                not slash
                or b"\0" in name
                or not first.isascii()
                or (prefix is not None and first != prefix)
            ):
                raise Unsupported("the names of the records have no common prefix")
            prefix = first
            self._prefix_bytes = len(first)
            self._names.append(rest.decode("ascii", "replace"))
            self._name_bytes.append(name_bytes)
            self._starts.append(at)
            # Checksum, numbers and prefix; the rest is constant, and so are the first 16 bytes of
            # the next header.
            rest_bytes = end - name_at - len(first)
            codes.append(f"4x26s{len(first)}s{rest_bytes + 16 * (len(codes) < count)}s")
            at = end
        if at != len(raw) or not count:
            raise Unsupported("the zip directory has another size than it states")
        if len(set(self._names)) != count:
            raise Unsupported("two records have one name")
        self._pattern = struct.Struct("".join(codes))
        fields = self._pattern.unpack(raw)
        self._constants = itemgetter(*range(0, len(fields), 3))
        self._expected = self._constants(fields)
        # The 26 bytes of numbers have constant fields in the middle, the lengths of the name and
        # the extra field among them.
        self._middles = [numbers[8:22] for numbers in fields[1::3]]

    def numbers(self, data: bytes, at: int = 0) -> tuple[bytes, ...] | None:
        """Return the numbers of the directory at `at`, by record; None if it does not fit."""
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
        """Return the numbers and the records, by name, of a directory; None if it does not fit."""
        found = self.numbers(raw)
        if found is None:
            return None
        records: dict[str, Record] = {}
        for name, name_bytes, expected, numbers in zip(
            self._names, self._name_bytes, self._middles, found, strict=True
        ):
            packed, size, middle, header = _NUMBERS.unpack(numbers)
            if middle != expected:
                return None
            if ZIP64_MARK in (packed, size, header):
                extra = self._extra(len(records), raw)
                packed, size, header = zip64_numbers(packed, size, header, extra)
            if packed != size:
                raise Unsupported("a record is compressed")
            records[name] = (header, name_bytes, size)
        return found, records

    def _extra(self, number: int, raw: bytes) -> bytes:
        """Return the extra field of a record."""
        start = self._starts[number] + CENTRAL_HEADER.size + self._name_bytes[number]
        [extra_bytes] = struct.unpack_from("<H", self._middles[number], 2)
        return raw[start : start + extra_bytes]

    @property
    def starts(self) -> list[int]:
        """Where the entry of each record begins."""
        return self._starts

    def runs(self, offset: int, nbytes: int) -> tuple[list[Run], list[Run]]:
        """The runs of a directory that are constant, and those of the prefix.

        Args:
            offset: its first byte in the file.
            nbytes: of the directory, and of what follows it and is constant.
        """
        constant, prefixes = [], []
        at = offset
        for start in self._starts:
            entry = offset + start
            name = entry + CENTRAL_HEADER.size
            # Without the checksum.
            constant += [Run(at, entry + 16 - at), Run(entry + 20, name - entry - 20)]
            prefixes.append(Run(name, self._prefix_bytes))
            at = name + self._prefix_bytes
        return [*constant, Run(at, offset + nbytes - at)], prefixes

    def sizes_of(self, number: int) -> slice:
        """Return which bytes of a directory hold the two sizes of a record."""
        start = self._starts[number] + 20
        return slice(start, start + 8)


class Directory:
    """The zip directory of one file.

    Args:
        file: the file.
        templates: the templates of other files, by number of records and bytes of the directory.
            If none fits, a new one is added. Reader threads share this dict without a lock; only
            `get`, `clear` and item assignment are used, which are atomic under the GIL.

    Attributes:
        offset: the first byte of the directory in the file.
        nbytes: its size up to the end of the file, end records included.
        numbers: see DirectoryTemplate.
        records: the records by name, without the prefix, in the order of the directory.
    """

    def __init__(self, file: Bytes, templates: dict[tuple[int, int], DirectoryTemplate]) -> None:
        count, size, self.offset = find_directory(file)
        self.nbytes = file.size - self.offset
        data = file.read(self.offset, self.nbytes)
        raw = data[:size]
        template = templates.get((count, size))
        parsed = template.parse(raw) if template is not None else None
        if template is None or parsed is None:
            template = DirectoryTemplate(raw, count)
            parsed = template.parse(raw)
            assert parsed is not None
            if size <= _MAX_TEMPLATE_BYTES:
                if len(templates) >= _MAX_TEMPLATES:
                    templates.clear()
                templates[count, size] = template
        self.numbers, self.records = parsed
        self._template = template
        self._end = data[size:]
        self._probe: slice | None = None

    @property
    def starts(self) -> list[int]:
        """Where the entry of each record begins in the file."""
        return [self.offset + start for start in self._template.starts]

    def runs(self) -> tuple[list[Run], list[Run]]:
        """The runs of the file that `matches` compares, and those of the prefix."""
        return self._template.runs(self.offset, self.nbytes)

    def end_offsets(self, size: int) -> list[tuple[int, int]]:
        """Where the end records of a file of this size state an offset, and what it is."""
        offsets = [(size - 6, self.offset)]
        if len(self._end) == _TAIL_BYTES:
            offsets += [(size - 34, size - _TAIL_BYTES), (size - 50, self.offset)]
        return offsets

    def matches(self, data: bytes, at: int) -> bool:
        """Return whether `data` from `at` on is this directory but for prefix and checksums."""
        # Directories that differ at all mostly differ in the sizes of their largest record, so
        # these 8 bytes are compared first. Threads may compute them at the same time; `_probe`
        # is assigned last, because a thread that sees it also reads `_probed`. This relies on
        # the GIL, under which other threads see assignments in program order.
        if self._probe is None:
            sizes = [size for _, _, size in self.records.values()]
            number = sizes.index(max(sizes))
            self._probed = self.numbers[number][:8]
            self._probe = self._template.sizes_of(number)
        if data[at + self._probe.start : at + self._probe.stop] != self._probed:
            return False
        return (
            self._template.numbers(data, at) == self.numbers
            and data[at + self.nbytes - len(self._end) :] == self._end
        )


def zip64_numbers(packed: int, size: int, header: int, extra: bytes) -> tuple[int, int, int]:
    """Return sizes and offset; those equal to `ZIP64_MARK` are replaced from the zip64 field.

    Raises Unsupported if the extra field has none.
    """
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1 and at + 4 + length <= len(extra):
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            try:
                size = next(numbers) if size == ZIP64_MARK else size
                packed = next(numbers) if packed == ZIP64_MARK else packed
                header = next(numbers) if header == ZIP64_MARK else header
            except StopIteration:
                break
            return packed, size, header
        at += 4 + length
    raise Unsupported("a zip64 field is missing")


def find_directory(file: Bytes) -> tuple[int, int, int]:
    """Return the directory's number of records, size and offset, from the end of the file.

    Raises Unsupported if the file does not end as torch.save writes it.
    """
    file_size = file.size
    tail = file.read(max(0, file_size - _TAIL_BYTES), min(file_size, _TAIL_BYTES))
    if len(tail) < _END.size:
        raise Unsupported("the file is too short for a zip file")
    signature, disk, first_disk, here, count, size, offset, comment = _END.unpack_from(
        tail, len(tail) - _END.size
    )
    if signature != b"PK\x05\x06" or comment or disk or first_disk or here != count:
        raise Unsupported("the file does not end with a plain zip end record")
    end = file_size - _END.size
    at = len(tail) - _END.size - _ZIP64_LOCATOR.size
    if at >= 0 and tail[at : at + 4] == b"PK\x06\x07":
        _, disk, where, disks = _ZIP64_LOCATOR.unpack_from(tail, at)
        at -= _ZIP64_END.size
        end = where
        if at < 0 or disk or disks != 1 or where != file_size - len(tail) + at:
            raise Unsupported("the zip64 end record is unusual")
        signature, length, _, _, disk, first_disk, here, count, size, offset = (
            _ZIP64_END.unpack_from(tail, at)
        )
        if signature != b"PK\x06\x06" or length != 44 or disk or first_disk or here != count:
            raise Unsupported("the zip64 end record is unusual")
    if offset + size != end:
        raise Unsupported("the zip directory does not end where the file states")
    return count, size, offset


def data_offset(record: Record, file: Bytes) -> int:
    """Return the offset of the bytes of a record, from its local header. Raises Unsupported."""
    header, expected, size = record
    signature, name_bytes, extra_bytes = file.unpack(_LOCAL_HEADER, header)
    start: int = header + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if signature != LOCAL_SIGNATURE or name_bytes != expected:
        raise Unsupported("a local header and the zip directory do not agree")
    if start + size > file.size:
        raise Unsupported("the file ends before a record does")
    return start
