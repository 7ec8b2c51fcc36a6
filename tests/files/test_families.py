"""Files that differ in sizes and plain values are read natively, and as torch.load reads them."""

import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.files import Progress, Selection, batch_reader, forms
from gpucache_pipes.files.batch_reader import BatchReader
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import Bytes
from gpucache_pipes.files.pt import families
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.testing import assert_same
from gpucache_pipes.testing.contracts import in_threads, read_feature
from gpucache_pipes.testing.formats import AtOnce

pytestmark = pytest.mark.skipif(
    batch_reader._native is None,
    reason="there is no native reader: " + str(batch_reader.native_problem),
)


class Counting(PtReader):
    """Counts the files that are parsed."""

    parsed = 0

    def parse(self, file: Bytes) -> Any:
        """See PlanReader."""
        self.parsed += 1
        return super().parse(file)


def parsed_of(directory: Path | str, features: list[Any]) -> list[bool]:
    """Save these features and read them, one after the other. Which of them had to be parsed."""
    reader = Counting()
    at_once = AtOnce(reader)
    path = f"{directory}/x.pt"
    parsed = []
    for feature in features:
        torch.save(feature, path)
        before = reader.parsed
        [(_, found)] = at_once.read([path])
        assert_same(found, torch.load(path, weights_only=True))
        parsed.append(reader.parsed > before)
    return parsed


# Whatever a data set is made of

_plain = st.sampled_from(
    [
        lambda n: n,
        lambda n: 1000 + n,
        lambda n: -1 - n,
        lambda n: 1 << 40 | n,
        lambda n: n / 7,
        lambda n: f"clip_{n % 100:02d}",
        lambda n: f"{n % 10}",
        lambda n: "é" * (n % 3) + "ab" * (3 - n % 3),
        lambda n: n % 2 == 0,
        lambda n: "cpu" if n % 2 else "gpu",
        lambda n: None,
        lambda n: "always",
    ]
)


def _tensor(
    dtype: torch.dtype, shape: list[int], grows: int | None, which: int
) -> Callable[[int], torch.Tensor]:
    def make(n: int) -> torch.Tensor:
        sizes = list(shape)
        if grows is not None and sizes:
            sizes[grows % len(sizes)] = [n, 2 * n + 1, 5][which]
        count = torch.Size(sizes).numel()
        return torch.arange(count).remainder(50).to(dtype).reshape(sizes)

    return make


_tensors = st.builds(
    _tensor,
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8]),
    st.lists(st.integers(1, 4), max_size=3),
    st.none() | st.integers(0, 2),
    st.integers(0, 2),
)
_shapes_of_features = st.recursive(
    _tensors | _plain,
    lambda parts: (
        st.lists(parts, min_size=1, max_size=4)
        | st.dictionaries(st.sampled_from(["x", "0", "label", "cpu"]), parts, min_size=1)
    ),
    max_leaves=6,
)


def _made(shape: Any, n: int) -> Any:
    if isinstance(shape, list):
        return [_made(part, n) for part in shape]
    if isinstance(shape, dict):
        return {key: _made(part, n) for key, part in shape.items()}
    return shape(n)


@given(
    _shapes_of_features,
    st.lists(st.integers(0, 300), min_size=3, max_size=8),
    st.sampled_from([None, Selection.of(None, torch.bfloat16)]),
)
def test_equals_torch_load(shape: Any, draws: list[int], selection: Selection | None) -> None:
    reader = PtReader()
    reader.selection = selection
    at_once = AtOnce(reader)
    with tempfile.TemporaryDirectory() as directory:
        paths = [f"{directory}/{at:02d}.pt" for at in range(len(draws))]
        for path, n in zip(paths, draws, strict=True):
            torch.save(_made(shape, n), path)
        for path, found in [*at_once.read(paths), *at_once.read(paths[::-1])]:
            expected = torch.load(path, weights_only=True)
            assert_same(found, expected if selection is None else selection.feature(expected))


# What is learned

ALIKE: dict[str, Callable[[int], Any]] = {
    "ragged": lambda n: torch.randn(n, 16),
    "ragged, in the last dimension": lambda n: torch.randn(4, n * 4),
    "two ragged ones": lambda n: {"a": torch.randn(n, 16), "v": torch.randn(60 - n, 32)},
    "two that agree": lambda n: {"a": torch.randn(n, 16), "v": torch.ones(n, 16, dtype=torch.bool)},
    "label": lambda n: {"x": torch.randn(8), "label": n},
    "label and name": lambda n: (torch.randn(8), n, f"clip_{n:05d}"),
    "float": lambda n: {"x": torch.randn(8), "score": n / 3},
    "negative": lambda n: {"x": torch.randn(8), "n": -n},
    "large": lambda n: {"x": torch.randn(8), "n": n << 33},
    "ragged, with values": lambda n: {"id": f"{n:03d}", "x": torch.randn(n, 16), "y": [n, n + 1]},
    "no tensor": lambda n: {"id": f"{n:03d}"},
    "not contiguous": lambda n: {"x": torch.arange(12.0).view(3, 4).t(), "n": n},
}


