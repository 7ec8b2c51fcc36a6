"""Finds what a pickle would make `torch.load` do, without doing it.

`torch.load(weights_only=True)` runs no code of a file, but it has no bounds. It hashes whatever a
file uses as a key, and calls what allocates as much memory as a number in the file says. `Scan`
follows the opcodes on a stack of descriptions instead of objects, and refuses what no data set has.
The reader in `pickle.py` needs no such scan: it has these bounds itself.

What a few bytes of a pickle can do to the process:

- A tuple in a tuple in a tuple costs one byte of pickle a level. Hashing it (as a key of a dict, or
  as an element of a set) recurses in C, without Python's recursion limit, until the stack of the
  process is used up: SIGSEGV. Python cannot catch that, so a limit has to be checked before.
- A pair that names one pair twice, n times over, has 2**n parts, and hashing it visits each of
  them. 60 such levels are 300 bytes of pickle, and their hash would never be computed. Therefore
  sizes count each part as often as it is named; counting the objects or the bytes does not work.
- The hash of an int is its remainder by 2**61 - 1. With numbers beyond 64 bits, or with complex
  numbers and other objects whose hashes a file can choose, thousands of keys have one hash. A dict
  then compares each new key with all others, which takes quadratic time.
- `torch.Tensor(n)`, a storage of n elements, and `bytearray(n)` are allowed by torch.load. They
  allocate what n says, and the tensor holds whatever was in that memory.

What does not work: checking keys only where the opcode SETITEM puts them into a dict. Calls hash
their arguments, too: `OrderedDict([(key, value)])` and `set([...])` hash the items of their lists,
and a pickle may append to a list after it has put the list into the arguments. So what a call may
hash is judged at the end, by the worst tuple of the whole pickle. Keys that opcodes set are judged
one by one. That is more lenient, and data sets do have short tuples as keys.
"""

import pickletools
from collections.abc import Iterable
from typing import IO, Any

MAX_INT_KEY = 1 << 63
"""The bound of keys that are ints. A few thousand larger ones can have one hash, and then take
minutes to compare."""

_MAX_TUPLE_DEPTH = 32
"""Nested tuples of values."""

_MAX_KEY_DEPTH, _MAX_KEY_SIZE = 4, 256
"""Nested tuples of a key, or of an element of a set, and the number of parts in all of them."""

_MAX_COLLIDABLE_KEYS = 1000
"""Keys whose hashes a file can choose. Where calls hash objects, all tuples of the pickle count."""

_COUNT_LIMIT = 1 << 40
"""Sizes of objects grow no further, since they can double with every opcode. Storages that state
this many elements or more are refused."""


class Item:
    """A description of an object on the stack.

    Attributes:
        depth: the number of nested tuples; 0 for an object that is no tuple and holds none.
        size: the number of parts, each counted as often as it is named.
        value: a string, a number, or a Global; None for anything else.
        parts: the items of a tuple of up to 8; else None.
        may_collide: whether as a key it may have a hash that the file has chosen.
    """

    __slots__ = ("depth", "may_collide", "parts", "size", "value")

    def __init__(self, value: Any = None, may_collide: bool = False) -> None:
        self.depth, self.size = 0, 1
        self.value, self.may_collide = value, may_collide
        self.parts: list[Item] | None = None


class Global(str):
    """The name of a global: the module, a space, and the name, as pickletools prints it."""

    __slots__ = ()


_MARK = Item()
_DAMAGED = "not a torch.save file, or a damaged one"
_HASHING_TYPES = ("OrderedDict", "Counter", "set", "frozenset", "dict", "defaultdict")


