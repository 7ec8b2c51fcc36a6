"""Reads the pickle of a `torch.save` file without unpickling it.

This is an interpreter for the few opcodes that torch.save writes for features. It recognizes a
handful of globals (tensors, storages, OrderedDict, bytes, torch.Size) by their spelling. It looks
up no global, imports nothing and calls nothing that the file names. Anything else is Unsupported.

Memory is bounded by a multiple of the pickle's size. Every object costs at least one byte of
pickle, also where a part is shared; what calls copy is counted; and a size that the pickle states
is only believed where the bytes are there.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.pt.names import ALLOWED_GLOBALS, DEVICE_TYPES, AllowedGlobal, Storage
from gpucache_pipes.files.pt.pickle_scan import MAX_INT_KEY

_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""What the interpreter raises for a pickle that does not follow the rules of its opcodes."""

_KEY_TYPES = (str, int, float, bool, bytes, type(None))


def read_pickle(data: bytes) -> tuple[Any, Collection[Storage]]:
    """Return the object in `data` and all storages that the pickle names.

    Tensors in the object are SavedTensors. A global or a storage that stands where a value should
    is an AllowedGlobal or a Storage, which the caller must refuse. Raises Unsupported.
    """
    reader = _Reader(data)
    try:
        return reader.run(), reader.storages.values()
    except _MALFORMED as error:
        raise Unsupported(f"the pickle cannot be read ({error!r:.200})") from error