@pytest.mark.parametrize("name", ALIKE)
def test_two_files_tell_what_differs(tmp_path: Path, name: str) -> None:
    parsed = parsed_of(tmp_path, [ALIKE[name](n) for n in (16, 24, 28, 20, 36, 32)])
    assert parsed == [True, True, False, False, False, False]


def test_more_that_differs_is_learned_later(tmp_path: Path) -> None:
    one = [(4, 1, "a"), (8, 1, "a"), (12, 1, "a"), (12, 2, "a"), (8, 5, "a"), (4, 3, "b")]
    features = [{"x": torch.randn(n, 16), "n": number, "s": text} for n, number, text in one]
    parsed = parsed_of(tmp_path, [*features, {"x": torch.randn(8, 16), "n": 9, "s": "z"}])
    assert parsed == [True, True, False, True, False, True, False]


def test_what_cannot_be_learned_is_parsed(tmp_path: Path) -> None:
    """The value and the key of a storage are one string in the pickle, or two dimensions differ."""
    key = "0"
    aliased = [{"id": "10"[n % 2], "x": torch.ones(n + 1)} for n in range(4)]
    aliased += [{"id": key, "x": torch.ones(9)}, {"id": "7", "x": torch.ones(9)}]
    parsed_of(tmp_path, aliased)
    square = [torch.randn(n, n) for n in (3, 5, 4, 6)]
    assert all(parsed_of(tmp_path, square))
    reshaped = [torch.randn(2, 8), torch.randn(8, 2), torch.randn(4, 4)]
    assert all(parsed_of(tmp_path, reshaped))
    parts = [torch.randn(n + 8, 16)[:n] for n in (3, 5, 4, 6)]  # views of larger storages
    assert all(parsed_of(tmp_path, parts))


def test_two_tensors_that_swap_sizes(tmp_path: Path) -> None:
    sizes = [(4, 8), (8, 4), (5, 6), (6, 5), (12, 12), (1, 9)]
    features = [{"a": torch.randn(a, 16), "b": torch.randn(b, 16)} for a, b in sizes]
    assert parsed_of(tmp_path, features)[2:] == [False] * 4


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    def make(n: int) -> Any:
        x = torch.randn(n, 16)
        return {"x": x, "again": x, "n": n}

    assert parsed_of(tmp_path, [make(n) for n in (4, 8, 12)])[2] is False


def test_files_of_no_class_are_left_alone_in_the_end(tmp_path: Path) -> None:
    reader = PtReader()
    at_once = BatchReader(reader)
    path = str(tmp_path / "x.pt")
    for n in range(16, 40, 2):
        torch.save(torch.zeros(n, n, 16, dtype=torch.uint8), path)
        at_once.open([path], Progress())
    [known] = reader._families._classes.values()
    assert known.family is None
    assert known.failures == families._MOST_FAILURES


def test_classes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_MOST_CLASSES", 3)
    reader = PtReader()
    at_once = AtOnce(reader)
    path = str(tmp_path / "x.pt")
    for count in range(1, 8):
        for n in range(4):
            torch.save([torch.randn(8)] * count + [n], path)
            [(_, found)] = at_once.read([path])
            assert_same(found, torch.load(path))
        assert len(reader._families._classes) <= 3


def test_text_that_is_none_is_an_error_of_its_file(tmp_path: Path) -> None:
    """A name is read natively whatever its bytes are; then they turn out to be no text."""
    paths = [tmp_path / f"{n}.pt" for n in range(8)]
    for n, path in enumerate(paths):
        torch.save({"x": torch.randn(8), "name": f"clip_{n}"}, path)
    paths[6].write_bytes(paths[6].read_bytes().replace(b"clip_6", b"clip\xff\xff"))
    with GPUFeatureStore("cpu") as store:
        with pytest.raises(Exception, match=r"6\.pt"):
            store.get_batch(paths)
        assert store.get(paths[7])["name"] == "clip_7"
        assert store.stats().files_read_natively >= 3


def test_seventeen_that_grow(tmp_path: Path) -> None:
    """More than the native reader follows."""
    features = [{f"t{k}": torch.randn(n, 16) for k in range(17)} for n in (16, 32, 48)]
    assert all(parsed_of(tmp_path, features))


def test_files_whose_pickles_have_one_length_and_other_opcodes(tmp_path: Path) -> None:
    """Each kind is a class of its own: the first file is not to spoil the others."""
    flags = [{"x": torch.ones(8), "n": n, "flag": n == 0} for n in range(12)]
    assert parsed_of(tmp_path, flags) == [True] * 3 + [False] * 9
    mixed = []
    for n in range(40):
        label, name = (n, "abcd") if n % 2 else (500 + n, "abc")
        mixed.append({"x": torch.ones(8), "label": label, "name": name})
    assert not any(parsed_of(tmp_path, mixed)[6:])


def test_values_that_are_often_equal(tmp_path: Path) -> None:
    """A one-hot list: which values differ is learned bit by bit."""
    hot = [None, 7, 1, 5, 2, 7, 1, 3, 6, 0, 4, 5, 7, 6, 2, 1, *range(8)]
    features = [{"x": torch.ones(8), "y": [int(n == one) for n in range(8)]} for one in hot]
    assert not any(parsed_of(tmp_path, features)[11:])


