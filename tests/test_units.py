"""Checks and conversions of arguments."""

import pytest

from gpucache_pipes.units import format_bytes, parse_bytes, positive_int, require_hashable


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("1.5 GB", 1_500_000_000),
        ("64KiB", 65536),
        ("2 TB", 2 * 10**12),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: int | str, count: int) -> None:
    assert parse_bytes("limit", text) == count


@pytest.mark.parametrize("value", ["", "8 GiBs", "many", "-1", "0", "0.1", 0, -5, 1.5, True, None])
def test_wrong_sizes_name_parameter_and_value(value: object) -> None:
    with pytest.raises(ValueError, match="limit=") as caught:
        parse_bytes("limit", value)  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def test_positive_int() -> None:
    assert positive_int("depth", 3) == 3
    with pytest.raises(ValueError, match="depth=0"):
        positive_int("depth", 0)


@pytest.mark.parametrize("value", [True, 1.0, "3", None])
def test_only_whole_numbers(value: object) -> None:
    with pytest.raises(ValueError, match="must be a positive whole number"):
        positive_int("depth", value)  # type: ignore[arg-type]


def test_require_hashable() -> None:
    require_hashable("owner", ("a", 1))
    with pytest.raises(TypeError, match=r"owner=\[\] must be hashable"):
        require_hashable("owner", [])


def test_format() -> None:
    assert [format_bytes(n) for n in (7, 2048, 3 << 30)] == ["7 B", "2 KiB", "3 GiB"]
    assert format_bytes(5 << 50) == "5120 TiB"
