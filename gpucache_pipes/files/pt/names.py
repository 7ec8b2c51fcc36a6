"""What the pickle of a `torch.save` file names: tensors, storages, and a handful of functions.

Nothing here is looked up by a name that a file gives but in a table, and nothing of torch is called
but what checks and holds numbers.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpucache_pipes.files.errors import Unsupported


# Not tuples: a feature may hold tuples, and must not be mistaken for these.
@dataclass(slots=True)
class Storage:
    """A record `data/<key>` of `nbytes` bytes; `dtype` is None where tensors name their own."""

    key: str
    dtype: torch.dtype | None
    nbytes: int


@dataclass(slots=True)
class SavedTensor:
    """A tensor of the file: a strided view of a storage. Offset and strides in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class Name:
    """A global, by its spelling only; and what stands for it here, if it is on the list.

    `call` is what calling it means; a storage has a dtype, or None if it is untyped.
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
    """Bytes of an element of a storage of that name (module, space, name); None if not known."""
    module, _, symbol = name.partition(" ")
    if (module, symbol) == ("torch.storage", "UntypedStorage"):
        return 1
    dtype = _STORAGES.get(symbol) if module == "torch" else None
    return None if dtype is None else dtype.itemsize


_MANY = 1 << 63
PLACES = ("cpu", "cuda", "mps", "xpu")


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> SavedTensor:
    dtype = storage.dtype
    _require_data(dtype, requires_grad, hooks)
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
    """A tensor that lies within its storage, as torch would check it.

    With a dtype of its own it may not require gradients: torch.load cannot make one that does.
    """
    if requires_grad is not False or type(hooks) is not OrderedDict or hooks:
        raise Unsupported("a tensor with gradients or hooks")
    if type(storage) is not Storage or type(dtype) is not torch.dtype or metadata:
        raise Unsupported("an unusual tensor")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise Unsupported("an unusual shape")
    extent, numel = 1, 1
    for side, stride in zip(shape, strides, strict=True):
        if not (type(side) is type(stride) is int and 0 <= side < _MANY and 0 <= stride < _MANY):
            raise Unsupported("an unusual shape")
        extent += (side - 1) * stride
        numel *= side
        if numel >= _MANY:
            raise Unsupported("a tensor that no memory could hold")
    if type(offset) is not int or not 0 <= offset < _MANY:
        raise Unsupported("an unusual offset")
    if numel and (offset + extent) * dtype.itemsize > storage.nbytes:
        raise Unsupported("a tensor that is larger than its storage")
    return SavedTensor(storage, dtype, offset, shape, strides)


def _require_data(dtype: torch.dtype, requires_grad: Any, hooks: Any) -> None:
    if type(hooks) is not OrderedDict or hooks:
        raise Unsupported("a tensor with hooks")
    if requires_grad is not False and not (
        requires_grad is True and (dtype.is_floating_point or dtype.is_complex)
    ):
        raise Unsupported("a tensor that cannot require gradients")


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> SavedTensor:
    if type(data) is not SavedTensor:
        raise Unsupported("an unusual parameter")
    _require_data(data.dtype, requires_grad, hooks)
    return data


def _encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Unsupported("an unusual encoding")
    return text.encode("latin1")


def _size(sides: Any) -> torch.Size:
    if type(sides) is not tuple or any(type(side) is not int for side in sides):
        raise Unsupported("an unusual torch.Size")
    return torch.Size(sides)


NAMES: dict[bytes, Name | torch.dtype] = {
    f"{name.module}\n{name.name}".encode(): name
    for name in (
        Name("torch._utils", "_rebuild_tensor_v2", _tensor),
        Name("torch._utils", "_rebuild_tensor_v3", _tensor_with_dtype),
        Name("torch._utils", "_rebuild_parameter", _parameter),
        Name("collections", "OrderedDict", lambda: OrderedDict()),
        Name("_codecs", "encode", _encoded),
        Name("torch", "Size", _size),
        Name("torch.storage", "UntypedStorage", is_storage=True),
        *(Name("torch", name, None, True, dtype) for name, dtype in _STORAGES.items()),
    )
}
NAMES.update((f"torch\n{name}".encode(), dtype) for name, dtype in _DTYPES.items())
