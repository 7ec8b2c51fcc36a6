"""Reads the pickle of a `torch.save` file without unpickling it.

An interpreter for the few opcodes that torch.save writes for features. It knows a handful of
names (tensors, storages, OrderedDict, bytes, torch.Size) by their spelling, looks up no global,
imports nothing and calls nothing that the file names. What it does not know is Unsupported.

Memory: every object costs at least one byte of pickle, sharing included, and what calls copy is
counted; sizes that the pickle states are only believed where the bytes are there.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpucache_pipes.files.errors import Unsupported


# Not tuples: a feature may hold tuples, and must not be mistaken for these.
@dataclass(frozen=True, slots=True)
class Storage:
    """A record `data/<key>` of `nbytes` bytes; `dtype` is None where tensors name their own."""

    key: str
    dtype: torch.dtype | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of the file: a strided view of a storage. Offset and strides in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Name:
    """A global, by its spelling only."""

    module: str
    name: str


_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}
_PLACES = ("cpu", "cuda", "mps", "xpu")
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


def read_pickle(data: bytes) -> Any:
    """The object in `data`, its tensors as SavedTensors. Raises Unsupported."""
    try:
        return _Reader(data).run()
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
        self.at = 2
        last = len(data) - 1
        operations = _OPERATIONS
        while self.at < last:
            operation = operations[data[self.at]]
            self.at += 1
            operation(self)
        if self.at != last or len(self.stack) != 1 or self.below:
            raise Unsupported("a pickle that does not end where it should")
        return self.stack[0]

    def take(self, layout: struct.Struct) -> Any:
        [number] = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return number

    def bytes_(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if count < 0 or self.at > len(self.data):
            raise Unsupported("a pickle that is cut short")
        return self.data[start : self.at]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        start, self.at = self.at, end + 1
        return self.data[start:end].decode("ascii")

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

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
        if any(type(key) not in _KEYS for key in items[::2]):
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

    def tuple_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def persistent(self) -> None:
        kind, storage, key, place, count = self.stack.pop()
        if kind != "storage" or type(key) is not str or type(place) is not str:
            raise Unsupported("an unusual storage")
        if place.partition(":")[0] not in _PLACES or type(count) is not int or count < 0:
            raise Unsupported(f"a storage on {place!r:.40}")
        if type(storage) is not Name:
            raise Unsupported("an unusual storage")
        if storage == Name("torch.storage", "UntypedStorage"):
            self.push_storage(Storage(key, None, count))
            return
        dtype = _STORAGES.get(storage.name) if storage.module == "torch" else None
        if dtype is None:
            raise Unsupported(f"storages of {storage.module}.{storage.name}")
        self.push_storage(Storage(key, dtype, count * dtype.itemsize))

    def push_storage(self, storage: Storage) -> None:
        if self.storages.setdefault(storage.key, storage) != storage:
            raise Unsupported("one record as two storages")
        self.stack.append(storage)

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise Unsupported("a call of what is no function")
        call = _CALLS.get((function.module, function.name))
        if call is None:
            raise Unsupported(f"{function.module}.{function.name}")
        result = call(*arguments)
        if type(result) in (bytes, torch.Size):
            self.made += len(result)
            if self.made > len(self.data):
                raise Unsupported("a small pickle that makes much")
        self.stack.append(result)

    def global_(self) -> None:
        name = Name(self.line(), self.line())
        dtype = _DTYPES.get(name.name) if name.module == "torch" else None
        self.stack.append(name if dtype is None else dtype)


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> SavedTensor:
    return _checked(storage, storage.dtype, offset, shape, strides, requires_grad, metadata)


def _tensor_with_dtype(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> SavedTensor:
    return _checked(storage, dtype, offset, shape, strides, requires_grad, metadata)


def _checked(
    storage: Any,
    dtype: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    metadata: Any,
) -> SavedTensor:
    """A tensor that lies within its storage, as torch would check it."""
    if type(storage) is not Storage or type(dtype) is not torch.dtype or metadata:
        raise Unsupported("an unusual tensor")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise Unsupported("an unusual shape")
    if requires_grad is not False and not (
        requires_grad is True and (dtype.is_floating_point or dtype.is_complex)
    ):
        raise Unsupported("a tensor that cannot require gradients")
    extent = 1
    for number in (offset, *shape, *strides):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise Unsupported("an unusual shape")
    for side, stride in zip(shape, strides, strict=True):
        extent += (side - 1) * stride
    if 0 not in shape and (offset + extent) * dtype.itemsize > storage.nbytes:
        raise Unsupported("a tensor that is larger than its storage")
    return SavedTensor(storage, dtype, offset, shape, strides)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> SavedTensor:
    if type(data) is not SavedTensor:
        raise Unsupported("an unusual parameter")
    return data


def _encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Unsupported("an unusual encoding")
    return text.encode("latin1")


def _size(sides: Any) -> torch.Size:
    if type(sides) is not tuple or any(type(side) is not int for side in sides):
        raise Unsupported("an unusual torch.Size")
    return torch.Size(sides)


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): lambda: OrderedDict(),
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): _size,
}

_BYTE, _SHORT, _INT = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<i")
_COUNT, _FLOAT = struct.Struct("<I"), struct.Struct(">d")


def _push(value: Any) -> Callable[[_Reader], None]:
    return lambda r: r.stack.append(value)


def _memoize(layout: struct.Struct) -> Callable[[_Reader], None]:
    def put(r: _Reader) -> None:
        r.memo[r.take(layout)] = r.stack[-1]

    return put


# By opcode, as in pickletools.
_OPERATIONS: dict[int, Callable[[_Reader], None]] = {
    ord(code): operation
    for code, operation in {
        "}": lambda r: r.stack.append({}),
        "]": lambda r: r.stack.append([]),
        ")": _push(()),
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "(": _Reader.mark,
        "K": lambda r: r.stack.append(r.take(_BYTE)),
        "M": lambda r: r.stack.append(r.take(_SHORT)),
        "J": lambda r: r.stack.append(r.take(_INT)),
        "G": lambda r: r.stack.append(r.take(_FLOAT)),
        "\x8a": lambda r: r.number(r.take(_BYTE)),
        "X": lambda r: r.stack.append(str(r.bytes_(r.take(_COUNT)), "utf-8", "surrogatepass")),
        "c": _Reader.global_,
        "Q": _Reader.persistent,
        "R": _Reader.reduce,
        "q": _memoize(_BYTE),
        "r": _memoize(_COUNT),
        "h": lambda r: r.stack.append(r.memo[r.take(_BYTE)]),
        "j": lambda r: r.stack.append(r.memo[r.take(_COUNT)]),
        "t": _Reader.tuple_since_mark,
        "\x85": lambda r: r.tuple_(1),
        "\x86": lambda r: r.tuple_(2),
        "\x87": lambda r: r.tuple_(3),
        "s": lambda r: r.set_items([r.stack.pop(-2), r.stack.pop()]),
        "u": lambda r: r.set_items(r.since_mark()),
        "a": lambda r: r.append([r.stack.pop()]),
        "e": lambda r: r.append(r.since_mark()),
    }.items()
}
