"""Layouts, sources and path spellings."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes.files import (
    Layout,
    LoadedFeature,
    LocalFiles,
    PathTable,
    flatten,
    leaf_names,
)
from gpucache_pipes.testing import assert_same, features
from gpucache_pipes.testing.contracts import read_feature


@given(features(named_tuples=True), st.lists(st.integers(1, 200), max_size=4))
def test_a_feature_survives_its_bytes_whatever_the_buffers(feature: Any, cuts: list[int]) -> None:
    assert_same(read_feature(LoadedFeature(feature), cuts), feature)


@given(features(named_tuples=True))
def test_layouts(feature: Any) -> None:
    tree, tensors, values = flatten(feature)
    layout = Layout.of(tree, [(t.dtype, tuple(t.shape)) for t in tensors])
    assert layout is Layout.of(tree, [(t.dtype, tuple(t.shape)) for t in tensors])
    assert layout.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert layout.plain == len(values)
    end = 0
    for leaf in layout.leaves:
        assert leaf.offset % 16 == 0
        assert end <= leaf.offset < end + 16
        end = leaf.offset + leaf.nbytes
    assert layout.span == end
    assert len(leaf_names(tree)) == len(tensors)


def test_keys_that_compare_equal_are_different_layouts() -> None:
    a, b = LoadedFeature({1: torch.zeros(2)}), LoadedFeature({True: torch.zeros(2)})
    assert a.layout is not b.layout
    assert type(next(iter(read_feature(b, [])))) is bool


@pytest.mark.parametrize(
    ("feature", "says"),
    [
        ({"a": [torch.eye(2).to_sparse()]}, r"feature\['a'\]\[0\].*sparse.*load_fn"),
        ({"a": torch.empty(2, device="meta")}, "meta"),
        (type("Sub", (torch.Tensor,), {})(), "Sub"),
        ({"a": type("MyDict", (dict,), {})()}, r"feature\['a'\].*MyDict"),
        ({"a": {torch.zeros(1)}}, "set"),
    ],
)
def test_what_cannot_be_cached_says_where_and_why(feature: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        flatten(feature)


def test_parameters_conjugates_and_plain_objects() -> None:
    feature = {
        "p": torch.nn.Parameter(torch.ones(2)),
        "c": torch.tensor([1 + 2j]).conj(),
        "size": torch.Size([1, 2]),
        "o": OrderedDict(b=1),
        "s": {1, 2},
    }
    result = read_feature(LoadedFeature(feature), [])
    assert_same(result["c"], torch.tensor([1 - 2j]))
    assert type(result["p"]) is torch.Tensor and not result["p"].requires_grad
    assert result["size"] == torch.Size([1, 2]) and result["s"] == {1, 2}


def test_values_are_the_features_own() -> None:
    mutable = {1, 2}
    loaded = LoadedFeature([mutable])
    mutable.add(3)
    assert loaded.values == ({1, 2},)


class Numbers:
    """PathTable's other half: counts the keys it is asked for."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.table = PathTable(LocalFiles(), self.add, threading.Lock())

    def of(self, paths: Any) -> list[int]:
        return self.table.resolve(paths)[0].tolist()

    def add(self, keys: Sequence[str], paths: Sequence[str]) -> int:
        for key, path in zip(keys, paths, strict=True):
            assert os.path.isabs(path) and os.path.realpath(path) == key
        self.keys += keys
        assert len(set(self.keys)) == len(self.keys)
        return len(self.keys) - len(keys)


def test_every_spelling_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "a.pt").touch()
    (tmp_path / "link").symlink_to("real/sub")
    (tmp_path / "real" / "b.pt").symlink_to("a.pt")
    monkeypatch.chdir(tmp_path)
    numbers = Numbers()
    spellings = [
        str(tmp_path / "real" / "a.pt"),
        tmp_path / "real" / "a.pt",
        "real/a.pt",
        "./real/../real//a.pt",
        "link/../a.pt",  # through a link, .. is not what it looks like
        "real/b.pt",
        Path("real/a.pt"),
    ]
    for _ in range(2):
        assert numbers.of(spellings) == [0] * len(spellings)
    assert numbers.keys == [os.path.realpath(tmp_path / "real" / "a.pt")]


def test_relative_spellings_follow_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = Numbers()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        numbers.of(["x.pt"])
    monkeypatch.chdir(tmp_path / "one")
    assert numbers.of(["x.pt"]) == [0]
    assert len(numbers.keys) == 2


@pytest.mark.parametrize("link_at", [None, 0, 399])
def test_a_directory_is_listed_instead_of_looking_at_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link_at: int | None
) -> None:
    paths = [str(tmp_path / f"{number}.pt") for number in range(400)]
    for number, path in enumerate(paths):
        Path(path).symlink_to("0.pt") if number == link_at else Path(path).touch()
    os.utime(tmp_path, (1, 1))  # or it is listed each time, since it has just been changed
    listed, looked = [], []
    scandir, islink = os.scandir, os.path.islink
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr(os.path, "islink", lambda path: looked.append(path) or islink(path))
    numbers = Numbers()  # which looks whether keys are without links
    for first in range(0, 400, 25):
        numbers.of(paths[first : first + 25])
    assert len(listed) == 1
    if link_at is None:
        # Nobody lists a directory for a few files.
        assert len(looked) == 225

    # A new link is seen, though the directory was found to have none.
    late = [str(tmp_path / f"late{number}.pt") for number in range(20)]
    for path in late:
        Path(path).symlink_to("1.pt")
    assert set(numbers.of(late)) == {numbers.of(paths[1:2])[0]}


def test_a_large_directory_is_not_listed_for_a_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(tmp_path / f"{number}.pt") for number in range(3000)]
    for path in paths:
        Path(path).touch()
    os.utime(tmp_path, (1, 1))
    looked_at = 0
    scandir = os.scandir

    @contextmanager
    def counting(path: str) -> Iterator[Iterator[Any]]:
        def count(entries: Iterator[Any]) -> Iterator[Any]:
            nonlocal looked_at
            for entry in entries:
                looked_at += 1
                yield entry

        with scandir(path) as entries:
            yield count(entries)

    monkeypatch.setattr(os, "scandir", counting)
    numbers = Numbers()
    for first in range(0, 300, 50):
        numbers.of(paths[first : first + 50])
    assert looked_at <= 4 * 300 + 2
    for first in range(300, 3000, 50):
        numbers.of(paths[first : first + 50])
    assert looked_at <= 4 * 3000


@pytest.mark.parametrize("paths", [[3], [None], [b"x"], [""], [["a"]]])
def test_what_is_no_path(paths: list[Any]) -> None:
    with pytest.raises(TypeError, match="a path must be"):
        Numbers().of(paths)


@pytest.mark.parametrize("path", ["a.pt", Path("a.pt")])
def test_a_single_path_is_no_sequence(path: Any) -> None:
    with pytest.raises(TypeError, match="single path"):
        Numbers().of(path)
