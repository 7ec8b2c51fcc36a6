"""One file of a data set, taken apart to be compared with another one."""

import pickletools
from collections.abc import Sequence
from typing import Any

from gpucache_pipes.files.layout import flatten
from gpucache_pipes.files.planned import Bytes
from gpucache_pipes.files.plans import Number
from gpucache_pipes.files.pt.family import Token
from gpucache_pipes.files.pt.names import SavedTensor
from gpucache_pipes.files.pt.pickle import read_pickle
from gpucache_pipes.files.pt.template import FileTemplate

_VALUES_BEGIN = {"BININT1": 1, "BININT2": 1, "BININT": 1, "LONG1": 2, "BINFLOAT": 1,
                 "BINUNICODE": 5}  # fmt: skip
"""Bytes from the opcode of a token to its value."""

_WIDTHS = {"BININT1": 1, "BININT2": 2, "BININT": 4, "BINFLOAT": 8}


class Sample:
    """A file whose template is known. It is parsed when `parse` is called, and not before.

    Attributes:
        template: of the file.
        size: of the file in bytes.
        pickle: its pickle.
        records: its records, in their order.
        tokens: the numbers and strings of the pickle.
        opcodes: all else of it.
        tree: see Layout.
        tensors: in the order of the tree.
        values: the plain values, likewise.
    """

    def __init__(self, template: FileTemplate, file: Bytes) -> None:
        self.template = template
        self.size = file.size
        self.pickle = template.pickle(file)
        self.records = template.records()
        # What lies between the storages: their bytes do not matter, and are not kept.
        self._pieces = []
        end = 0
        for record in self.records:
            if record.is_storage:
                self._pieces.append(file.read(end, record.start - end))
                end = record.start + record.size
        self._pieces.append(file.read(end, file.size - end))
        self.tokens: list[Token] = []
        self.opcodes: list[Any] = []

    def parse(self) -> None:
        """Find all that the attributes say. Raises Unsupported."""
        if self.opcodes:
            return
        item, _ = read_pickle(self.pickle)
        self.tree, self.tensors, values = flatten(item, SavedTensor, len(self.pickle))
        self.values = tuple(values)
        opcodes: list[Any] = []
        for opcode, argument, position in pickletools.genops(self.pickle):
            at, code = position or 0, opcode.name
            if code not in _VALUES_BEGIN:
                opcodes.append((code, argument))
                continue
            width = _WIDTHS.get(code)
            if width is None:  # LONG1 and BINUNICODE state it, in one and in four bytes
                start = at + _VALUES_BEGIN[code]
                width = int.from_bytes(self.pickle[at + 1 : start], "little")
            opcodes.append((code, width))
            self.tokens.append(Token(code, at + _VALUES_BEGIN[code], width, argument))
        self.opcodes = opcodes

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
        for n, token in enumerate(others):
            text = bytes(0x21 + (n + at) % 90 for at in range(token.width))
            made[token.start : token.start + token.width] = text
        return bytes(made)
