"""What is refused before `torch.load` sees it: files that would bring the process down.

The reader leaves to `torch.load` what it does not know. That has no bounds of its own: it hashes a
key that is a tuple in a tuple in a tuple until the stack of the process is used up, takes a record
that is marked as a directory for one without bytes and returns whatever its memory holds, and
unpacks whatever a compressed record says it holds. No data set has such files.
"""

import io
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from gpucache_pipes.files.zip_directory import LOCAL_BYTES

_LENGTHS = struct.Struct("<HH")

_DIRECTORY = 0x10
"""The attribute of MS-DOS, which is the one that torch looks at."""

_MOST_UNPACKED = 256
"""Bytes that a compressed file may hold for each byte of it."""

_AT_ONCE = 1 << 20
"""Bytes that are unpacked at once."""

_LARGEST_PACKED_PICKLE = 64 << 20
"""Bytes. What torch.save writes is not compressed, and may have any size that the file has."""

_DEEPEST_KEY = 4
"""Tuples in tuples."""

_MOST_PICKLES = 5
"""In a file as torch.save wrote it before 1.6: magic number, protocol, system, feature, keys."""

LARGEST_INT = 1 << 63
"""Of a key. Beyond, hashes repeat: a few thousand keys with one hash take minutes to compare."""


def require_sound(path: str, pickles: bool) -> None:
    """Raise ValueError if the file would harm `torch.load`; with `pickles`, look at these, too.

    A file that is no file of torch.save at all passes: torch.load says so.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            _require_sound_archive(file, pickles)
        elif pickles and start[:1] == b"\x80":
            for _ in range(_MOST_PICKLES):
                _require_sound_pickle(file)
                if not file.peek(1):
                    break


def _require_sound_archive(file: IO[bytes], pickles: bool) -> None:
    size = file.seek(0, 2)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ValueError(f"a damaged zip file ({error})") from error
    records = archive.infolist()
    for record in records:
        if record.external_attr & _DIRECTORY and not record.is_dir():
            raise ValueError(f"a damaged file: its record {record.filename!r} is a directory")
        if not record.compress_type and record.compress_size != record.file_size:
            raise ValueError(f"a damaged file: its record {record.filename!r} has two sizes")
    unpacked = sum(record.file_size for record in records if record.compress_type)
    if unpacked > _MOST_UNPACKED * size:
        raise ValueError(
            f"a file of {size} bytes that unpacks to {unpacked}; save it by torch.save, which "
            "does not compress"
        )
    for record in records:
        is_pickle = pickles and record.filename.endswith("/data.pkl")
        if record.compress_type:
            content = _unpack(file, record, is_pickle)
        elif is_pickle:
            _find(file, record)
            content = file.read(record.file_size)
        if is_pickle:
            _require_sound_pickle(io.BytesIO(content))


def _find(file: IO[bytes], record: zipfile.ZipInfo) -> None:
    """Go to the bytes of a record. Not by zipfile, which looks at what torch.load does not."""
    file.seek(record.header_offset)
    header = file.read(LOCAL_BYTES)
    if len(header) < LOCAL_BYTES:
        raise ValueError(f"a damaged file: its record {record.filename!r} is not there")
    name_bytes, extra_bytes = _LENGTHS.unpack_from(header, 26)
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)


def _unpack(file: IO[bytes], record: zipfile.ZipInfo, keep: bool) -> bytes:
    """Look whether a compressed record is what it says; its bytes, if they are to be kept.

    Where the compressed bytes are damaged, torch.load ends early and says nothing.
    """
    if record.compress_type != zipfile.ZIP_DEFLATED:
        raise ValueError(f"its record {record.filename!r} is compressed in an unusual way")
    if keep and record.file_size > _LARGEST_PACKED_PICKLE:
        raise ValueError(f"a compressed pickle of {record.file_size} bytes")
    _find(file, record)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    left, size, checksum, kept = record.compress_size, 0, 0, []
    try:
        while left and not unpacker.eof:
            packed = file.read(min(left, _AT_ONCE))
            if not packed:
                break
            left -= len(packed)
            while packed and size <= record.file_size:
                part = unpacker.decompress(packed, _AT_ONCE)
                packed = unpacker.unconsumed_tail
                size += len(part)
                checksum = zlib.crc32(part, checksum)
                if keep:
                    kept.append(part)
    except zlib.error as error:
        raise ValueError(f"a damaged record {record.filename!r} ({error})") from error
    if not unpacker.eof or size != record.file_size or checksum != record.CRC:
        raise ValueError(f"a damaged record {record.filename!r}")
    return b"".join(kept)


def _require_sound_pickle(file: Any) -> None:
    """Follow the depth of tuples through the pickle; nothing of it is made."""
    try:
        _Scan().run(pickletools.genops(file))
    except _MalformedError as error:
        raise ValueError(f"a damaged pickle ({error})") from error
    except LookupError as error:
        raise ValueError("a damaged pickle, which takes what is not there") from error


class _MalformedError(ValueError):
    """Not a pickle."""


Item = tuple[int, bool]
"""What is known of an object: tuples in tuples that it has, and whether it may be a key."""

_PLAIN: Item = (0, True)
_HASHING = {"collections OrderedDict", "collections Counter", "builtins set", "builtins frozenset"}
_MARK = object()


class _Scan:
    """A stack machine like that of pickle, over `Item`s.

    What is put into a list or dict later may be deeper than what is known of it; but these are not
    hashed, and neither is a tuple that has one.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # The deepest tuple so far, and whether something hashes what it finds in its arguments.
        self.deepest = 0
        self.hashes = False

    def run(self, operations: Iterator[tuple[Any, Any, Any]]) -> None:
        while True:
            try:
                opcode, argument, _ = next(operations)
            except StopIteration:
                break
            except (ValueError, MemoryError, OverflowError) as error:
                raise _MalformedError(str(error)) from error
            self.step(opcode, argument)
        if self.hashes and self.deepest > _DEEPEST_KEY:
            raise ValueError(f"keys that may be tuples, {self.deepest} of them in one another")

    def step(self, opcode: Any, argument: Any) -> None:
        name, stack = opcode.name, self.stack
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP_MARK":
            self.since_mark()
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if name == "SETITEMS" else self.take(2)
            for key in items[::2]:
                _require_key(key)
        elif name.startswith("TUPLE"):
            self.push_tuple(self.since_mark() if name == "TUPLE" else self.take(int(name[5:])))
        elif name == "REDUCE":
            arguments, function = self.take(2)[::-1]
            self.hashes |= function in _HASHING and arguments != _EMPTY
            stack.append(_made_of([arguments]))
        elif name in ("GLOBAL", "INST"):
            taken = self.since_mark() if name == "INST" else []
            stack.append(argument if name == "GLOBAL" else _made_of(taken))
        else:
            self.by_its_description(opcode, argument)

    def by_its_description(self, opcode: Any, argument: Any) -> None:
        """Any other one, by what `pickletools` says that it takes and leaves."""
        before, after = opcode.stack_before, opcode.stack_after
        if pickletools.markobject in before:
            taken = self.since_mark()
            more = before.index(pickletools.markobject)
            taken = self.take(more) + taken
        else:
            taken = self.take(len(before))
        if opcode.name in ("ADDITEMS", "FROZENSET"):
            self.hashes = True
        for _ in after:
            if type(argument) is int and not -LARGEST_INT <= argument < LARGEST_INT:
                self.stack.append((0, False))
            elif opcode.name == "EMPTY_TUPLE":
                self.stack.append(_EMPTY)
            else:
                # Lists and dicts are no keys, but that is for who makes one of them to say.
                self.stack.append(_made_of(taken))

    def push_tuple(self, items: list[Any]) -> None:
        depth, may_be_key = _made_of(items)
        self.deepest = max(self.deepest, depth + 1)
        self.stack.append((depth + 1, may_be_key and depth < _DEEPEST_KEY))

    def take(self, count: int) -> list[Any]:
        stack = self.stack
        if len(stack) < count:
            raise LookupError
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def since_mark(self) -> list[Any]:
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise LookupError
        taken = stack[at + 1 :]
        del stack[at:]
        return taken


_EMPTY: Item = (1, True)


def _made_of(items: Iterable[Any]) -> Item:
    """What is known of an object that holds these; a name (str) is as plain as a number."""
    depth, may_be_key = _PLAIN
    for item in items:
        if item is _MARK:
            raise LookupError
        if type(item) is tuple:
            depth = max(depth, item[0])
            may_be_key &= item[1]
    return depth, may_be_key


def _require_key(key: Any) -> None:
    if type(key) is tuple and not key[1]:
        raise ValueError(
            f"a key that is a tuple, {key[0]} of them in one another, or a number beyond 64 bits"
            if key[0]
            else "a key that is a number beyond 64 bits"
        )
