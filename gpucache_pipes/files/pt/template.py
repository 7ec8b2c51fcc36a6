"""File templates: what the bytes of one `torch.save` file mean for the others of its data set."""

import struct
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout, Leaf, flatten
from gpucache_pipes.files.planned import MAX_PLAN_COST, Bytes
from gpucache_pipes.files.plans import Extent, FormParts, ReadPlan, Run, StridedExtent
from gpucache_pipes.files.pt.directory import (
    LOCAL_HEADER_BYTES,
    LOCAL_SIGNATURE,
    Directory,
    DirectoryTemplate,
    Record,
    data_offset,
)
from gpucache_pipes.files.pt.names import AllowedGlobal, SavedTensor, Storage
from gpucache_pipes.files.pt.pickle import read_pickle
from gpucache_pipes.files.strided import is_contiguous

_LENGTHS = struct.Struct("<HH")

# What the small records must hold: exactly these bytes, or digits. torch.load accepts both.
_EXACT = {"version": b"3\n", "byteorder": b"little", ".format_version": b"1"}
_DIGITS = (".storage_alignment", ".data/serialization_id")


class PlacedRecord(NamedTuple):
    """A record, and where in the file it is.

    Attributes:
        name: without the prefix.
        header: the first byte of its local header.
        start: its first byte.
        size: in bytes.
        central: the first byte of its entry in the directory.
        is_storage: whether it holds the bytes of tensors.
    """

    name: str
    header: int
    start: int
    size: int
    central: int
    is_storage: bool


class FileTemplate:
    """The zip directory of a file, with the contents of its local headers and small records.

    The files of one data set share their template. `plan` compares it with another file of the same
    size by two precompiled structs. All that the read plan then depends on is the pickle, so that
    plans are remembered by pickle.

    Raises Unsupported for a file that torch.save does not write.

    Args:
        file: the first file.
        directory_templates: see Directory.

    Attributes:
        cost: an estimate of the host bytes that the template and its plans occupy.
        numbers: see DirectoryTemplate.
        first_plan: the read plan of the first file.
    """

    # Reader threads share a template without a lock. `_plans` relies on `get` and item assignment
    # of a dict being atomic under the GIL. `cost += ...` is not: an addition can be lost, and the
    # bound of PtReader is then approximate. Two threads may make the comparison, or the plan of one
    # pickle, at the same time; they are equal, so that it does not matter which one is kept.

    def __init__(
        self, file: Bytes, directory_templates: dict[tuple[int, int], DirectoryTemplate]
    ) -> None:
        self._directory = Directory(file, directory_templates)
        self.numbers = self._directory.numbers
        self._plans: dict[bytes, ReadPlan] = {}
        self._starts: dict[str, int] = {}
        self._comparison: _Comparison | None = None
        self._places: tuple[tuple[object, ...], ...] | None = None
        at = 0
        pickle = None
        records = self._directory.records
        file.expect([(header, LOCAL_HEADER_BYTES) for header, _, _ in records.values()])
        for name, record in records.items():
            header, _, size = record
            if header < at:
                raise Unsupported("records overlap, or are in another order than torch.save writes")
            self._starts[name] = start = data_offset(record, file)
            number = name.removeprefix("data/")
            if name != number and number.isdecimal():
                # A storage may overlap the next record: its bytes are only copied, and torch.load
                # would copy the same bytes.
                at = start
                continue
            at = start + size
            content = file.read(start, size)
            if name == "data.pkl":
                pickle = content
            elif name in _DIGITS:
                if not content.isdigit():
                    raise Unsupported(f"the record {name!r} is not a number")
            elif name not in _EXACT or content != _EXACT[name]:
                raise Unsupported(f"the record {name!r} has an unusual name or content")
        if pickle is None or "version" not in self._starts:
            raise Unsupported("the record data.pkl or version is missing")
        if next(iter(self._directory.records.values()))[0]:
            raise Unsupported("the file does not begin with the zip file")
        self.cost = 5 * self._directory.nbytes + 2000
        self.first_plan = self._plan_by(pickle)

    def plan(self, file: Bytes) -> ReadPlan | None:
        """Return the read plan of a file of the same size; None if it does not fit the template.

        Raises Unsupported.
        """
        directory = self._directory
        whole = file.whole
        if whole is None:
            if not directory.matches(file.read(directory.offset, directory.nbytes), 0):
                return None
        elif not directory.matches(whole, directory.offset):
            return None
        if self._comparison is None:
            self._comparison = _Comparison(directory.records, self._starts)
        pickle = self._comparison.pickle(file)
        return None if pickle is None else self._plan_by(pickle)

    def form(self) -> FormParts:
        """What `plan` compares, and the pickle."""
        constant, prefixes = self._directory.runs()
        digits, pickle = [], Run(0, 0)
        for name, (header, _, size) in self._directory.records.items():
            # The signature, and the lengths of name and extra field.
            constant += [Run(header, 4), Run(header + 26, 4)]
            piece = Run(self._starts[name], size)
            if name in _EXACT:
                constant.append(piece)
            elif name in _DIGITS:
                digits.append(piece)
            elif name == "data.pkl":
                pickle = piece
        # Within a data set the pickles differ, if anything does.
        return FormParts([pickle, *constant], digits, prefixes)

    def pickle(self, file: Bytes) -> bytes:
        """The pickle of a file that fits."""
        return file.read(self._starts["data.pkl"], self._directory.records["data.pkl"][2])

    def records(self) -> list[PlacedRecord]:
        """The records in their order."""
        return [
            PlacedRecord(name, header, self._starts[name], size, central, name.startswith("data/"))
            for (name, (header, _, size)), central in zip(
                self._directory.records.items(), self._directory.starts, strict=True
            )
        ]

    def places(self) -> Sequence[tuple[object, ...]]:
        """Where everything is, the sizes of storages aside. Equal for files that may be alike."""
        if self._places is None:
            end = 0
            places: list[tuple[object, ...]] = []
            for name, (header, _, size) in self._directory.records.items():
                start = self._starts[name]
                is_storage = name.startswith("data/")
                places.append((name, header - end, start - header, -1 if is_storage else size))
                end = start + size
            places.append((self._directory.offset - end, self._directory.nbytes))
            self._places = tuple(places)
        return self._places

    @property
    def directory_offset(self) -> int:
        """The first byte of the zip directory."""
        return self._directory.offset

    def end_offsets(self, size: int) -> list[tuple[int, int]]:
        """See Directory."""
        return self._directory.end_offsets(size)

    def _plan_by(self, pickle: bytes) -> ReadPlan:
        plan = self._plans.get(pickle)
        if plan is None:
            plan = self._make_plan(pickle)
            if plan.cost <= MAX_PLAN_COST:
                self.cost += plan.cost
                self._plans[pickle] = plan
        return plan

    def _make_plan(self, pickle: bytes) -> ReadPlan:
        try:
            item, storages = read_pickle(pickle)
            tree, tensors, values = flatten(item, SavedTensor, len(pickle))
        except (TypeError, ValueError, RecursionError) as error:
            raise Unsupported(str(error)) from error
        if any(isinstance(value, (AllowedGlobal, Storage)) for value in values):
            raise Unsupported("a global or a storage stands where a value should")
        layout = Layout.of(tree, [(tensor.dtype, tensor.shape) for tensor in tensors])
        for storage in storages:
            record = self._directory.records.get(f"data/{storage.key}")
            if record is None or record[2] != storage.nbytes:
                # Not left to torch.load, which believes the pickle where the two differ, and then
                # reads beyond the record.
                raise ValueError("the file is damaged: a storage and its record differ in size")
        extents, strided_extents = [], []
        for tensor, leaf in zip(tensors, layout.leaves, strict=True):
            start = self._starts[f"data/{tensor.storage.key}"] + tensor.offset * leaf.dtype.itemsize
            if not leaf.nbytes:
                continue
            if is_contiguous(tensor.shape, tensor.strides):
                extents.append(Extent(start, leaf.offset, leaf.nbytes))
            else:
                strided_extents.append(strided_extent(tensor, start, leaf))
        # A plain value is an object of at least 32 bytes; a string is as long as in the pickle.
        cost = layout.cost + 3 * len(pickle) + 100 * len(values) + 200 * len(tensors)
        return ReadPlan(layout, tuple(values), tuple(extents), tuple(strided_extents), cost)


