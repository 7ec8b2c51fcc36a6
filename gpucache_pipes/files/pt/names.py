"""The globals that the pickle of a `torch.save` file may name, and what the reader makes of them.

A name from a file is looked up in one table, `ALLOWED_GLOBALS`, and nowhere else. The functions
that stand for the globals check their arguments and return plain descriptions; of torch they use
dtypes and torch.Size only.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpucache_pipes.files.errors import Unsupported


# Storage and SavedTensor are not tuples: a feature may hold tuples, which are containers.
@dataclass(slots=True)
class Storage:
    """A storage that the pickle names.

    Attributes:
        key: the bytes of the storage are the record `data/<key>`.
        dtype: the dtype of its elements; None if it is untyped, so that tensors name their own.
        nbytes: its size in bytes, as the pickle states it.
    """

    key: str
    dtype: torch.dtype | None
    nbytes: int


@dataclass(slots=True)
class SavedTensor:
    """A tensor of the file: a strided view of a storage.

    Attributes:
        storage: the storage.
        dtype: the dtype of the elements.
        offset: the first element in the storage, in elements.
        shape: the dimensions, in elements.
        strides: the strides, in elements.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class AllowedGlobal:
    """A global that a pickle may name, with the function that stands for it in the reader.

    Attributes:
        module: the module that the pickle names; it is not imported.
        name: the name in the module.
        call: called where the pickle calls the global; None if it may not be called.
        is_storage: whether it is a class of storages.
        dtype: for a class of storages, the dtype of the elements; None if it is untyped.
    """

    module: str
    name: str
    call: Callable[..., Any] | None = None
    is_storage: bool = False
    dtype: torch.dtype | None = None


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


def storage_itemsize(name: str) -> int | None:
    """Return the bytes of an element of a storage class; None for an unknown class.

    `name` is spelled as pickletools prints a global: the module, a space, and the name.
    """
    module, _, symbol = name.partition(" ")
    if (module, symbol) == ("torch.storage", "UntypedStorage"):
        return 1
    dtype = _STORAGES.get(symbol) if module == "torch" else None
    return None if dtype is None else dtype.itemsize


_INT64_LIMIT = 1 << 63
DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
"""Types of the devices from which a storage may have been saved."""


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> SavedTensor:
    """Stands for torch._utils._rebuild_tensor_v2."""
    dtype = storage.dtype
    _check_gradients(dtype, requires_grad, hooks)
    return _tensor_with_dtype(storage, offset, shape, strides, False, hooks, dtype, metadata)


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
    """Stands for torch._utils._rebuild_tensor_v3: the tensor has a dtype of its own.

    The tensor must lie within its storage; torch checks that too. It may not require gradients:
    torch.load cannot make such a tensor that does.
    """
    if requires_grad is not False or type(hooks) is not OrderedDict or hooks:
        raise Unsupported("a tensor has gradients or hooks")
    if type(storage) is not Storage or type(dtype) is not torch.dtype or metadata:
        raise Unsupported("a tensor has metadata, or an unknown storage or dtype")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise Unsupported("a shape and its strides do not agree")
    extent, numel = 1, 1
    for size, stride in zip(shape, strides, strict=True):
        if not (
            type(size) is type(stride) is int
            and 0 <= size < _INT64_LIMIT
            and 0 <= stride < _INT64_LIMIT
        ):
            raise Unsupported("a tensor has an impossible shape or stride")
        extent += (size - 1) * stride
        numel *= size
        if numel >= _INT64_LIMIT:
            raise Unsupported("a tensor has a shape that no memory could hold")
    if type(offset) is not int or not 0 <= offset < _INT64_LIMIT:
        raise Unsupported("a tensor has an impossible offset")
    if numel and (offset + extent) * dtype.itemsize > storage.nbytes:
        raise Unsupported("a tensor is larger than its storage")
    return SavedTensor(storage, dtype, offset, shape, strides)


def _check_gradients(dtype: torch.dtype, requires_grad: Any, hooks: Any) -> None:
    """Raise Unsupported for hooks, and where torch.load could not set `requires_grad`."""
    if type(hooks) is not OrderedDict or hooks:
        raise Unsupported("a tensor has hooks")
    if requires_grad is not False and not (
        requires_grad is True and (dtype.is_floating_point or dtype.is_complex)
    ):
        raise Unsupported("a tensor requires gradients, which its dtype does not have")


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> SavedTensor:
    """Stands for torch._utils._rebuild_parameter."""
    if type(data) is not SavedTensor:
        raise Unsupported("a parameter does not hold a tensor")
    _check_gradients(data.dtype, requires_grad, hooks)
    return data


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands for _codecs.encode, by which pickles of protocol 2 hold bytes."""
    if type(text) is not str or encoding != "latin1":
        raise Unsupported("bytes are saved in another encoding than latin1")
    return text.encode("latin1")


def _size(sizes: Any) -> torch.Size:
    """Stands for torch.Size."""
    if type(sizes) is not tuple or any(type(size) is not int for size in sizes):
        raise Unsupported("a torch.Size holds other values than ints")
    return torch.Size(sizes)


ALLOWED_GLOBALS: dict[bytes, AllowedGlobal | torch.dtype] = {
    f"{name.module}\n{name.name}".encode(): name
    for name in (
        AllowedGlobal("torch._utils", "_rebuild_tensor_v2", _tensor),
        AllowedGlobal("torch._utils", "_rebuild_tensor_v3", _tensor_with_dtype),
        AllowedGlobal("torch._utils", "_rebuild_parameter", _parameter),
        AllowedGlobal("collections", "OrderedDict", lambda: OrderedDict()),
        AllowedGlobal("_codecs", "encode", _encode),
        AllowedGlobal("torch", "Size", _size),
        AllowedGlobal("torch.storage", "UntypedStorage", is_storage=True),
        *(AllowedGlobal("torch", name, None, True, dtype) for name, dtype in _STORAGES.items()),
    )
}
"""By the operand of the GLOBAL opcode: the module, a newline, and the name."""

ALLOWED_GLOBALS.update((f"torch\n{name}".encode(), dtype) for name, dtype in _DTYPES.items())