def test_a_class_that_is_learned_by_several_threads(tmp_path: Path) -> None:
    paths = []
    for n in range(8):
        paths.append(str(tmp_path / f"{n}.pt"))
        values = {f"k{j}": j for j in range(30)}
        torch.save({**values, "x": torch.randn(8), "n": n, "m": 20 + n}, paths[-1])
    for _ in range(10):
        reader = BatchReader(PtReader())
        reader.open(paths[:1], Progress())
        in_threads(lambda n, reader=reader: reader.open([paths[1 + n]], Progress()), 4)  # type: ignore[misc]
        at_once = AtOnce(PtReader())
        at_once._batch_reader = reader
        for path, found in at_once.read(paths):
            assert_same(found, torch.load(path))


def test_a_family_that_had_to_go_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "MOST_GROWING_FORMS", 2)
    features = [
        {"x": torch.randn(n, 16), "s": "a" * length}
        for length in (1, 2, 3, 1)
        for n in (4, 8, 12, 10)
    ]
    assert parsed_of(tmp_path, features)[-3:] == [False] * 3


def test_looking_for_families_ends_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_reader, "_FREE_TRIES", 10)
    looked = []
    learn = families.Families.learn
    monkeypatch.setattr(
        families.Families, "learn", lambda *args: looked.append(None) or learn(*args)
    )
    parsed_of(tmp_path, [[torch.ones(3)] * n for n in range(1, 30)])
    assert len(looked) == 11


# Pickles that torch.save does not write


def with_pickle(change: Callable[[bytes], bytes], feature: Any) -> bytes:
    """A file of torch.save whose pickle was changed, with the bytes of the same storages."""
    buffer = io.BytesIO()
    torch.save(feature, buffer)
    made = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made, "w") as new:
        for record in old.infolist():
            data = old.read(record)
            if record.filename.endswith("data.pkl"):
                data = change(data)
            new.writestr(zipfile.ZipInfo(record.filename), data)
    content = bytearray(made.getvalue())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 38 : at + 42] = bytes(4)  # attributes, of which torch.save writes none
        at = content.find(b"PK\x01\x02", at + 4)
    return bytes(content)


def agree(directory: Path, training: list[bytes], others: list[bytes]) -> None:
    """What a reader says that has learned from `training` is what a new one says."""
    at_once = AtOnce(PtReader())
    path = str(directory / "x.pt")
    for content in (*training, *others):
        Path(path).write_bytes(content)
        expected: Any = None
        try:
            opened = PtReader().open(path)
            expected = read_feature(opened)
            opened.close()
        except (Unsupported, ValueError) as error:
            expected = type(error)
        try:
            [(_, found)] = at_once.read([path])
        except (Unsupported, ValueError) as error:
            found = type(error)
        if isinstance(expected, type) or isinstance(found, type):
            assert found is expected
        else:
            assert_same(found, expected)


def test_sizes_that_are_signed(tmp_path: Path) -> None:
    """As LONG1, whose first byte of 128 and more is a negative number."""

    def make(n: int) -> bytes:
        old = b"K" + bytes([n])
        return with_pickle(
            lambda data: data.replace(old, b"\x8a\x01" + bytes([n])),
            {"x": torch.zeros(n, dtype=torch.uint8)},
        )

    agree(tmp_path, [make(10), make(74), make(10)], [make(74), make(138)])


def test_a_part_that_is_empty_in_the_first_file(tmp_path: Path) -> None:
    """The next header begins where it does."""

    def make(n: int) -> bytes:
        return with_pickle(lambda data: data, {"x": torch.zeros(n, dtype=torch.uint8)})

    contents = [make(n) for n in (0, 8, 9, 12)]
    last = contents.pop()
    broken = bytearray(last)
    broken[broken.rindex(b"PK\x03\x04")] = 0
    agree(tmp_path, contents, [last, bytes(broken)])


def test_tensors_in_another_order_than_their_numbers(tmp_path: Path) -> None:
    """A key that is set twice keeps its place: the tree has B first, and the pickle A."""

    def make(a: int, b: int, claimed: tuple[int, int] | None = None) -> bytes:
        feature = {"k": 1, "j": torch.zeros(a, 16), "l": torch.ones(b, 16)}
        rows = claimed or (a, b)

        def change(data: bytes) -> bytes:
            data = data.replace(b"X\x01\x00\x00\x00l", b"X\x01\x00\x00\x00k")
            for before, after in zip((a, b), rows, strict=True):
                if before != after:
                    at = data.index(number(16 * before))
                    data = data[:at] + number(16 * after) + data[at + 3 :]
            return data

        return with_pickle(change, feature)

    agree(
        tmp_path,
        [make(17, 17), make(24, 24), make(32, 32)],
        [make(20, 20), make(20, 28), make(20, 28, (28, 20))],
    )


def number(value: int) -> bytes:
    return b"M" + value.to_bytes(2, "little")
