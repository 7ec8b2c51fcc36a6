"""Files that differ in sizes and plain values are read natively, and as torch.load reads them."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.files import Progress, Selection, batch_reader
from gpucache_pipes.files.batch_reader import BatchReader
from gpucache_pipes.files.planned import Bytes
from gpucache_pipes.files.pt import families
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.testing import assert_same
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
