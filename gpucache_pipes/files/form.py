"""What the bytes of a `torch.save` file mean, remembered for the other files of its data set."""

import struct
from collections.abc import Sequence

from gpucache_pipes.files import zip_directory as zips
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout, flatten
from gpucache_pipes.files.pickle_reader import Name, SavedTensor, Storage, read_pickle
from gpucache_pipes.files.planned import DEAREST as _DEAREST
from gpucache_pipes.files.planned import Bytes, Move, Plan, View

_MOST_PLANS = 4096
_LENGTHS = struct.Struct("<HH")

# What the small records say: exactly, or as torch.load would still accept it.
_EXACT = {"version": b"3\n", "byteorder": b"little", ".format_version": b"1"}
_DIGITS = (".storage_alignment", ".data/serialization_id")


class Form:
    """The zip directory of a file, with what its local headers and small records say.

    Files of one data set share their form: it is compared with a file by two precompiled
    structs, and then all that the plan depends on is the pickle.
    """

    def __init__(self, file: Bytes, directory: zips.Directory) -> None:
        self.directory = directory
        self._plans: dict[bytes, Plan] = {}
        self._starts: dict[str, int] = {}
        # (offset, count) of what is looked at in a file, what must be there (None: it depends),
        # and which record those are for which it depends.
        self._pieces: list[tuple[int, int]] = []
        self._expected: list[bytes | None] = []
        self._looked_at: list[str] = []
        contents = []
        for name, record in sorted(directory.records.items(), key=lambda item: item[1].header):
            start = zips.data_offset(record, file)
            self._starts[name] = start
            extra_bytes = start - record.header - zips.LOCAL_BYTES - record.name_bytes
            self._pieces += [(record.header, 4), (record.header + 26, 4)]
            self._expected += [zips.LOCAL_SIGNATURE, _LENGTHS.pack(record.name_bytes, extra_bytes)]
            number = name.removeprefix("data/")
            if name in _EXACT or name in _DIGITS or name == "data.pkl":
                self._pieces.append((start, record.size))
                self._expected.append(None)
                self._looked_at.append(name)
                contents.append(file.read(start, record.size))
            elif number == name or not number.isdecimal():
                raise Unsupported(f"the record {name!r}")
        if "data.pkl" not in directory.records or "version" not in directory.records:
            raise Unsupported("no data.pkl, or no version")
        if self._pieces[0][0]:
            raise Unsupported("something in front of the zip file")
        self.first_plan = self._plan_by(contents)
        self._struct: struct.Struct | None = None

    def plan(self, file: Bytes, raw: bytes) -> Plan | None:
        """The plan for a file whose directory is `raw`; None if it has another form.

        Raises Unsupported.
        """
        if not self.directory.same(raw):
            return None
        if file.whole is not None:
            if self._struct is None:
                self._struct = _with_gaps(self._pieces)
            fields: Sequence[bytes] = self._struct.unpack_from(file.whole)
        else:
            fields = [file.read(at, count) for at, count in self._pieces]
        contents = []
        for field, expected in zip(fields, self._expected, strict=True):
            if expected is None:
                contents.append(field)
            elif field != expected:
                return None
        return self._plan_by(contents)

    def _plan_by(self, contents: Sequence[bytes]) -> Plan:
        pickle = b""
        for name, content in zip(self._looked_at, contents, strict=True):
            if name == "data.pkl":
                pickle = content
            elif content != _EXACT[name] if name in _EXACT else not content.isdigit():
                raise Unsupported(f"the record {name!r} says something unusual")
        plan = self._plans.get(pickle)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._make_plan(pickle)
            if plan.cost <= _DEAREST:
                self._plans[pickle] = plan
        return plan

    def _make_plan(self, pickle: bytes) -> Plan:
        try:
            tree, tensors, values = flatten(read_pickle(pickle), SavedTensor)
        except (TypeError, ValueError, RecursionError) as error:
            raise Unsupported(str(error)) from error
        if any(isinstance(value, (Name, Storage)) for value in values):
            raise Unsupported("a name or a storage stands where a value should")
        layout = Layout.of(tree, [(tensor.dtype, tensor.shape) for tensor in tensors])
        moves, views = [], []
        for tensor, leaf in zip(tensors, layout.leaves, strict=True):
            name = f"data/{tensor.storage.key}"
            record = self.directory.records.get(name)
            if record is None or record.size != tensor.storage.nbytes:
                raise Unsupported("a storage and its record are of different sizes")
            start = self._starts[name] + tensor.offset * leaf.dtype.itemsize
            if not leaf.nbytes:
                continue
            if _contiguous(tensor):
                moves.append(Move(start, leaf.offset, leaf.nbytes))
            else:
                sides = zip(tensor.shape, tensor.strides, strict=True)
                extent = 1 + sum((side - 1) * stride for side, stride in sides)
                views.append(View(start, extent * leaf.dtype.itemsize, tensor.strides, leaf))
        cost = 8 * len(pickle)
        return Plan(layout, tuple(values), tuple(moves), tuple(views), cost)


def _with_gaps(pieces: list[tuple[int, int]]) -> struct.Struct:
    """One struct for all the pieces of a file, which are in order."""
    codes, at = ["<"], 0
    for start, count in pieces:
        if start < at:
            raise Unsupported("records that overlap")
        codes.append(f"{start - at}x{count}s")
        at = start + count
    return struct.Struct("".join(codes))


def _contiguous(tensor: SavedTensor) -> bool:
    expected = 1
    for side, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if side != 1 and stride != expected:
            return False
        expected *= side
    return True