class Scan:
    """A stack machine like that of pickle, on Items instead of objects.

    Attributes:
        storages: by key, the class and the number of elements of the storages that the pickle
            names.
        strings: all strings of the pickle.
    """

    def __init__(self) -> None:
        self.storages: dict[str, tuple[str, int]] = {}
        self.strings: list[str] = []
        self._stack: list[Item] = []
        self._memo: dict[int, Item] = {}
        # Of all tuples of the pickle: their number, the deepest and the largest.
        self._tuples = self._deepest = self._largest = 0
        self._collidable_keys = 0
        # Whether a call or a set hashes objects, and whether there is an int beyond 64 bits.
        self._hashes = self._has_large_int = False

    @property
    def has_tuples(self) -> bool:
        """Whether the pickle makes a tuple."""
        return self._tuples > 0

    def run(self, file: IO[bytes]) -> None:
        """Read one pickle from the current position of `file`.

        Raises:
            ValueError: the pickle is refused, or it is not a pickle.
        """
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
            deep = self._deepest > _MAX_KEY_DEPTH or self._largest > _MAX_KEY_SIZE
            if deep or self._has_large_int or self._tuples > _MAX_COLLIDABLE_KEYS:
                raise ValueError(
                    "the pickle calls a type that hashes keys or elements, which may be large "
                    "tuples or numbers beyond 64 bits; convert the file"
                )

    def _step(self, opcode: Any, argument: Any) -> None:
        """Do to the stack of descriptions what an opcode does to the stack of objects."""
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
            items = self._pop_mark() if name == "SETITEMS" else self._take(2)
            for key in items[::2]:
                self._require_key(key)
        elif name == "EMPTY_TUPLE":
            stack.append(self._tuple([]))
        elif name.startswith("TUPLE"):
            stack.append(
                self._tuple(self._pop_mark() if name == "TUPLE" else self._take(int(name[5:])))
            )
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            *_, function, arguments = self._take(3 if name == "NEWOBJ_EX" else 2)[:2]
            stack.append(self._call(function, arguments))
        elif name in ("OBJ", "INST"):
            taken = self._pop_mark()
            function = Item(value=Global(argument)) if name == "INST" else taken.pop(0)
            stack.append(self._call(function, self._tuple(taken)))
        elif name == "GLOBAL":
            stack.append(Item(value=Global(argument)))
        elif name == "STACK_GLOBAL":
            module, symbol = self._take(2)
            stack.append(Item(value=Global(f"{module.value} {symbol.value}")))
        elif name in ("PERSID", "BINPERSID"):
            if name == "PERSID":
                raise ValueError("a storage is named in an unusual way")
            stack.append(self._storage(self._pop()))
        else:
            self._step_by_description(opcode, argument)

    def _step_by_description(self, opcode: Any, argument: Any) -> None:
        """Do any other opcode by what `pickletools` says that it takes and leaves."""
        before = opcode.stack_before
        if pickletools.markobject in before:
            taken = self._pop_mark()
            taken = self._take(before.index(pickletools.markobject)) + taken
        else:
            taken = self._take(len(before))
        if opcode.name in ("ADDITEMS", "FROZENSET"):
            self._hashes = True
        # A list, dict or object that the opcode changes stays on the stack. Its description then
        # covers what was put into it.
        for _ in opcode.stack_after:
            large = type(argument) is int and not -MAX_INT_KEY <= argument < MAX_INT_KEY
            self._has_large_int |= large
            if type(argument) is str:
                self.strings.append(argument)
            self._stack.append(
                _combined(taken) if taken else Item(value=argument, may_collide=large)
            )

    def _tuple(self, items: list[Item]) -> Item:
        made = _combined(items)
        made.depth += 1
        made.parts = items if len(items) <= 8 else None
        self._tuples += 1
        self._deepest = max(self._deepest, made.depth)
        self._largest = max(self._largest, made.size)
        if made.depth > _MAX_TUPLE_DEPTH:
            raise ValueError(
                f"tuples are nested more than {_MAX_TUPLE_DEPTH} deep; use lists instead"
            )
        made.may_collide = True
        return made

    def _call(self, function: Item, arguments: Item) -> Item:
        """Describe the result of a call. Its hash may be anything."""
        name = function.value if type(function.value) is Global else ""
        module, _, symbol = name.partition(" ")
        parts = arguments.parts
        empty = parts is not None and not parts
        if symbol in _HASHING_TYPES and not empty:
            self._hashes = True
        if module.partition(".")[0] == "torch" and symbol.endswith(
            ("Tensor", "Storage", "Parameter", "Buffer")
        ):
            raise ValueError(
                f"the pickle calls {module}.{symbol}, whose result holds whatever is in memory"
            )
        by_text = parts is not None and parts and type(parts[0].value) is str
        if symbol in ("bytearray", "bytes") and not (empty or by_text):
            raise ValueError(
                f"the pickle calls {symbol}, which makes bytes that are not in the file"
            )
        made = _combined([arguments])
        made.may_collide = True
        return made

    def _storage(self, identity: Item) -> Item:
        """Note a storage: ("storage", class, key, device, elements), and a view in old files."""
        parts = identity.parts or []
        values = [part.value for part in parts[:5]]
        if (
            len(parts) not in (5, 6)
            or identity.size > 16
            or values[0] != "storage"
            or [type(value) for value in values[1:]] != [Global, str, str, int]
            or not 0 <= values[4] < _COUNT_LIMIT
        ):
            raise ValueError("a storage is named in an unusual way")
        self.storages[values[2]] = (values[1], values[4])
        return Item()

    def _require_key(self, key: Item) -> None:
        """Raise ValueError for a key of a dict that may be expensive to hash or to compare."""
        if type(key.value) is int and key.may_collide:
            raise ValueError("a key of a dict is a number beyond 64 bits; use a string instead")
        if key.depth > _MAX_KEY_DEPTH or key.size > _MAX_KEY_SIZE:
            raise ValueError(
                f"a key of a dict holds tuples more than {_MAX_KEY_DEPTH} deep, or of more than "
                f"{_MAX_KEY_SIZE} parts; use a string instead"
            )
        if key.may_collide:
            self._collidable_keys += 1
            if self._has_large_int or self._collidable_keys > _MAX_COLLIDABLE_KEYS:
                raise ValueError(
                    f"over {_MAX_COLLIDABLE_KEYS} keys of dicts are tuples or other objects, or "
                    "one may hold a number beyond 64 bits; use strings instead"
                )

    def _top(self) -> Item:
        item = self._stack[-1]
        if item is _MARK:
            raise LookupError("a mark is on top of the stack")
        return item

    def _pop(self) -> Item:
        [item] = self._take(1)
        return item

    def _take(self, count: int) -> list[Item]:
        """Remove and return the last `count` descriptions."""
        stack = self._stack
        taken = stack[len(stack) - count :]
        if len(taken) < count or _MARK in taken:
            raise LookupError("the stack is too short")
        del stack[len(stack) - count :]
        return taken

    def _pop_mark(self) -> list[Item]:
        """Remove the last mark; remove and return what was above it."""
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise LookupError("the stack has no mark")
        taken = stack[at + 1 :]
        del stack[at:]
        return taken


def _combined(items: Iterable[Item]) -> Item:
    """Describe an object that holds these items."""
    made = Item()
    for item in items:
        made.depth = max(made.depth, item.depth)
        made.size = min(made.size + item.size, _COUNT_LIMIT)
    return made
