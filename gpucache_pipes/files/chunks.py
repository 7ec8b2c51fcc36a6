"""Files that the native reader has read into scratch memory, and the features in them."""

import time
from collections.abc import Sequence
from typing import Any

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
STATUS, _START, _VERSION, _SIZE, _MTIME, _COLUMNS = 0, 1, slice(2, 6), 4, 5, 6
UNKNOWN, LEFT_TO_PYTHON = -1, -2


class Chunk:
    """The files of one call, in scratch memory, which is reused once they are dropped."""

    def __init__(self, native: Any, known: KnownForms, files: int) -> None:
        self.native = native
        self.known = known
        self.rows = np.empty((files, _COLUMNS), np.int64)
        self.memory = borrow(self)
        # When it was read: from before the first file to after the last one.
        self.begun = self.ended = time.time_ns()

    def data(self, number: int) -> memoryview:
        """The bytes of a file."""
        row = self.rows[number]
        return self.memory.data[int(row[_START]) :][: int(row[_SIZE])]

    def version(self, number: int) -> bytes | None:
        """The version of a file, see `version_of`; None if it may still change unnoticed."""
        row = self.rows[number]
        racy = is_racy_between(int(row[_MTIME]), self.begun, self.ended)
        return None if racy else row[_VERSION].tobytes()


class ScratchFeature:
    """An OpenFeature whose file is in scratch memory as a whole.

    Attributes:
        layout: see OpenFeature.
        values: see OpenFeature.
        chunk: the files that were read with it, and which of them it is.
        number: which of them it is.
        plan: where its leaves are in the file. Its values are not used.
    """

    __slots__ = ("bytes_read", "chunk", "layout", "number", "plan", "values")

    def __init__(
        self, plan: ReadPlan, values: tuple[Any, ...], chunk: Chunk, number: int, nbytes: int
    ) -> None:
        self.layout = plan.layout
        self.values = values
        self.bytes_read = nbytes
        self.chunk = chunk
        self.number = number
        self.plan = plan

    @property
    def is_known(self) -> bool:
        """Whether the file was of a known form."""
        return bool(self.chunk.rows[self.number, STATUS] >= 0)

    @property
    def version(self) -> bytes | None:
        """See VersionedFeature."""
        return self.chunk.version(self.number)

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
    by_chunk: dict[Chunk, list[int]] = {}
    places = offsets.tolist()
    for at, feature in enumerate(features):
        if isinstance(feature, ScratchFeature) and places[at] >= 0 and feature.is_known:
            by_chunk.setdefault(feature.chunk, []).append(at)
        else:
            left.append(at)
    for chunk, positions in by_chunk.items():
        by_plan: dict[int, list[int]] = {}
        for at in positions:
            by_plan.setdefault(id(features[at].plan), []).append(at)  # type: ignore[attr-defined]
        _copy(chunk, [[features[at] for at in group] for group in by_plan.values()],  # type: ignore[misc]
              memory, [offsets[group] for group in by_plan.values()])  # fmt: skip
    return left


def _copy(
    chunk: Chunk,
    groups: list[list[ScratchFeature]],
    memory: memoryview,
    places: list[npt.NDArray[np.int64]],
) -> None:
    """Copy the leaves of files to their places; those of a group have one plan."""
    begins = chunk.rows[:, _START]
    moves: list[npt.NDArray[np.int64]] = []
    few: list[tuple[int, int, int]] = []
    for group, there in zip(groups, places, strict=True):
        extents = group[0].plan.extents
        starts = begins[[feature.number for feature in group]]
        if len(group) < _ONE_BY_ONE:
            few += [
                (begin + extent.start, place + extent.offset, extent.nbytes)
                for begin, place in zip(starts.tolist(), there.tolist(), strict=True)
                for extent in extents
            ]
        elif extents:
            shifts = np.stack([starts, there, np.zeros_like(there)], axis=1)
            moves.append((shifts[:, None] + np.array(extents, np.int64)).reshape(-1, 3))
        if group[0].plan.strided_extents:
            source, target = (
                torch.from_numpy(chunk.memory),
                torch.frombuffer(memory, dtype=torch.uint8),
            )
            for extent in group[0].plan.strided_extents:
                copy_many(source, starts, extent, target, there)
    if few:
        moves.append(np.array(few, np.int64))
    if moves:
        chunk.native.copy(chunk.memory, memory, np.concatenate(moves))
