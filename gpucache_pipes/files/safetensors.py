"""`.safetensors` files: a JSON header, followed by the bytes of the tensors.

The format: https://github.com/huggingface/safetensors#format
"""

import json
import struct
from typing import Any

import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout, flatten
from gpucache_pipes.files.planned import MAX_PLAN_COST, Bytes, PlanReader
from gpucache_pipes.files.plans import Extent, FormParts, ReadPlan, Run

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_PLANS = 4096
_MAX_DIMENSIONS = 64
"""More than any operation of torch supports."""


class SafetensorsReader(PlanReader):
    """Opens `.safetensors` files. A feature is a dict of tensors, in the order of the header."""

    # Reader threads share `_by_header` without a lock, as they do `PlanReader._plans`: it needs
    # no more than that `get`, `clear` and item assignment of a dict are atomic under the GIL.

    def __init__(self) -> None:
        super().__init__()
        self._by_header: dict[bytes, ReadPlan] = {}

    def form(self, file: Bytes, plan: ReadPlan) -> FormParts | None:
        """See PlanReader."""
        [count] = struct.unpack("<Q", file.read(0, 8))
        return FormParts([Run(0, 8 + count)])

    def plan(self, file: Bytes) -> ReadPlan:
        """See PlanReader."""
        [count] = struct.unpack("<Q", file.read(0, 8))
        header = file.read(8, count)
        plan = self._by_header.get(header)
        if plan is None:
            try:
                plan = _make_plan(_parse(header), 8 + count, count)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise Unsupported(f"the header cannot be read ({error!r:.200})") from error
            if len(self._by_header) >= _MAX_PLANS:
                self._by_header.clear()
            if plan.cost <= MAX_PLAN_COST:
                self._by_header[header] = plan
        ends = [extent.start + extent.nbytes for extent in plan.extents]
        if max(ends, default=8 + count) != file.size:
            raise Unsupported("the tensors do not end where the file does")
        return plan


def _parse(header: bytes) -> dict[str, Any]:
    """Return the tensors of a header, read at least as strictly as the safetensors library does.

    Raises ValueError or TypeError.
    """
    text = header.decode("utf-8")  # json.loads would accept UTF-16 and UTF-32 as well
    found: dict[str, Any] = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    metadata = found.pop("__metadata__", None)
    if metadata is not None and not (
        type(metadata) is dict and all(type(value) is str for value in metadata.values())
    ):
        raise TypeError("__metadata__ is not a dict of strings")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict that json would make. Raises ValueError if a name occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


class _Saved:
    """A tensor as the header describes it. Raises ValueError, TypeError or KeyError."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.dtype = _DTYPES[description["dtype"]]
        self.shape = tuple(description["shape"])
        self.begin, self.end = description["data_offsets"]
        for number in (*self.shape, self.begin, self.end):
            if type(number) is not int or not 0 <= number < 1 << 63:
                raise ValueError(f"{number!r} is not a size")
        if len(self.shape) > _MAX_DIMENSIONS:
            raise ValueError(f"a shape of {len(self.shape)} dimensions")


def _make_plan(header: dict[str, Any], start: int, count: int) -> ReadPlan:
    """Return the read plan for a header of `count` bytes whose tensors begin at `start`."""
    feature = {name: _Saved(description) for name, description in header.items()}
    # As the library requires, the tensors cover the data exactly once.
    end = 0
    for saved in sorted(feature.values(), key=lambda saved: (saved.begin, saved.end)):
        if saved.begin != end:
            raise ValueError("tensors overlap, or there is a gap between them")
        end = saved.end
    tree, tensors, _ = flatten(feature, _Saved)
    layout = Layout.of(tree, [(tensor.dtype, tensor.shape) for tensor in tensors])
    extents = []
    for tensor, leaf in zip(tensors, layout.leaves, strict=True):
        if tensor.end - tensor.begin != leaf.nbytes:
            raise ValueError("a shape and a number of bytes do not agree")
        if leaf.nbytes:
            extents.append(Extent(start + tensor.begin, leaf.offset, leaf.nbytes))
    cost = layout.cost + 3 * count + 200 * len(extents)
    return ReadPlan(layout, (), tuple(extents), (), cost)
