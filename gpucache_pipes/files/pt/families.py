"""Learns in what the `.pt` files of one data set differ: sizes of tensors, and plain values.

Each file of a ragged data set, or of one that stores labels or names with its tensors, has a pickle
of its own. What is different about it are a few numbers and strings, always at the same places. Two
files tell at which places, and the tensors tell which of these numbers follow from the sizes of the
storages. A made-up file, in which all of that has other values, is parsed to prove it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Leaf
from gpucache_pipes.files.planned import Bytes
from gpucache_pipes.files.plans import FormParts, Number, ReadPlan, Run
from gpucache_pipes.files.pt.family import GrowingLeaf, PtFamily, Token
from gpucache_pipes.files.pt.growing import growing_dimension, growth_of, numbers_of, row_bytes
from gpucache_pipes.files.pt.names import SavedTensor
from gpucache_pipes.files.pt.sample import MOST_OTHERS, Sample
from gpucache_pipes.files.pt.template import FileTemplate, strided_extent
from gpucache_pipes.files.strided import is_contiguous

_MOST_CLASSES = 256
_MOST_FAILURES = 8
"""Files of a class that taught nothing, after which others are not looked at any more."""

_MOST_PARTS = 16
"""Growing parts of a file that the native reader follows."""

_MOST_ROWS = 64
"""Rows by which a tensor grows in a made-up file, at most."""

_INTS = ("BININT1", "BININT2", "BININT", "LONG1")
_UNSIGNED = ("BININT1", "BININT2", "BININT")
"""The last one is signed, but the native reader takes no number for one that would be negative."""


class _Class(NamedTuple):
    """Files that are alike but for the sizes of storages, and the values of tokens.

    Attributes:
        base: the first one.
        growing: the positions of the records whose sizes differ.
        fields: the tokens that differ and do not follow from a size, by position, and which
            plain values they are.
        dimensions: of each tensor, the dimension that differs, or None.
        family: of all these files.
        failures: files that taught nothing since.
    """

    base: Sample
    growing: frozenset[int] = frozenset()
    fields: tuple[tuple[int, int], ...] = ()
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
        try:
            sample = Sample(template, file)
        except (Unsupported, ValueError, TypeError, RecursionError):
            return None
        key = (template.places(), sample.opcodes)
        known = self._classes.get(key)
        if known is None:
            if len(self._classes) >= _MOST_CLASSES:
                self._classes.clear()
            self._classes[key] = _Class(sample)
            return None
        if known.failures < _MOST_FAILURES:
            try:
                known = _Comparison(known, sample).result(self._select)
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
        if base.tree != sample.tree:
            raise ValueError("the features are of other trees")
        self._known = known
        self._base = base
        self._sample = sample
        sizes = zip(base.records, sample.records, strict=True)
        differing = {n for n, (one, other) in enumerate(sizes) if one.size != other.size}
        self._growing = sorted(known.growing | differing)
        if len(self._growing) > _MOST_PARTS:
            raise ValueError("more parts grow than the native reader can follow")
        self._headers = [record.header for record in base.records]
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
        growing, fields = frozenset(self._growing), self._fields(differing)
        if (growing, fields) == (known.growing, known.fields):
            return known._replace(failures=known.failures + 1)
        leaves = [
            self._leaf(tensor, dimension)
            for tensor, dimension in zip(base.tensors, dimensions, strict=True)
        ]
        tokens_of = {
            number: base.tokens[n]._replace(start=self._pickle_start + base.tokens[n].start)
            for n, number in fields
        }
        parts = self._parts(numbers, tokens_of.values())
        file = base.made_up([0] * len(base.records), (), ())
        assert file is not None
        content = b"".join(file[run.start : run.start + run.length] for run in parts.equal)
        family = PtFamily(
            parts, base.size, content, base.tree, leaves, base.values, tokens_of, select
        )
        self._prove(family, leaves, list(tokens_of.values()))
        return _Class(base, growing, fields, dimensions, family)

    def _after(self, start: int) -> int:
        """How many growing parts lie before this position, which is in none of them.

        By the headers of records: a part may have no bytes, and begin where the next header does.
        """
        record = bisect_right(self._headers, start) - 1
        if start >= self._base.template.directory_offset:
            record += 1
        return sum(n < record for n in self._growing)

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
            dimension = growing_dimension(one, other, before, part is not None)
            dimensions.append(dimension)
            if id(one) in seen:  # the pickle describes it once
                if id(other) != seen[id(one)]:
                    raise ValueError("in one file it is the same tensor, in the other one not")
                continue
            seen[id(one)] = id(other)
            wanted = list(zip(numbers_of(one), numbers_of(other), strict=True))
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
            for n, (factor, divisor) in zip(tokens, growth_of(one, dimension), strict=True):
                if factor:
                    code, start, width, value = base.tokens[n]
                    if code not in _UNSIGNED:
                        raise ValueError("a size is a number of an unusual kind")
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
            row = row_bytes(tensor, dimension)
            whole = row * tensor.shape[dimension] == record.size and not tensor.offset
            if not row or strided or not whole:
                raise ValueError("a tensor that grows is not contiguous, or not all of its storage")
        return GrowingLeaf(tensor.dtype, tensor.shape, self._part(tensor), dimension or 0, row,
                           start, self._after(record.start), strided)  # fmt: skip

    def _fields(self, differing: set[int]) -> tuple[tuple[int, int], ...]:
        """The fields that are known, and those of these tokens, in the order of tokens.

        Values come in the order of their tokens. So a new one lies between its neighbours, and is
        the first there with these two values.
        """
        base, sample = self._base, self._sample
        fields = dict(self._known.fields)
        for n in sorted(differing - fields.keys()):
            token = base.tokens[n]
            wanted = (token.value, sample.tokens[n].value)
            begin = max((number + 1 for at, number in fields.items() if at < n), default=0)
            end = min((number for at, number in fields.items() if at > n),
                      default=len(base.values))  # fmt: skip
            for number in range(begin, end):
                found = (base.values[number], sample.values[number])
                if found == wanted and type(found[0]) is type(token.value):
                    fields[n] = number
                    break
            else:
                raise ValueError("a number or a string differs that is no plain value")
        if len(fields) > MOST_OTHERS:
            raise ValueError("too many values differ")
        return tuple(sorted(fields.items()))

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
        self, family: PtFamily, leaves: Sequence[GrowingLeaf], fields: Sequence[Token]
    ) -> None:
        """Parse a made-up file of the family, and compare.

        In it no two numbers of different parts have changed by the same, and each field has a value
        of its own: numbers or values that were mixed up make another feature.
        """
        growth = [0] * len(self._base.records)
        steps: set[int] = set()
        for part, n in enumerate(self._growing):
            rows = {leaf.row for leaf in leaves if leaf.part == part}
            if not rows:
                raise ValueError("a storage grows that no tensor is of")
            for times in range(1, _MOST_ROWS):
                growth[n] = times * math.lcm(*rows)
                changes = {growth[n] // row for row in rows | {1, 2, 4, 8, 16}}
                if not changes & steps:
                    break
            else:
                raise ValueError("no file could tell the growing parts apart")
            steps |= changes
        for sign in (1, -1):
            made = self._base.made_up(
                [sign * more for more in growth], family.parts.numbers, fields
            )
            if made is None:  # a number would need more bytes, or be negative
                continue
            data = memoryview(made)
            plan = family.whole_plan(data)
            values = family.values(plan, data)
            parsed = FileTemplate(Bytes(made), {}).first_plan
            # By repr: a NaN is not equal to itself.
            if repr(parsed.values) != repr(values) or (
                parsed._replace(values=(), cost=0) != plan._replace(values=(), cost=0)
            ):
                raise ValueError("the family is not what it seemed to be")
            return
        raise ValueError("no other file can be made up")


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
