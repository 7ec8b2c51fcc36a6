"""What a pickle would make `torch.load` do, found without doing it.

`torch.load(weights_only=True)` runs no code of a file, but it has no bounds: it hashes tuples until
the stack of the process is used up, and calls what allocates as much as a number says. `scan`
follows the opcodes on a stack of descriptions, and refuses what no data set has.
"""

import pickletools
from collections.abc import Iterable
from typing import IO, Any

LARGEST_INT = 1 << 63
"""Of a key. Beyond, hashes repeat: a few thousand keys with one hash take minutes to compare."""

_DEEPEST = 32
"""Tuples in tuples, of values."""

_DEEPEST_KEY, _LARGEST_KEY = 4, 256
"""Tuples in tuples, and parts in all of these, of what is hashed."""

_MOST_ODD_KEYS = 1000
"""Keys, or tuples where these may become keys, that can be made to have one hash."""

_MANY = 1 << 40


class Item:
    """What is known of an object.

    Attributes:
        depth: tuples in one another; 0 if it is none and holds none.
        size: parts, each counted as often as it is named.
        value: a text or number, the name of a global, or None.
        parts: of a tuple of up to 8, its items.
        odd: as a key it may have the hash of others.
    """

    __slots__ = ("depth", "odd", "parts", "size", "value")

    def __init__(self, depth: int = 0, size: int = 1, value: Any = None, odd: bool = False) -> None:
        self.depth, self.size, self.value, self.odd = depth, size, value, odd
        self.parts: list[Item] | None = None


class Global(str):
    """The name of a global: module, space, name."""

    __slots__ = ()


_MARK = Item()
_DAMAGED = "not a file of torch.save, or damaged"
_HASHING = ("OrderedDict", "Counter", "set", "frozenset", "dict", "defaultdict")


