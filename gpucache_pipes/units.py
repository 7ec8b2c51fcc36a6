"""Sizes and counts as users write them."""

import operator
import re

_UNITS = {
    "": 1,
    "B": 1,
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


def parse_bytes(name: str, value: int | str) -> int:
    """The number of bytes that `value` stands for: 4096, "8GiB", "1.5 GB".

    Raises ValueError, naming the parameter and the value, unless it is at least 1.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match and unit:
            # Whole numbers stay exact however large they are.
            count = int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)
            if count > 0:
                return count
        raise ValueError(f'{name}={value!r} is not a size in bytes: write 8589934592 or "8GiB"')
    return positive_int(name, value)


def positive_int(name: str, value: int, least: int = 1) -> int:
    """`value`, or a ValueError that names the parameter unless it is an int of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        kind = "positive whole number" if least == 1 else f"whole number of at least {least}"
        raise ValueError(f"{name}={value!r} must be a {kind}")
    return operator.index(value)


def require_hashable(name: str, value: object) -> None:
    """Raise TypeError, naming the parameter, for a value that cannot be a key of a dict."""
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r:.200} must be hashable: it is compared by ==") from error


def format_bytes(count: int) -> str:
    """`count` for people: "1.5 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
