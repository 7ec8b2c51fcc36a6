"""What the bytes of a `torch.save` file mean, remembered for the other files of its data set."""

import struct
from collections.abc import Sequence
from operator import itemgetter

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout, flatten
from gpucache_pipes.files.planned import DEAREST as _DEAREST
from gpucache_pipes.files.planned import Bytes, Extent, Plan, View
from gpucache_pipes.files.pt import directory as zips
from gpucache_pipes.files.pt.names import Name, SavedTensor, Storage
from gpucache_pipes.files.pt.pickle import read_pickle

_LENGTHS = struct.Struct("<HH")

# What the small records say: exactly, or as torch.load would still accept it.
_EXACT = {"version": b"3\n", "byteorder": b"little", ".format_version": b"1"}
_DIGITS = (".storage_alignment", ".data/serialization_id")


class FileTemplate:
    """The zip directory of a file, with what its local headers and small records say.

    Files of one data set share their form. `plan` compares it with another file of the same
    size by two precompiled structs; all that the plan then depends on is the pickle.

    Attributes:
        cost: about how many bytes it takes to remember it, with its plans.
        numbers: what tells its directory from others of the same shape.
        first_plan: the plan of the file that it was made of.
    """

    def __init__(self, file: Bytes, shapes: dict[tuple[int, int], zips.DirectoryTemplate]) -> None:
        self._directory = zips.Directory(file, shapes)
        self.numbers = self._directory.numbers
        self._plans: dict[bytes, Plan] = {}
        self._starts: dict[str, int] = {}
        self._comparison: _Comparison | None = None
        at = 0
        pickle = None
        for name, record in self._directory.records.items():
            header, _, size = record
            if header < at:
                raise Unsupported("records that overlap, or are in another order")
            self._starts[name] = start = zips.data_offset(record, file)
            number = name.removeprefix("data/")
            if name != number and number.isdecimal():
                # Data may overlap what follows: it is only copied, as torch.load would.
                at = start
                continue
            at = start + size
            content = file.read(start, size)
            if name == "data.pkl":
                pickle = content
            elif name in _DIGITS:
                if not content.isdigit():
                    raise Unsupported(f"the record {name!r} is no number")
            elif name not in _EXACT or content != _EXACT[name]:
                raise Unsupported(f"the record {name!r} is unusual, or says something unusual")
        if pickle is None or "version" not in self._starts:
            raise Unsupported("no data.pkl, or no version")
        if next(iter(self._directory.records.values()))[0]:
            raise Unsupported("something in front of the zip file")
        self.cost = 5 * self._directory.nbytes + 2000
        self.first_plan = self._plan_by(pickle)

    def plan(self, file: Bytes) -> Plan | None:
        """The plan for a file of the same size; None if it has another form.

        Raises Unsupported.
        """
        directory = self._directory
        whole = file.whole
        if whole is None:
            if not directory.same(file.read(directory.offset, directory.nbytes), 0):
                return None
        elif not directory.same(whole, directory.offset):
            return None
        if self._comparison is None:
            self._comparison = _Comparison(directory.records, self._starts)
        pickle = self._comparison.pickle(file)
        return None if pickle is None else self._plan_by(pickle)

    def _plan_by(self, pickle: bytes) -> Plan:
        plan = self._plans.get(pickle)
        if plan is None:
            plan = self._make_plan(pickle)
            if plan.cost <= _DEAREST:
                self.cost += plan.cost
                self._plans[pickle] = plan
        return plan

    def _make_plan(self, pickle: bytes) -> Plan:
        try:
            item, storages = read_pickle(pickle)
            tree, tensors, values = flatten(item, SavedTensor, len(pickle))
        except (TypeError, ValueError, RecursionError) as error:
            raise Unsupported(str(error)) from error
        if any(isinstance(value, (Name, Storage)) for value in values):
            raise Unsupported("a name or a storage stands where a value should")
        layout = Layout.of(tree, [(tensor.dtype, tensor.shape) for tensor in tensors])
        for storage in storages:
            record = self._directory.records.get(f"data/{storage.key}")
            if record is None or record[2] != storage.nbytes:
                # Not left to torch.load: where it believes the pickle, it reads what is not there.
                raise ValueError("a damaged file: a storage and its record differ in size")
        moves, views = [], []
        for tensor, leaf in zip(tensors, layout.leaves, strict=True):
            name = f"data/{tensor.storage.key}"
            start = self._starts[name] + tensor.offset * leaf.dtype.itemsize
            if not leaf.nbytes:
                continue
            if _contiguous(tensor):
                moves.append(Extent(start, leaf.offset, leaf.nbytes))
            else:
                sides = zip(tensor.shape, tensor.strides, strict=True)
                extent = 1 + sum((side - 1) * stride for side, stride in sides)
                views.append(View(start, extent * leaf.dtype.itemsize, tensor.strides, leaf))
        # A plain value is an object of 32 bytes and more; texts are as long as in the pickle.
        cost = layout.cost + 3 * len(pickle) + 100 * len(values) + 200 * len(tensors)
        return Plan(layout, tuple(values), tuple(moves), tuple(views), cost)


class _Comparison:
    """Tells whether a file with the same directory has the same headers and small records.

    Made for the second file of a form: where each file is of its own, there is none.
    """

    def __init__(self, records: dict[str, zips.Record], starts: dict[str, int]) -> None:
        # (offset, count) of what is looked at, and which of those are constant or digits.
        self._pieces: list[tuple[int, int]] = []
        self._digits: list[int] = []
        expected = {}
        for name, (header, name_bytes, size) in records.items():
            start = starts[name]
            lengths = _LENGTHS.pack(name_bytes, start - header - zips.LOCAL_BYTES - name_bytes)
            for at, content in ((header, zips.LOCAL_SIGNATURE), (header + 26, lengths)):
                expected[len(self._pieces)] = content
                self._pieces.append((at, len(content)))
            if name in _EXACT:
                expected[len(self._pieces)] = _EXACT[name]
            elif name in _DIGITS:
                self._digits.append(len(self._pieces))
            elif name == "data.pkl":
                self._pickle = len(self._pieces)
            else:
                continue
            self._pieces.append((start, size))
        self._constants = itemgetter(*expected)
        self._expected = tuple(expected.values())
        codes, at = ["<"], 0
        for start, count in self._pieces:
            codes.append(f"{start - at}x{count}s")
            at = start + count
        self._struct = struct.Struct("".join(codes))

    def pickle(self, file: Bytes) -> bytes | None:
        """The pickle of a file that is the same but for that; else None. Raises Unsupported."""
        if file.whole is not None:
            fields: Sequence[bytes] = self._struct.unpack_from(file.whole)
        else:
            fields = [file.read(at, count) for at, count in self._pieces]
        if self._constants(fields) != self._expected:
            return None
        for number in self._digits:
            if not fields[number].isdigit():
                return None
        return fields[self._pickle]


def _contiguous(tensor: SavedTensor) -> bool:
    expected = 1
    for side, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if side != 1 and stride != expected:
            return False
        expected *= side
    return True
