"""Which ranges of a large object are asked for."""

from collections.abc import Iterable
from typing import NamedTuple

from gpucache_pipes.files.plans import Extent

PIECE_BYTES = 8 << 20
"""Bytes of a request, at most: large enough that its latency does not matter."""

_GAP_BYTES = 16 << 10
"""Bytes between two extents that are read with them, since a request costs more."""


class Piece(NamedTuple):
    """What one request reads.

    Attributes:
        start: its first byte in the object.
        end: after its last one.
        moves: (start in the piece, offset in the feature, bytes) of what is kept.
    """

    start: int
    end: int
    moves: tuple[tuple[int, int, int], ...]


def pieces_of(extents: Iterable[Extent]) -> list[Piece]:
    """The requests that read these extents, in the order of the object.

    >>> pieces_of([Extent(100, 0, 50), Extent(200, 50, 10)])
    [Piece(start=100, end=210, moves=((0, 0, 50), (100, 50, 10)))]
    """
    pieces: list[Piece] = []
    moves: list[tuple[int, int, int]] = []
    begin = end = -1

    def finish() -> None:
        if moves:
            pieces.append(Piece(begin, end, tuple(moves)))
            moves.clear()

    for start, offset, nbytes in sorted(extents):
        while nbytes:
            apart = not moves or start < begin or start - end > _GAP_BYTES
            if apart or start - begin >= PIECE_BYTES:
                finish()
                begin = end = start
            count = min(nbytes, begin + PIECE_BYTES - start)
            moves.append((start - begin, offset, count))
            end = max(end, start + count)
            start, offset, nbytes = start + count, offset + count, nbytes - count
    finish()
    return pieces
