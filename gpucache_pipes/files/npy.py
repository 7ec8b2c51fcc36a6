"""`.npy` files: one array. A feature is one tensor.

The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import ast
import struct
import sys

import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout
from gpucache_pipes.files.planned import Bytes, Extent, Plan, PlanReader, View

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
_LONGEST_HEADER = 10_000
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
_NATIVE = "<|=" if sys.byteorder == "little" else ">|="


class NpyReader(PlanReader):
    """Opens `.npy` files; arrays of Python objects, records and foreign byte order it refuses."""

    def plan(self, file: Bytes) -> Plan:
        """See PlanReader."""
        magic, major, minor = struct.unpack("<6sBB", file.read(0, 8))
        if magic != b"\x93NUMPY" or major not in (1, 2, 3) or minor:
            raise Unsupported("not an .npy file, or of a version that is not known")
        width = 2 if major == 1 else 4
        count = int.from_bytes(file.read(8, width), "little")
        if count > _LONGEST_HEADER:
            raise Unsupported("a header that is longer than numpy writes")
        start = 8 + width + count
        try:
            encoding = "utf-8" if major == 3 else "latin1"
            header = ast.literal_eval(str(file.read(8 + width, count), encoding))
            if header.keys() != _FIELDS or type(header["fortran_order"]) is not bool:
                raise ValueError("other fields than numpy writes")
            descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
            dtype = _DTYPES.get(descr[1:]) if descr[0] in _NATIVE else None
        except _MALFORMED as error:
            raise Unsupported(f"an unusual header: {error!r:.200}") from error
        if dtype is None or type(shape) is not tuple or any(type(n) is not int for n in shape):
            raise Unsupported(f"arrays of {descr!r}")
        if any(not 0 <= side < 1 << 63 for side in shape):
            raise Unsupported("an impossible size")
        try:
            layout = Layout.of(0, [(dtype, shape)])
        except ValueError as error:
            raise Unsupported(str(error)) from error
        [leaf] = layout.leaves
        if start + leaf.nbytes > file.size:
            raise Unsupported("the array ends behind the end of the file")
        if not leaf.nbytes:
            return Plan(layout, (), (), ())
        if not fortran or len(shape) < 2:
            return Plan(layout, (), (Extent(start, 0, leaf.nbytes),), ())
        strides, step = [], 1
        for side in shape:
            strides.append(step)
            step *= side
        return Plan(layout, (), (), (View(start, leaf.nbytes, tuple(strides), leaf),))
