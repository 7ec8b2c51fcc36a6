"""Learns in what the `.pt` files of one data set differ: sizes of tensors, and plain values.

Each file of a ragged data set, or of one that stores labels or names with its tensors, has a pickle
of its own. What is different about it are a few numbers and strings, always at the same places. Two
files tell at which places, and the tensors tell which of these numbers follow from the sizes of the
storages. A made-up file, in which all of that has other values, is parsed to prove it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Leaf
from gpucache_pipes.files.planned import Bytes
from gpucache_pipes.files.plans import FormParts, Number, ReadPlan, Run
from gpucache_pipes.files.pt.family import GrowingLeaf, PtFamily, Token
from gpucache_pipes.files.pt.names import SavedTensor
from gpucache_pipes.files.pt.sample import Sample
from gpucache_pipes.files.pt.template import FileTemplate, strided_extent
from gpucache_pipes.files.strided import is_contiguous

_MOST_CLASSES = 256
_MOST_FAILURES = 8
"""Files of a class that taught nothing, after which others are not looked at any more."""

_MOST_RECORDS, _MOST_PICKLE_BYTES = 64, 1 << 14

_INTS = ("BININT1", "BININT2", "BININT", "LONG1")


class _Class(NamedTuple):
    """Files that are alike but for the sizes of storages, and the values of tokens.

    Attributes:
        base: the first one.
        growing: the positions of the records whose sizes differ.
        varying: the positions of the tokens that differ, and do not follow from a size.
        dimensions: of each tensor, the dimension that differs, or None.
        family: of all these files.
        failures: files that taught nothing since.
    """

    base: Sample
    growing: frozenset[int] = frozenset()
    varying: frozenset[int] = frozenset()
    dimensions: tuple[int | None, ...] = ()
    family: PtFamily | None = None
    failures: int = 0


class Families:
    """What was learned. For any number of threads.

    Args:
        select: see PtFamily.
    """

    # Threads share `_classes` without a lock: items are immutable, and replaced. Of what two
    # threads learn of a class at the same time, one can be lost, and is learned again.

    def __init__(self, select: Callable[[ReadPlan], ReadPlan]) -> None:
        self._select = select
        self._classes: dict[Any, _Class] = {}

    def learn(self, template: FileTemplate, file: Bytes) -> tuple[Any, PtFamily] | None:
        """See Parsed. None if the file is the first one of its class, or nothing is learned."""
        key = template.places()
        if len(key) > _MOST_RECORDS:
            return None
        known = self._classes.get(key)
        if known is None:
            sample = Sample(template, file)
            if len(sample.pickle) <= _MOST_PICKLE_BYTES:
                if len(self._classes) >= _MOST_CLASSES:
                    self._classes.clear()
                self._classes[key] = _Class(sample)
            return None
        if known.failures < _MOST_FAILURES:
            try:
                known = _Comparison(known, Sample(template, file)).result(self._select)
            except (Unsupported, ValueError, TypeError, RecursionError):
                known = known._replace(failures=known.failures + 1)
            self._classes[key] = known
        return None if known.family is None else (key, known.family)


class _Comparison:
    """Compares a file with the first one of its class. Raises ValueError and Unsupported.

    Args:
        known: what is known of the class.
        sample: the file.
    """

    def __init__(self, known: _Class, sample: Sample) -> None:
        base = known.base
        base.parse()
        sample.parse()
        if base.opcodes != sample.opcodes or base.tree != sample.tree:
            raise ValueError("the pickles have other opcodes")
        self._known = known
        self._base = base
        self._sample = sample
        sizes = zip(base.records, sample.records, strict=True)
        differing = {n for n, (one, other) in enumerate(sizes) if one.size != other.size}
        self._growing = sorted(known.growing | differing)
        self._by_name = {record.name: n for n, record in enumerate(base.records)}
        self._pickle_start = base.records[self._by_name["data.pkl"]].start
        if self._after(self._pickle_start):
            raise ValueError("the pickle does not come first")

    def result(self, select: Callable[[ReadPlan], ReadPlan]) -> _Class:
        """What is known of the class now."""
        known, base = self._known, self._base
        covered, numbers, dimensions = self._look_at_tensors()
        tokens = enumerate(zip(base.tokens, self._sample.tokens, strict=True))
        differing = {n for n, (one, other) in tokens if one != other} - covered
        growing, varying = frozenset(self._growing), known.varying | differing
        if (growing, varying) == (known.growing, known.varying):
            return known._replace(failures=known.failures + 1)
        leaves = [
            self._leaf(tensor, dimension)
            for tensor, dimension in zip(base.tensors, dimensions, strict=True)
        ]
        fields = self._fields(sorted(varying))
        parts = self._parts(numbers, fields.values())
        file = base.made_up([0] * len(base.records), (), ())
        assert file is not None
        content = b"".join(file[run.start : run.start + run.length] for run in parts.equal)
        family = PtFamily(parts, base.size, content, base.tree, leaves, base.values, fields, select)
        self._prove(family, leaves, fields)
        return _Class(base, growing, varying, dimensions, family)

    def _after(self, start: int) -> int:
        """How many growing parts lie before this position."""
        return sum(self._base.records[n].start < start for n in self._growing)

    def _part(self, tensor: SavedTensor) -> int | None:
        """Which growing part the storage of a tensor is."""
        record = self._by_name[f"data/{tensor.storage.key}"]
        return self._growing.index(record) if record in self._growing else None

    def _look_at_tensors(self) -> tuple[set[int], list[Number], tuple[int | None, ...]]:
        """Find the numbers that describe tensors.

        Returns:
            The positions of these tokens, the numbers that follow from sizes, and the dimension of
            each tensor that differs.
        """
        base, sample = self._base, self._sample
        ints = [n for n, token in enumerate(base.tokens) if token.code in _INTS]
        values = [(base.tokens[n].value, sample.tokens[n].value) for n in ints]
        covered: set[int] = set()
        numbers: list[Number] = []
        dimensions: list[int | None] = []
        seen: dict[int, int] = {}
        at = 0
        for position, (one, other) in enumerate(zip(base.tensors, sample.tensors, strict=True)):
            part = self._part(one)
            before = self._known.dimensions[position] if self._known.dimensions else None
            dimension = _growing_dimension(one, other, before, part is not None)
            dimensions.append(dimension)
            if id(one) in seen:  # the pickle describes it once
                if id(other) != seen[id(one)]:
                    raise ValueError("in one file it is the same tensor, in the other one not")
                continue
            seen[id(one)] = id(other)
            wanted = list(zip(_numbers_of(one), _numbers_of(other), strict=True))
            while values[at : at + len(wanted)] != wanted:
                at += 1
                if at >= len(ints):
                    raise ValueError("the numbers of a tensor are not where they should be")
            tokens = ints[at : at + len(wanted)]
            at += len(wanted)
            covered.update(tokens)
            if part is None or dimension is None:
                if any(number != same for number, same in wanted):
                    raise ValueError("a tensor has another shape in a storage of the same size")
                continue
            for n, (factor, divisor) in zip(tokens, _growth_of(one, dimension), strict=True):
                if factor:
                    _, start, width, value = base.tokens[n]
                    start += self._pickle_start
                    numbers.append(Number(start, width, 0, value, part, part + 1, factor, divisor))
        return covered, numbers, tuple(dimensions)

    def _leaf(self, tensor: SavedTensor, dimension: int | None) -> GrowingLeaf:
        record = self._base.records[self._by_name[f"data/{tensor.storage.key}"]]
        start = record.start + tensor.offset * tensor.dtype.itemsize
        strided = None
        if not is_contiguous(tensor.shape, tensor.strides):
            strided = strided_extent(tensor, start, Leaf(tensor.dtype, tensor.shape, 0, 0))
        row = 1
        if dimension is not None:
            row = _row(tensor, dimension)
            whole = row * tensor.shape[dimension] == record.size and not tensor.offset
            if not row or strided or not whole:
                raise ValueError("a tensor that grows is not contiguous, or not all of its storage")
        return GrowingLeaf(tensor.dtype, tensor.shape, self._part(tensor), dimension or 0, row,
                           start, self._after(record.start), strided)  # fmt: skip

    def _fields(self, varying: Iterable[int]) -> dict[int, Token]:
        """Which plain values these tokens are, and where in the file."""
        base, sample = self._base, self._sample
        fields = {}
        values = enumerate(zip(base.values, sample.values, strict=True))
        for n in varying:
            token = base.tokens[n]
            wanted = (token.value, sample.tokens[n].value)
            for number, found in values:
                if found == wanted and type(found[0]) is type(token.value):
                    fields[number] = token._replace(start=self._pickle_start + token.start)
                    break
            else:
                raise ValueError("a number or a string differs that is no plain value")
        return fields

    def _parts(self, numbers: Sequence[Number], fields: Iterable[Token]) -> FormParts:
        """What the files have in common."""
        base, parts = self._base, len(self._growing)
        sizes, others = [], []
        for n, record in enumerate(base.records):
            if n in self._growing:
                part = self._growing.index(n)
                stated = Number(record.central + 24, 4, parts, record.size, part, part + 1)
                sizes.append(stated)
                others.append(stated._replace(start=record.central + 20))  # compressed
            if after := self._after(record.start):
                others.append(Number(record.central + 42, 4, parts, record.header, 0, after))
        if parts:
            for start, offset in base.template.end_offsets(base.size):
                others.append(Number(start, 4, parts, offset, 0, parts))
        # In the order that FormParts asks for.
        numbers = [*sizes[:-1], *numbers, *sizes[-1:], *others]
        holes = sorted(
            [(number.start, number.width) for number in numbers]
            + [(field.start, field.width) for field in fields]
        )
        form = base.template.form()
        equal = [
            Run(start, length, self._after(start))
            for run in form.equal
            for start, length in _without(run, holes)
        ]
        digits, prefixes = (
            [run._replace(after=self._after(run.start)) for run in runs]
            for runs in (form.digits, form.prefixes)
        )
        return FormParts(equal, digits, prefixes, parts, numbers)

    def _prove(
        self, family: PtFamily, leaves: Sequence[GrowingLeaf], fields: dict[int, Token]
    ) -> None:
        """Parse a made-up file of the family, and compare.

        Each part grows by an amount of its own, and each field has a value of its own: numbers or
        values that were mixed up make another feature.
        """
        rows = [[leaf.row for leaf in leaves if leaf.part == part]
                for part in range(len(self._growing))]  # fmt: skip
        if not all(rows):
            raise ValueError("a storage grows that no tensor is of")
        for sign in (1, -1):
            growth = [0] * len(self._base.records)
            for part, n in enumerate(self._growing):
                growth[n] = sign * (part + 1) * max(rows[part])
            made = self._base.made_up(growth, family.parts.numbers, list(fields.values()))
            if made is None:  # then by less rows
                continue
            data = memoryview(made)
            plan = family.whole_plan(data)
            values = family.values(plan, data)
            parsed = FileTemplate(Bytes(made), {}).first_plan
            if parsed._replace(cost=0) != plan._replace(values=values, cost=0):
                raise ValueError("the family is not what it seemed to be")
            return
        raise ValueError("no other file can be made up")


def _growing_dimension(
    one: SavedTensor, other: SavedTensor, before: int | None, grows: bool
) -> int | None:
    """The only dimension in which a tensor differs between files."""
    if len(one.shape) != len(other.shape) or one.dtype != other.dtype:
        raise ValueError("a tensor differs in more than its size")
    differing = {d for d, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b}
    if before is not None:
        differing.add(before)
    if len(differing) != grows:
        raise ValueError("a tensor differs in several dimensions, or less than its storage")
    return differing.pop() if grows else None


def _numbers_of(tensor: SavedTensor) -> list[int]:
    """The numbers by which the pickle describes a tensor, in their order."""
    storage = tensor.storage
    itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
    return [storage.nbytes // itemsize, tensor.offset, *tensor.shape, *tensor.strides]


def _growth_of(tensor: SavedTensor, dimension: int) -> list[tuple[int, int]]:
    """For each of `_numbers_of`, factor and divisor by which it grows with bytes; 0 if not."""
    itemsize = 1 if tensor.storage.dtype is None else tensor.storage.dtype.itemsize
    row = _row(tensor, dimension)
    growth = [(1, itemsize), (0, 1)]
    growth += [(int(d == dimension), row) for d in range(len(tensor.shape))]
    for d in range(len(tensor.shape)):
        inner = 1
        for further in range(d + 1, len(tensor.shape)):
            inner *= 1 if further == dimension else tensor.shape[further]
        growth.append((inner if d < dimension else 0, row))
    return growth


def _row(tensor: SavedTensor, dimension: int) -> int:
    """Bytes of a tensor for each step of a dimension."""
    row = tensor.dtype.itemsize
    for d, size in enumerate(tensor.shape):
        row *= 1 if d == dimension else size
    return row


def _without(run: Run, holes: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """What is left of a run without these pieces, which are in ascending order."""
    at, end = run.start, run.start + run.length
    for start, length in holes:
        if at < start + length and start < end:
            if start > at:
                yield at, start - at
            at = start + length
    if at < end:
        yield at, end - at