class _Comparison:
    """Compares the local headers and small records of files with the same directory.

    It is made for the second file of a template, so that a template with one file has none.

    Args:
        records: the records of the directory.
        starts: the offset of the bytes of each record.
    """

    def __init__(self, records: dict[str, Record], starts: dict[str, int]) -> None:
        # (offset, count) of the bytes to compare, and which of these pieces must be digits.
        self._pieces: list[tuple[int, int]] = []
        self._digits: list[int] = []
        expected = {}
        for name, (header, name_bytes, size) in records.items():
            start = starts[name]
            lengths = _LENGTHS.pack(name_bytes, start - header - LOCAL_HEADER_BYTES - name_bytes)
            for at, content in ((header, LOCAL_SIGNATURE), (header + 26, lengths)):
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
        """Return the pickle of a file that has nothing else of its own; else None.

        Raises Unsupported.
        """
        if file.whole is not None:
            fields: Sequence[bytes] = self._struct.unpack_from(file.whole)
        else:
            file.expect(self._pieces)
            fields = [file.read(at, count) for at, count in self._pieces]
        if self._constants(fields) != self._expected:
            return None
        for number in self._digits:
            if not fields[number].isdigit():
                return None
        return fields[self._pickle]


def strided_extent(tensor: SavedTensor, start: int, leaf: Leaf) -> StridedExtent:
    """How to read a tensor that is not contiguous and begins at `start` of the file."""
    dimensions = zip(tensor.shape, tensor.strides, strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in dimensions)
    return StridedExtent(start, elements * leaf.dtype.itemsize, tensor.strides, leaf.dtype, leaf)
