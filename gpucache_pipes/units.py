"""Checks and conversions of sizes, counts and keys that users pass as arguments."""

import operator
import re
from collections.abc import Callable

_UNITS = {
    "": 1,
    "B": 1,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(
    name: str, value: int | float | str, whole: Callable[[], int | None] | None = None
) -> int:
    """Convert a size to a number of bytes.

    Args:
        name: of the parameter, for the error text.
        value: a number of bytes, or a text of a number and a unit: B, KB, MB, GB, TB (powers of
            1000) or KiB, MiB, GiB, TiB or their first letters (powers of 1024), in upper or lower
            case; or "50%" where there is a whole.
        whole: returns the bytes of which a percentage is a part; None if these are unknown.

    Raises:
        ValueError: `value` is not a size, or less than one byte. The text names the parameter.

    >>> parse_bytes("limit", 4096)
    4096
    >>> parse_bytes("limit", "8GiB")
    8589934592
    >>> parse_bytes("limit", "1.5 kb")
    1500
    >>> parse_bytes("limit", 8e9)
    8000000000
    >>> parse_bytes("limit", "much")
    Traceback (most recent call last):
        ...
    ValueError: limit='much' is not a size in bytes: write 8589934592 or "8GiB"
    """
    if isinstance(value, str) and value.strip().endswith("%") and whole is not None:
        return _percentage(name, value, whole())
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match and unit:
            # Not through float: a whole number of any size stays exact.
            count = int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)
            if count > 0:
                return count
        raise ValueError(f'{name}={value!r} is not a size in bytes: write 8589934592 or "8GiB"')
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return positive_int(name, value)


def _percentage(name: str, value: str, whole: int | None) -> int:
    try:
        share = float(value.strip().removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{name}={value!r} must be above 0% and at most 100%")
    if whole is None:
        raise ValueError(f"{name}={value!r}: how much memory there is is not known; give a number")
    return max(1, int(share * whole))


def positive_int(name: str, value: float, least: int = 1) -> int:
    """Return `value` as an int if it is a whole number of at least `least`.

    Args:
        name: of the parameter, for the error text.
        value: an int, or an integer type with `__index__` as NumPy has. A bool is rejected.
        least: smallest number that is accepted.

    Raises:
        ValueError: it is not such a number. The text names the parameter.

    >>> positive_int("depth", 3)
    3
    >>> positive_int("epochs", 1, least=2)
    Traceback (most recent call last):
        ...
    ValueError: epochs=1 must be a whole number of at least 2
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        kind = "positive whole number" if least == 1 else f"whole number of at least {least}"
        raise ValueError(f"{name}={value!r} must be a {kind}")
    return operator.index(value)


def require_hashable(name: str, value: object) -> None:
    """Check that `value` can be a key of a dict.

    Args:
        name: of the parameter, for the error text.
        value: what the user passed.

    Raises:
        TypeError: `value` is not hashable. The text names the parameter.
    """
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r:.200} must be hashable: it is compared by ==") from error


def format_bytes(count: int) -> str:
    """Write a number of bytes for people, with four significant digits and a binary unit.

    >>> format_bytes(1536)
    '1.5 KiB'
    >>> format_bytes(8_000_000_000)
    '7.451 GiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def counted(count: int, noun: str) -> str:
    """A number of things, for people.

    >>> counted(1, "file"), counted(4000, "file")
    ('1 file', '4,000 files')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
