"""One file of a data set, taken apart to be compared with another one."""

from collections.abc import Sequence

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import flatten
from gpucache_pipes.files.planned import Bytes
from gpucache_pipes.files.plans import Number
from gpucache_pipes.files.pt.family import Token, decode
from gpucache_pipes.files.pt.names import SavedTensor
from gpucache_pipes.files.pt.pickle import read_pickle
from gpucache_pipes.files.pt.template import FileTemplate

_TOKENS = {0x4B: ("BININT1", 1), 0x4D: ("BININT2", 2), 0x4A: ("BININT", 4), 0x47: ("BINFLOAT", 8),
           0x8A: ("LONG1", None), 0x58: ("BINUNICODE", None)}  # fmt: skip
"""By opcode, the name of a token and bytes of its value; None if the pickle states how many."""

_OPERANDS = {0x80: 1, 0x71: 1, 0x68: 1, 0x72: 4, 0x6A: 4}
"""Bytes that follow PROTO, BINPUT, BINGET, LONG_BINPUT and LONG_BINGET."""

_GLOBAL = 0x63

_MOST_RECORDS, _MOST_PICKLE_BYTES = 64, 1 << 12

MOST_OTHERS = 90
"""Tokens that can have values of their own in a file that is made up: any character of printable
ASCII, from the exclamation mark on, is the first one of a value."""


def split(pickle: bytes) -> tuple[list[Token], bytes]:
    r"""The tokens of a pickle, and all of it but their values.

    Only for what `read_pickle` has read: it knows no other opcodes with operands.

    >>> split(b"\x80\x02K\x07.")
    ([Token(code='BININT1', start=3, width=1, value=7)], b'\x80\x02K.')
    """
    tokens: list[Token] = []
    rest = []
    at = kept = 0
    while at < len(pickle):
        opcode = pickle[at]
        at += 1
        token = _TOKENS.get(opcode)
        if token is None:
            if opcode == _GLOBAL:
                at = pickle.index(b"\n", pickle.index(b"\n", at) + 1) + 1
            else:
                at += _OPERANDS.get(opcode, 0)
            continue
        code, width = token
        if width is None:
            stated = 1 if code == "LONG1" else 4
            width = int.from_bytes(pickle[at : at + stated], "little")
            at += stated
        value = decode(code, memoryview(pickle)[at : at + width])
        tokens.append(Token(code, at, width, value))
        rest.append(pickle[kept:at])
        at += width
        kept = at
    rest.append(pickle[kept:])
    return tokens, b"".join(rest)


class Sample:
    """A file whose template is known. Raises Unsupported.

    Attributes:
        template: of the file.
        size: of the file in bytes.
        records: its records, in their order.
        tokens: the numbers and strings of the pickle.
        opcodes: all else of it; see `split`.
        tree: see Layout.
        tensors: in the order of the tree.
        values: the plain values, likewise.
    """

    def __init__(self, template: FileTemplate, file: Bytes) -> None:
        pickle = template.pickle(file)
        self.template = template
        self.size = file.size
        self.records = template.records()
        if len(self.records) > _MOST_RECORDS or len(pickle) > _MOST_PICKLE_BYTES:
            raise Unsupported("the file has too many parts to be compared with others")
        # What lies between the storages: their bytes do not matter, and are not kept.
        self._pieces = []
        end = 0
        for record in self.records:
            if record.is_storage:
                self._pieces.append(file.read(end, record.start - end))
                end = record.start + record.size
        self._pieces.append(file.read(end, file.size - end))
        item, _ = read_pickle(pickle)
        self.tree, self.tensors, values = flatten(item, SavedTensor, len(pickle))
        self.values = tuple(values)
        self.tokens, self.opcodes = split(pickle)

    def made_up(
        self, growth: Sequence[int], numbers: Sequence[Number], others: Sequence[Token]
    ) -> bytes | None:
        """A file like this one, whose storages are zeros.

        Args:
            growth: by how many bytes each record is larger.
            numbers: those that follow from that; a growing part is a record that is a storage and
                has a growth.
            others: tokens, by their places in the file, each to have a value of its own.

        Returns:
            None if a number does not have room, or a storage had less than no bytes.
        """
        made = bytearray()
        shift = [0]
        pieces = iter(self._pieces)
        for record, more in zip(self.records, growth, strict=True):
            if record.is_storage:
                if record.size + more < 0:
                    return None
                made += next(pieces) + bytes(record.size + more)
                if more:
                    shift.append(shift[-1] + more)
        made += next(pieces)
        for number in numbers:
            grown = shift[number.end] - shift[number.begin]
            value = number.base + grown * number.factor // number.divisor
            if not 0 <= value < 1 << min(8 * number.width, 31):
                return None
            start = number.start + shift[number.after]
            made[start : start + number.width] = value.to_bytes(number.width, "little")
        assert len(others) <= MOST_OTHERS
        for n, token in enumerate(others):
            text = bytes(0x21 + (n + at) % MOST_OTHERS for at in range(token.width))
            made[token.start : token.start + token.width] = text
        return bytes(made)
