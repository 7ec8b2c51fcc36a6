"""`.npy` files. Each holds one array, so that a feature is one tensor.

The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import ast
import struct
import sys

import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout
from gpucache_pipes.files.planned import Bytes, PlanReader
from gpucache_pipes.files.plans import Extent, FormParts, ReadPlan, Run, StridedExtent
from gpucache_pipes.files.strided import contiguous_strides

_DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "c16": torch.complex128,
    "c8": torch.complex64,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u8": torch.uint64,
    "u4": torch.uint32,
    "u2": torch.uint16,
    "u1": torch.uint8,
    "b1": torch.bool,
}
_MAX_HEADER_BYTES = 10_000
_FIELDS = {"descr", "fortran_order", "shape"}
_MALFORMED = (
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What `ast.literal_eval` and the lookups in its result raise for a header of another structure."""

_NATIVE = "<|=" if sys.byteorder == "little" else ">|="


class NpyReader(PlanReader):
    """Opens `.npy` files. Arrays of Python objects, records and foreign byte order are Unsupported.

    Files are read at least as strictly as numpy reads them.
    """

    def form(self, file: Bytes, plan: ReadPlan) -> FormParts | None:
        """See PlanReader."""
        starts = [extent.start for extent in plan.extents]
        return FormParts([Run(0, min(starts))]) if starts else None

    def plan(self, file: Bytes) -> ReadPlan:
        """See PlanReader."""
        magic, major, minor = struct.unpack("<6sBB", file.read(0, 8))
        if magic != b"\x93NUMPY" or major not in (1, 2, 3) or minor:
            raise Unsupported("not an .npy file of version 1, 2 or 3")
        width = 2 if major == 1 else 4
        count = int.from_bytes(file.read(8, width), "little")
        if count > _MAX_HEADER_BYTES:
            raise Unsupported(f"the header of {count} bytes is longer than numpy writes")
        start = 8 + width + count
        try:
            encoding = "utf-8" if major == 3 else "latin1"
            header = ast.literal_eval(str(file.read(8 + width, count), encoding))
            if header.keys() != _FIELDS or type(header["fortran_order"]) is not bool:
                raise ValueError("the fields are not those that numpy writes")
            descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
            dtype = _DTYPES.get(descr[1:]) if descr[0] in _NATIVE else None
        except _MALFORMED as error:
            raise Unsupported(f"the header cannot be read ({error!r:.200})") from error
        if dtype is None:
            raise Unsupported(f"arrays of dtype {descr!r:.100} are not supported")
        if type(shape) is not tuple or any(type(size) is not int for size in shape):
            raise Unsupported("the shape is not a tuple of ints")
        if any(not 0 <= size < 1 << 63 for size in shape):
            # Not in the text: Python refuses to print an int of more than 4300 digits.
            raise Unsupported("the array has an impossible shape")
        try:
            layout = Layout.of(0, [(dtype, shape)])
        except ValueError as error:
            raise Unsupported(str(error)) from error
        [leaf] = layout.leaves
        if start + leaf.nbytes > file.size:
            raise Unsupported("the file ends before the array does")
        if not leaf.nbytes:
            return ReadPlan(layout, (), (), ())
        if not fortran or len(shape) < 2:
            return ReadPlan(layout, (), (Extent(start, 0, leaf.nbytes),), ())
        strides = contiguous_strides(shape[::-1])[::-1]
        extent = StridedExtent(start, leaf.nbytes, strides, leaf.dtype, leaf)
        return ReadPlan(layout, (), (), (extent,))
