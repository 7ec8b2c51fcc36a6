"""Makes records of features: as `pack` reads them, or copied from where they were read to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.chunks import read_many
from gpucache_pipes.files.layout import Layout
from gpucache_pipes.files.packed import native
from gpucache_pipes.files.packed.codec import (
    LayoutKind,
    UnpackableError,
    encode_kind,
    encode_values,
)
from gpucache_pipes.files.packed.segment import record_bytes
from gpucache_pipes.files.packed.segment_writer import Records
from gpucache_pipes.files.source import OpenFeature, Progress, Source

_MAX_KNOWN = 1 << 14


class Named(NamedTuple):
    """Files that are to be packed, in columns. See Records."""

    names: list[str]
    hashes: npt.NDArray[np.uint64]
    versions: npt.NDArray[np.int64]

    def only(self, at: Sequence[int]) -> "Named":
        """Those at these positions."""
        index = np.array(at, np.intp)
        return Named([self.names[n] for n in at], self.hashes[index], self.versions[index])


class Packable:
    """Says whether features can be packed. For any number of threads."""

    def __init__(self) -> None:
        # Of layouts by identity, which are kept with it. Single operations are atomic.
        self._known: dict[int, tuple[Layout, str | None]] = {}

    def values(self, feature: OpenFeature) -> bytes:
        """The plain values of a feature, encoded. Raises UnpackableError if it cannot be packed."""
        layout = feature.layout
        known = self._known.get(id(layout))
        if known is None or known[0] is not layout:
            problem = None
            try:
                encode_kind(LayoutKind.of(layout))
            except UnpackableError as error:
                problem = str(error)
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            known = self._known[id(layout)] = layout, problem
        if known[1] is not None:
            raise UnpackableError(known[1])
        return encode_values(feature.values)


def read_records(
    source: Source, keys: list[str], named: Named, packable: Packable
) -> tuple[list[Records], dict[int, BaseException]]:
    """Read files into records.

    Args:
        source: opens them.
        keys: of the files, by which the source knows them; they are their paths, too.
        named: what is written of them.
        packable: says what can be packed.

    Returns:
        The records of those files that could be read, in order, in one or more groups; and the
        errors of the others by their position.
    """
    failed: dict[int, BaseException] = {}
    features: dict[int, OpenFeature] = {}
    parts: list[Records] = []
    at = 0
    try:
        while at < len(keys):
            # What is opened at once lies in scratch memory: it is read before more is opened.
            opened = source.open_many(keys[at:], keys[at:], Progress())
            for number in range(at, at + max(1, len(opened))):
                feature: OpenFeature | None = opened[number - at] if opened else None
                try:
                    features[number] = feature or source.open(keys[number], keys[number])
                except Exception as error:
                    failed[number] = error
            at += max(1, len(opened))
            parts.append(_read(features, named, packable, failed))
            for feature in features.values():
                feature.close()
            features.clear()
    finally:
        for feature in features.values():
            feature.close()
    return parts, failed


def _read(
    features: Mapping[int, OpenFeature],
    named: Named,
    packable: Packable,
    failed: dict[int, BaseException],
) -> Records:
    """The records of open features, by their positions; errors go into `failed`."""
    values: dict[int, bytes] = {}
    for number, feature in features.items():
        try:
            values[number] = packable.values(feature)
        except UnpackableError as error:
            failed[number] = error
    at = list(values)
    layouts = [features[number].layout for number in at]
    starts, total = places_of(layouts)
    data = np.zeros(total, np.uint8)  # zeros between the leaves
    memory = data.data
    kept = np.ones(len(at), np.bool_)
    for n in read_many([features[number] for number in at], memory, starts):
        end = int(starts[n]) + record_bytes(layouts[n])
        try:
            features[at[n]].read_into([memory[int(starts[n]) : end]])
        except Exception as error:
            failed[at[n]] = error
            kept[n] = False
    some = named.only(at)
    return Records(*some, layouts, list(values.values()), starts, data).only(kept)


def copy_records(
    named: Named,
    layouts: Sequence[Layout],
    values: Sequence[bytes],
    memory: memoryview | None,
    offsets: Sequence[int],
    buffers: Callable[[int], list[memoryview]],
) -> Records:
    """Records of features that are in host memory.

    Args:
        named: what is written of them.
        layouts: of the features.
        values: their plain values, encoded.
        memory: where they are.
        offsets: where each begins in `memory`; negative, if it is not in one piece there.
        buffers: `buffers(n)` has the bytes of feature `n` then.
    """
    starts, total = places_of(layouts)
    data = np.zeros(total, np.uint8)
    moves: list[tuple[int, int, int]] = []
    for n, (layout, start) in enumerate(zip(layouts, starts.tolist(), strict=True)):
        if not layout.span:
            continue
        if memory is not None and offsets[n] >= 0:
            moves += [
                (offsets[n] + begin, start + begin, end - begin)
                for begin, end in _stretches(layout)
            ]
            continue
        held = np.concatenate([np.frombuffer(part, np.uint8) for part in buffers(n)])
        for begin, end in _stretches(layout):
            data[start + begin : start + end] = held[begin:end]
    if moves and memory is not None:
        native.copy(memory, data, np.array(moves, np.int64))
    return Records(*named, list(layouts), list(values), starts, data)


def _stretches(layout: Layout) -> Iterable[tuple[int, int]]:
    """The ranges of a feature that hold bytes of leaves, without the gaps between them."""
    if layout.nbytes == layout.span:
        return [(0, layout.span)] if layout.span else []
    return [(leaf.offset, leaf.offset + leaf.nbytes) for leaf in layout.leaves if leaf.nbytes]


def places_of(layouts: Sequence[Layout]) -> tuple[npt.NDArray[np.int64], int]:
    """Where each record begins when they are put end to end, and the size of all."""
    ends = np.cumsum([0, *[record_bytes(layout) for layout in layouts]], dtype=np.int64)
    return ends[:-1], int(ends[-1])