class Scan:
    """A stack machine like that of pickle, over Items.

    Lists and dicts may be changed after they were put somewhere; so what is hashed when it is the
    argument of a call is judged by the worst tuple of the pickle.

    Attributes:
        storages: by their keys, the types and numbers of elements that persistent ids name.
        texts: all texts in it.
    """

    def __init__(self) -> None:
        self.storages: dict[str, tuple[str, int]] = {}
        self.texts: list[str] = []
        self._stack: list[Item] = []
        self._memo: dict[int, Item] = {}
        self._tuples = self._deepest = self._largest = self._odd_keys = 0
        self._hashes = self._has_odd = False

    @property
    def has_tuples(self) -> bool:
        """Whether it makes any."""
        return self._tuples > 0

    def run(self, file: IO[bytes]) -> None:
        """Read one pickle. Raises ValueError for what is refused, and for what is no pickle."""
        operations = pickletools.genops(file)
        while True:
            try:
                opcode, argument, _ = next(operations)
            except StopIteration:
                break
            except (ValueError, LookupError, MemoryError, OverflowError) as error:
                raise ValueError(f"{_DAMAGED} ({error!r:.100})") from error
            try:
                self._step(opcode, argument)
            except (LookupError, TypeError, AttributeError, OverflowError) as error:
                raise ValueError(f"{_DAMAGED} ({error!r:.100})") from error
        if self._hashes:
            deep = self._deepest > _DEEPEST_KEY or self._largest > _LARGEST_KEY
            if deep or self._has_odd or self._tuples > _MOST_ODD_KEYS:
                raise ValueError(
                    "keys or elements of a set that may be large tuples, or numbers beyond 64 bits"
                )

    def _step(self, opcode: Any, argument: Any) -> None:
        name, stack = opcode.name, self._stack
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(argument)])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name == "DUP":
            stack.append(self._top())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "STOP":
            self._pop()
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else self._take(2)
            for key in items[::2]:
                self._require_key(key)
        elif name == "EMPTY_TUPLE":
            stack.append(self._tuple([]))
        elif name.startswith("TUPLE"):
            stack.append(
                self._tuple(self._since_mark() if name == "TUPLE" else self._take(int(name[5:])))
            )
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            *_, function, arguments = self._take(3 if name == "NEWOBJ_EX" else 2)[:2]
            stack.append(self._call(function, arguments))
        elif name in ("OBJ", "INST"):
            taken = self._since_mark()
            made_by = Item(value=Global(argument)) if name == "INST" else taken.pop(0)
            stack.append(self._call(made_by, self._tuple(taken)))
        elif name == "GLOBAL":
            stack.append(Item(value=Global(argument)))
        elif name == "STACK_GLOBAL":
            module, symbol = self._take(2)
            stack.append(Item(value=Global(f"{module.value} {symbol.value}")))
        elif name in ("PERSID", "BINPERSID"):
            if name == "PERSID":
                raise ValueError("a storage that is named in an unusual way")
            stack.append(self._storage(self._pop()))
        else:
            self._by_its_description(opcode, argument)

    def _by_its_description(self, opcode: Any, argument: Any) -> None:
        """Any other one, by what `pickletools` says that it takes and leaves."""
        before = opcode.stack_before
        if pickletools.markobject in before:
            taken = self._since_mark()
            taken = self._take(before.index(pickletools.markobject)) + taken
        else:
            taken = self._take(len(before))
        if opcode.name in ("ADDITEMS", "FROZENSET"):
            self._hashes = True
        # Lists, dicts and objects are left where they are, with what was put into them.
        for _ in opcode.stack_after:
            odd = type(argument) is int and not -LARGEST_INT <= argument < LARGEST_INT
            self._has_odd |= odd
            if type(argument) is str:
                self.texts.append(argument)
            self._stack.append(_made_of(taken) if taken else Item(value=argument, odd=odd))

    def _tuple(self, items: list[Item]) -> Item:
        made = _made_of(items)
        made.depth += 1
        made.parts = items if len(items) <= 8 else None
        self._tuples += 1
        self._deepest = max(self._deepest, made.depth)
        self._largest = max(self._largest, made.size)
        if made.depth > _DEEPEST:
            raise ValueError(f"tuples, more than {_DEEPEST} of them in one another")
        made.odd = True
        return made

    def _call(self, function: Item, arguments: Item) -> Item:
        name = function.value if type(function.value) is Global else ""
        module, _, symbol = name.partition(" ")
        parts = arguments.parts
        empty = parts is not None and not parts
        if symbol in _HASHING and not empty:
            self._hashes = True
        if module.partition(".")[0] == "torch" and symbol.endswith(
            ("Tensor", "Storage", "Parameter", "Buffer")
        ):
            raise ValueError(f"a call of {module}.{symbol}, which holds whatever is in memory")
        by_text = parts is not None and parts and type(parts[0].value) is str
        if symbol in ("bytearray", "bytes") and not (empty or by_text):
            raise ValueError(f"a call of {symbol}, which makes bytes that are not in the file")
        made = _made_of([arguments])
        made.odd = True
        return made

    def _storage(self, identity: Item) -> Item:
        """('storage', type, key, location, number of elements), and of the old format a view."""
        parts = identity.parts or []
        values = [part.value for part in parts[:5]]
        if (
            len(parts) not in (5, 6)
            or identity.size > 16
            or values[0] != "storage"
            or [type(value) for value in values[1:]] != [Global, str, str, int]
            or not 0 <= values[4] < _MANY
        ):
            raise ValueError("a storage that is named in an unusual way")
        self.storages[values[2]] = (values[1], values[4])
        return Item()

    def _require_key(self, key: Item) -> None:
        if type(key.value) is int and key.odd:
            raise ValueError("a key that is a number beyond 64 bits")
        if key.depth > _DEEPEST_KEY or key.size > _LARGEST_KEY:
            raise ValueError(f"a key that is a tuple, {key.depth} of them in one another")
        if key.odd:
            self._odd_keys += 1
            if self._has_odd or self._odd_keys > _MOST_ODD_KEYS:
                raise ValueError("thousands of keys that are tuples or other objects")

    def _top(self) -> Item:
        item = self._stack[-1]
        if item is _MARK:
            raise LookupError("nothing to remember")
        return item

    def _pop(self) -> Item:
        [item] = self._take(1)
        return item

    def _take(self, count: int) -> list[Item]:
        stack = self._stack
        taken = stack[len(stack) - count :]
        if len(taken) < count or _MARK in taken:
            raise LookupError("something is taken that is not there")
        del stack[len(stack) - count :]
        return taken

    def _since_mark(self) -> list[Item]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise LookupError("no mark")
        taken = stack[at + 1 :]
        del stack[at:]
        return taken


def _made_of(items: Iterable[Item]) -> Item:
    """An object that holds these."""
    made = Item()
    for item in items:
        made.depth = max(made.depth, item.depth)
        made.size = min(made.size + item.size, _MANY)
    return made
