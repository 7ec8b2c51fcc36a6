"""What the bytes of a `torch.save` file mean, remembered for the other files of its data set."""

import struct
from collections.abc import Sequence
from operator import itemgetter

from gpucache_pipes.files import zip_directory as zips
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout, flatten
from gpucache_pipes.files.pickle_reader import Name, SavedTensor, Storage, read_pickle
from gpucache_pipes.files.planned import DEAREST as _DEAREST
from gpucache_pipes.files.planned import Bytes, Move, Plan, View

_LENGTHS = struct.Struct("<HH")

# What the small records say: exactly, or as torch.load would still accept it.
_EXACT = {"version": b"3\n", "byteorder": b"little", ".format_version": b"1"}
_DIGITS = (".storage_alignment", ".data/serialization_id")


class Form:
    """The zip directory of a file, with what its local headers and small records say.

    Files of one data set share their form. `plan` compares it with another file of the same
    size by two precompiled structs; all that the plan then depends on is the pickle.

    Attributes:
        cost: about how many bytes it takes to remember it, with its plans.
    """

    def __init__(self, file: Bytes) -> None:
        self._directory = zips.Directory(file)
        records = self._directory.records
        if "data.pkl" not in records or "version" not in records:
            raise Unsupported("no data.pkl, or no version")
        self._plans: dict[bytes, Plan] = {}
        self._starts: dict[str, int] = {}
        # (offset, count) of what is looked at in a file, and which of those are constant,
        # digits, or the pickle.
        self._pieces: list[tuple[int, int]] = []
        constants: list[int] = []
        self._digits: list[int] = []
        found: list[bytes] = []
        for name, record in sorted(records.items(), key=lambda item: item[1].header):
            start = zips.data_offset(record, file)
            self._starts[name] = start
            extra_bytes = start - record.header - zips.LOCAL_BYTES - record.name_bytes
            constants += [len(found), len(found) + 1]
            self._pieces += [(record.header, 4), (record.header + 26, 4)]
            found += [zips.LOCAL_SIGNATURE, _LENGTHS.pack(record.name_bytes, extra_bytes)]
            number = name.removeprefix("data/")
            if name != number and number.isdecimal():
                continue
            if name in _EXACT:
                constants.append(len(found))
            elif name in _DIGITS:
                self._digits.append(len(found))
            elif name == "data.pkl":
                self._pickle = len(found)
            else:
                raise Unsupported(f"the record {name!r}")
            self._pieces.append((start, record.size))
            found.append(file.read(start, record.size))
            if found[-1] != _EXACT.get(name, found[-1]):
                raise Unsupported(f"the record {name!r} says something unusual")
        if self._pieces[0][0]:
            raise Unsupported("something in front of the zip file")
        self._constants = itemgetter(*constants)
        self._expected = self._constants(found)
        self.cost = 3 * self._directory.nbytes + 2000
        plan = self._plan_by(found)
        if plan is None:
            raise Unsupported("a record of digits says something else")
        self.first_plan = plan
        self._struct: struct.Struct | None = None

    def plan(self, file: Bytes) -> Plan | None:
        """The plan for a file of the same size; None if it has another form.

        Raises Unsupported.
        """
        directory = self._directory
        if file.whole is not None:
            if not directory.same(file.whole, directory.offset):
                return None
            if self._struct is None:
                self._struct = _with_gaps(self._pieces)
            fields: Sequence[bytes] = self._struct.unpack_from(file.whole)
        else:
            if not directory.same(file.read(directory.offset, directory.nbytes), 0):
                return None
            fields = [file.read(at, count) for at, count in self._pieces]
        if self._constants(fields) != self._expected:
            return None
        return self._plan_by(fields)

    def _plan_by(self, fields: Sequence[bytes]) -> Plan | None:
        for number in self._digits:
            if not fields[number].isdigit():
                return None
        pickle = fields[self._pickle]
        plan = self._plans.get(pickle)
        if plan is None:
            plan = self._make_plan(pickle)
            if plan.cost <= _DEAREST:
                self.cost += plan.cost
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
            record = self._directory.records.get(name)
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
