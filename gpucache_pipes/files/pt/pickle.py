"""Reads the pickle of a `torch.save` file without unpickling it.

An interpreter for the few opcodes that torch.save writes for features. It knows a handful of
names (tensors, storages, OrderedDict, bytes, torch.Size) by their spelling, looks up no global,
imports nothing and calls nothing that the file names. What it does not know is Unsupported.

Memory: every object costs at least one byte of pickle, sharing included, and what calls copy is
counted; sizes that the pickle states are only believed where the bytes are there.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.pt.names import NAMES, PLACES, Name, Storage
from gpucache_pipes.files.pt.pickle_scan import LARGEST_INT

_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
_KEYS = (str, int, float, bool, bytes, type(None))


def read_pickle(data: bytes) -> tuple[Any, Collection[Storage]]:
    """The object in `data`, its tensors as SavedTensors, and all storages. Raises Unsupported."""
    reader = _Reader(data)
    try:
        return reader.run(), reader.storages.values()
    except _MALFORMED as error:
        raise Unsupported(f"an unusual pickle: {error!r}") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        # What lies below each mark.
        self.below: list[list[Any]] = []
        # One record is one storage; and bytes that calls have made, of which there may be no
        # more than a multiple of the pickle.
        self.storages: dict[str, Storage] = {}
        self.made = 0
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data = self.data
        if data[:2] != b"\x80\x02" or data[-1:] != b".":
            raise Unsupported("a pickle of another protocol")
        at, last = 2, len(data) - 1
        stack, below, memo = self.stack, self.below, self.memo
        # What torch.save writes most is done here, the most frequent first: a call for each would
        # double the time. An operand that is cut short ends behind `last`.
        while at < last:
            code = data[at]
            at += 1
            if code == 0x71:  # BINPUT
                memo[data[at]] = stack[-1]
                at += 1
            elif code == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif code == 0x58:  # BINUNICODE
                end = at + 4 + int.from_bytes(data[at : at + 4], "little")
                stack.append(str(data[at + 4 : end], "utf-8", "surrogatepass"))
                at = end
            elif code == 0x28:  # MARK
                below.append(stack)
                stack = []
            elif code == 0x74:  # TUPLE
                items = tuple(stack)
                stack = below.pop()
                stack.append(items)
            elif code == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif code == 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            elif code == 0x63:  # GLOBAL
                end = data.index(b"\n", data.index(b"\n", at) + 1)
                if (name := NAMES.get(data[at:end])) is None:
                    raise Unsupported(data[at:end].decode("ascii").replace("\n", "."))
                stack.append(name)
                at = end + 1
            elif code == 0x4D:  # BININT2
                stack.append(data[at] | data[at + 1] << 8)
                at += 2
            elif code == 0x89:  # NEWFALSE
                stack.append(False)
            elif code == 0x29:  # EMPTY_TUPLE
                stack.append(())
            else:
                self.at, self.stack = at, stack
                _OPERATIONS[code](self)
                at, stack = self.at, self.stack
        if at != last or len(stack) != 1 or below:
            raise Unsupported("a pickle that does not end where it should")
        return stack[0]

    def take(self, layout: struct.Struct) -> Any:
        [number] = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return number

    def bytes_(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if count < 0 or self.at > len(self.data):
            raise Unsupported("a pickle that is cut short")
        return self.data[start : self.at]

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def number(self, count: int) -> None:
        self.stack.append(int.from_bytes(self.bytes_(count), "little", signed=True))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise Unsupported("items of what is no dict")
        for key in items[::2]:
            kind = type(key)
            if kind is not str and (
                kind not in _KEYS or (kind is int and not -LARGEST_INT <= key < LARGEST_INT)
            ):
                raise Unsupported("an unusual key")
        target.update(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Unsupported("elements of what is no list")
        target.extend(items)

    def tuple_(self, count: int) -> None:
        stack = self.stack
        if len(stack) < count:
            raise Unsupported("a tuple of what is not there")
        stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]

    def persistent(self) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple:
            raise Unsupported("an unusual storage")
        kind, storage, key, place, count = identity
        if kind != "storage" or type(key) is not str or type(place) is not str:
            raise Unsupported("an unusual storage")
        if place.partition(":")[0] not in PLACES or type(count) is not int or count < 0:
            raise Unsupported(f"a storage on {place!r:.40}")
        if type(storage) is not Name:
            raise Unsupported("an unusual storage")
        if not storage.is_storage:
            raise Unsupported(f"storages of {storage.module}.{storage.name}")
        dtype = storage.dtype
        new = Storage(key, dtype, count if dtype is None else count * dtype.itemsize)
        if self.storages.setdefault(key, new) != new:
            raise Unsupported("one record as two storages")
        self.stack.append(new)

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise Unsupported("a call of what is no function")
        if function.call is None:
            raise Unsupported(f"{function.module}.{function.name}")
        result = function.call(*arguments)
        if type(result) in (bytes, torch.Size):
            self.made += len(result)
            if self.made > len(self.data):
                raise Unsupported("a small pickle that makes much")
        self.stack.append(result)


_BYTE, _INT = struct.Struct("<B"), struct.Struct("<i")
_COUNT, _FLOAT = struct.Struct("<I"), struct.Struct(">d")


def _push(value: Any) -> Callable[[_Reader], None]:
    return lambda r: r.stack.append(value)


def _put(r: _Reader) -> None:
    r.memo[r.take(_COUNT)] = r.stack[-1]


# By opcode, as in pickletools; those that are frequent are in _Reader.run.
_OPERATIONS: dict[int, Callable[[_Reader], None]] = {
    ord(code): operation
    for code, operation in {
        "}": lambda r: r.stack.append({}),
        "]": lambda r: r.stack.append([]),
        "N": _push(None),
        "\x88": _push(True),
        "J": lambda r: r.stack.append(r.take(_INT)),
        "G": lambda r: r.stack.append(r.take(_FLOAT)),
        "\x8a": lambda r: r.number(r.take(_BYTE)),
        "Q": _Reader.persistent,
        "R": _Reader.reduce,
        "r": _put,
        "j": lambda r: r.stack.append(r.memo[r.take(_COUNT)]),
        "\x86": lambda r: r.tuple_(2),
        "\x87": lambda r: r.tuple_(3),
        "s": lambda r: r.set_items([r.stack.pop(-2), r.stack.pop()]),
        "u": lambda r: r.set_items(r.since_mark()),
        "a": lambda r: r.append([r.stack.pop()]),
        "e": lambda r: r.append(r.since_mark()),
    }.items()
}