class _Reader:
    """The state of the interpreter.

    Attributes:
        at: the position in `data`.
        stack: the objects since the last mark.
        metastack: the stacks below each mark, as in pickle.py.
        storages: by key, so that a record cannot be two storages.
        copied_bytes: bytes that calls have made; no more than the pickle has.
        memo: the objects that the pickle has numbered.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.storages: dict[str, Storage] = {}
        self.copied_bytes = 0
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data = self.data
        if data[:2] != b"\x80\x02" or data[-1:] != b".":
            raise Unsupported("the pickle has another protocol than 2")
        at, last = 2, len(data) - 1
        stack, metastack, memo = self.stack, self.metastack, self.memo
        # The opcodes that torch.save writes most are handled here, the most frequent first: a call
        # for each would double the time. An operand that is cut short makes `at` exceed `last`.
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
                metastack.append(stack)
                stack = []
            elif code == 0x74:  # TUPLE
                items = tuple(stack)
                stack = metastack.pop()
                stack.append(items)
            elif code == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif code == 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            elif code == 0x63:  # GLOBAL
                end = data.index(b"\n", data.index(b"\n", at) + 1)
                if (known := ALLOWED_GLOBALS.get(data[at:end])) is None:
                    spelling = data[at:end].decode("ascii").replace("\n", ".")
                    raise Unsupported(f"the pickle names {spelling:.200}")
                stack.append(known)
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
        if at != last or len(stack) != 1 or metastack:
            raise Unsupported("the pickle does not end where it should")
        return stack[0]

    def read_number(self, layout: struct.Struct) -> Any:
        [number] = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return number

    def read_bytes(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if count < 0 or self.at > len(self.data):
            raise Unsupported("the pickle is cut short")
        return self.data[start : self.at]

    def pop_mark(self) -> list[Any]:
        """Return the objects since the last mark; the stack below it is the stack again."""
        items = self.stack
        self.stack = self.metastack.pop()
        return items

    def push_long(self, count: int) -> None:
        """LONG1: an int of `count` bytes."""
        self.stack.append(int.from_bytes(self.read_bytes(count), "little", signed=True))

    def set_items(self, items: list[Any]) -> None:
        """SETITEM, SETITEMS: put keys and values, which alternate, into a dict."""
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise Unsupported("the pickle sets items of an object that is not a dict")
        for key in items[::2]:
            kind = type(key)
            if kind is not str and (
                kind not in _KEY_TYPES or (kind is int and not -MAX_INT_KEY <= key < MAX_INT_KEY)
            ):
                raise Unsupported(
                    "a key of a dict is a number beyond 64 bits, or of a type other than str, int, "
                    "float, bool, bytes and None"
                )
        target.update(zip(items[::2], items[1::2], strict=True))

    def extend_list(self, items: list[Any]) -> None:
        """APPEND, APPENDS."""
        target = self.stack[-1]
        if type(target) is not list:
            raise Unsupported("the pickle appends to an object that is not a list")
        target.extend(items)

    def push_tuple(self, count: int) -> None:
        """TUPLE2, TUPLE3: a tuple of the last `count` objects."""
        stack = self.stack
        if len(stack) < count:
            raise Unsupported("the pickle makes a tuple of objects that it does not have")
        stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]

    def push_storage(self) -> None:
        """BINPERSID: torch.save names storages by ("storage", class, key, device, elements)."""
        identity = self.stack.pop()
        if type(identity) is not tuple:
            raise Unsupported("a storage is named in an unusual way")
        kind, storage, key, device, count = identity
        if kind != "storage" or type(key) is not str or type(device) is not str:
            raise Unsupported("a storage is named in an unusual way")
        if device.partition(":")[0] not in DEVICE_TYPES:
            raise Unsupported(f"a storage was saved from the device {device!r:.40}")
        if type(count) is not int or count < 0 or type(storage) is not AllowedGlobal:
            raise Unsupported("a storage is named in an unusual way")
        if not storage.is_storage:
            raise Unsupported(f"a storage is a {storage.module}.{storage.name}")
        dtype = storage.dtype
        new = Storage(key, dtype, count if dtype is None else count * dtype.itemsize)
        if self.storages.setdefault(key, new) != new:
            raise Unsupported("one record is named as two storages")
        self.stack.append(new)

    def call(self) -> None:
        """REDUCE: the result of the function that stands for a global."""
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(function) is not AllowedGlobal or type(arguments) is not tuple:
            raise Unsupported("the pickle calls an object that is not a function")
        if function.call is None:
            raise Unsupported(f"the pickle calls {function.module}.{function.name}")
        result = function.call(*arguments)
        if type(result) in (bytes, torch.Size):
            self.copied_bytes += len(result)
            if self.copied_bytes > len(self.data):
                raise Unsupported("the calls of the pickle make more bytes than it has")
        self.stack.append(result)


_BYTE, _INT = struct.Struct("<B"), struct.Struct("<i")
_COUNT, _FLOAT = struct.Struct("<I"), struct.Struct(">d")


def _push(value: Any) -> Callable[[_Reader], None]:
    return lambda r: r.stack.append(value)


def _put(r: _Reader) -> None:
    r.memo[r.read_number(_COUNT)] = r.stack[-1]


# By opcode, as in pickletools. The frequent ones are in _Reader.run.
_OPERATIONS: dict[int, Callable[[_Reader], None]] = {
    ord(code): operation
    for code, operation in {
        "}": lambda r: r.stack.append({}),
        "]": lambda r: r.stack.append([]),
        "N": _push(None),
        "\x88": _push(True),
        "J": lambda r: r.stack.append(r.read_number(_INT)),
        "G": lambda r: r.stack.append(r.read_number(_FLOAT)),
        "\x8a": lambda r: r.push_long(r.read_number(_BYTE)),
        "Q": _Reader.push_storage,
        "R": _Reader.call,
        "r": _put,
        "j": lambda r: r.stack.append(r.memo[r.read_number(_COUNT)]),
        "\x86": lambda r: r.push_tuple(2),
        "\x87": lambda r: r.push_tuple(3),
        "s": lambda r: r.set_items([r.stack.pop(-2), r.stack.pop()]),
        "u": lambda r: r.set_items(r.pop_mark()),
        "a": lambda r: r.extend_list([r.stack.pop()]),
        "e": lambda r: r.extend_list(r.pop_mark()),
    }.items()
}
