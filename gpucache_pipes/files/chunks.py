"""Files that the native reader has read into scratch memory, and the features in them."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from gpucache_pipes.files.forms import KnownForms
from gpucache_pipes.files.planned import fill
from gpucache_pipes.files.plans import ReadPlan
from gpucache_pipes.files.scratch import borrow
from gpucache_pipes.files.source import OpenFeature
from gpucache_pipes.files.strided import copy_many
from gpucache_pipes.files.versions import is_racy_between

_ONE_BY_ONE = 4
"""Files of one plan that are not worth array operations."""

# The columns of a row, and the values of STATUS that are not the number of a form: see _native.c.
STATUS, START, _VERSION, SIZE, _MTIME, _COLUMNS = 0, 1, slice(2, 6), 4, 5, 6
UNKNOWN, LEFT_TO_PYTHON = -1, -2


class Scratch(Protocol):
    """Scratch memory that holds files, or records of segments.

    Attributes:
        native: the native module; None if there is none.
        memory: uint8.
        starts: where each begins in it.
    """

    native: Any
    memory: npt.NDArray[np.uint8]
    starts: list[int]

    def data(self, number: int) -> memoryview:
        """The bytes of one of them."""

    def version(self, number: int) -> bytes | None:
        """See VersionedFeature."""

    def file_version(self, number: int) -> tuple[int, int] | None:
        """See Source.tell_versions."""


class Chunk:
    """The files of one call, in scratch memory, which is reused once they are dropped."""

    def __init__(self, native: Any, known: KnownForms, files: int) -> None:
        self.native = native
        self.known = known
        self.rows = np.empty((files, _COLUMNS), np.int64)
        self.memory = borrow(self)
        self.starts: list[int] = []  # of the files in memory, once they were read
        # When it was read: from before the first file to after the last one.
        self.begun = self.ended = time.time_ns()

    def data(self, number: int) -> memoryview:
        """The bytes of a file."""
        row = self.rows[number]
        return self.memory.data[int(row[START]) :][: int(row[SIZE])]

    def version(self, number: int) -> bytes | None:
        """The version of a file, see `version_of`; None if it may still change unnoticed."""
        row = self.rows[number]
        racy = is_racy_between(int(row[_MTIME]), self.begun, self.ended)
        return None if racy else row[_VERSION].tobytes()

    def plan_key(self, number: int) -> bytes | None:
        """By what the read plan of a file is remembered; None if it is not."""
        return self.version(number)

    def file_version(self, number: int) -> tuple[int, int] | None:
        """See Scratch."""
        return None


class ScratchFeature:
    """An OpenFeature whose file is in scratch memory as a whole.

    Attributes:
        layout: see OpenFeature.
        values: see OpenFeature.
        chunk: the files that were read with it, and which of them it is.
        number: which of them it is.
        plan: where its leaves are in the file. Its values are not used.
        is_known: whether the file was of a known form.
    """

    __slots__ = ("bytes_read", "chunk", "is_known", "layout", "number", "plan", "values")

    def __init__(
        self,
        plan: ReadPlan,
        values: tuple[Any, ...],
        chunk: Scratch,
        number: int,
        nbytes: int,
        is_known: bool,
    ) -> None:
        self.layout = plan.layout
        self.values = values
        self.bytes_read = nbytes
        self.chunk = chunk
        self.number = number
        self.plan = plan
        self.is_known = is_known

    @property
    def version(self) -> bytes | None:
        """See VersionedFeature."""
        return self.chunk.version(self.number)

    @property
    def file_version(self) -> tuple[int, int] | None:
        """See Source.tell_versions."""
        return self.chunk.file_version(self.number)

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature."""
        fill(self.plan, self.chunk.data(self.number), buffers)

    def close(self) -> None:
        """See OpenFeature."""


def read_many(
    features: Sequence[OpenFeature], memory: memoryview, offsets: npt.NDArray[np.int64]
) -> list[int]:
    """Fill `memory` with those features that are of known forms, without the interpreter lock.

    Args:
        features: what was opened.
        memory: writable bytes.
        offsets: where the bytes of each feature go; negative leaves it out.

    Returns:
        The positions of those that are left, to be read one by one.
    """
    left: list[int] = []
    places = offsets.tolist()
    # Features of one call and one plan, with their positions.
    groups: dict[tuple[int, int], list[tuple[int, ScratchFeature]]] = {}
    for at, feature in enumerate(features):
        if isinstance(feature, ScratchFeature) and feature.is_known and places[at] >= 0:
            key = id(feature.chunk), id(feature.plan)
            groups.setdefault(key, []).append((at, feature))
        else:
            left.append(at)
    moves: dict[Scratch, list[npt.NDArray[np.int64]]] = {}
    few: dict[Scratch, list[tuple[int, int, int]]] = {}
    for group in groups.values():
        chunk, plan = group[0][1].chunk, group[0][1].plan
        if len(group) < _ONE_BY_ONE and not plan.strided_extents:
            few.setdefault(chunk, []).extend(
                (chunk.starts[feature.number] + start, places[at] + offset, nbytes)
                for at, feature in group
                for start, offset, nbytes in plan.extents
            )
            continue
        starts = np.array([chunk.starts[feature.number] for _, feature in group], np.int64)
        there = offsets[[at for at, _ in group]]
        if plan.extents:
            shifts = np.stack([starts, there, np.zeros_like(there)], axis=1)
            extents = np.array(plan.extents, np.int64)
            moves.setdefault(chunk, []).append((shifts[:, None] + extents).reshape(-1, 3))
        if plan.strided_extents:
            source = torch.from_numpy(chunk.memory)
            target = torch.frombuffer(memory, dtype=torch.uint8)
            for extent in plan.strided_extents:
                copy_many(source, starts, extent, target, there)
    for chunk, some in few.items():
        moves.setdefault(chunk, []).append(np.array(some, np.int64).reshape(-1, 3))
    for chunk, parts in moves.items():
        chunk.native.copy(chunk.memory, memory, np.concatenate(parts))
    return left
