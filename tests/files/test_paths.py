"""Batches of paths as positions in a list: like lists of str, and the same files to a store."""

import copy
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.files import LocalFiles, PathList, Paths, PathTable
from gpucache_pipes.store import Upcoming

Files = Callable[..., list[str]]
NAMES = [f"/f/{n}.pt" for n in range(5)]


@given(st.lists(st.integers(0, 4), max_size=6), st.slices(6), st.lists(st.sampled_from(NAMES)))
def test_they_are_like_a_list(positions: list[int], cut: slice, other: list[str]) -> None:
    paths = Paths(PathList(NAMES), np.array(positions, np.intp))
    expected = [NAMES[at] for at in positions]
    assert paths == expected and expected == paths and list(paths) == expected
    assert len(paths) == len(expected) and bool(paths) == bool(expected)
    assert paths[cut] == expected[cut] and isinstance(paths[cut], Paths)
    assert (paths == other) == (expected == other) and (paths != other) == (expected != other)
    assert paths + other == expected + other and other + paths == other + expected
    assert repr(paths) == repr(expected)
    for again in (pickle.loads(pickle.dumps(paths)), copy.copy(paths), copy.deepcopy(paths)):
        assert type(again) is list and again == expected
    assert [paths[at] for at in range(-len(expected), len(expected))] == expected * 2
    assert all(isinstance(path, str) for path in paths)
    if expected:
        assert expected[0] in paths and paths.index(expected[0]) == 0
        assert default_collate(paths) == default_collate(expected)
    with pytest.raises(IndexError):
        paths[len(expected)]
    with pytest.raises(TypeError):
        hash(paths)
    with pytest.raises(TypeError):
        paths[0] = "x"  # type: ignore[index]


class Table:
    """Numbers files as a store does."""

    def __init__(self, follow_links: bool = False) -> None:
        self.known: list[str] = []
        self.table = PathTable(LocalFiles(), self.add, threading.Lock(), follow_links)

    def add(self, keys: Sequence[str], paths: Sequence[str]) -> int:
        self.known += keys
        return len(self.known) - len(keys)

    def __call__(self, paths: Sequence[str]) -> list[int]:
        found: list[int] = self.table.resolve(paths)[0].tolist()
        return found


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.booleans(),
)
def test_a_table_finds_the_same_files(
    batches: list[list[int]], listed: list[bool], relative: bool
) -> None:
    names = [name[1:] for name in NAMES] if relative else NAMES
    files = PathList(names, os.getcwd() if relative else None)
    one, other = Table(), Table()
    for batch, as_paths in zip(batches, listed, strict=False):
        paths = Paths(files, np.array(batch))
        assert one(paths if as_paths else list(paths)) == other(list(paths))
    assert one.known == other.known
    assert Paths(files, np.arange(5)).absolute() == [os.path.abspath(name) for name in names]


def test_links_are_looked_up_again(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    files = PathList([str(tmp_path / name) for name in ("a", "b", "link")])
    table = Table(follow_links=True)
    everything = Paths(files, np.arange(3))
    assert table(everything) == [0, 1, 0]
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert table(everything) == [0, 1, 1]


def test_relative_paths_mean_the_same_after_the_directory_has_changed(
    make_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(6)
    monkeypatch.chdir(tmp_path)
    with GPUFeatureStore("cpu", max_cache_items=3) as store:
        lister = PathLister("features", batch_size=2)
        node = GPUPrefetcher(lister, store, depth=1)
        first = next(node)
        assert first.paths == [str(tmp_path / "features" / f"000{n}.pt") for n in (0, 1)]
        monkeypatch.chdir("/")
        rest = [int(feature["label"]) for batch in node for feature in batch]
        assert rest == [2, 3, 4, 5]
        assert first.paths == [str(tmp_path / "features" / f"000{n}.pt") for n in (0, 1)]
        store.check()


def test_links_do_not_change_what_relative_paths_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in "xy":
        (tmp_path / place).mkdir()
        (tmp_path / place / "a").touch()
        (tmp_path / place / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path / "x")
    paths = Paths(PathList.here(["a", "link"]), np.arange(2))
    table = Table(follow_links=True)
    assert table(paths[:1]) == [0]
    monkeypatch.chdir(tmp_path / "y")
    assert table(paths) == [0, 0] and table(["a"]) == [1]
    assert [os.path.dirname(key) for key in table.known] == [str(tmp_path / p) for p in "xy"]


def test_two_lists_in_turn_are_each_remembered() -> None:
    table = Table()
    one, other = (Paths(PathList(list(names)), np.arange(5)) for names in (NAMES, NAMES[::-1]))
    for _ in range(3):
        assert table(one) == [0, 1, 2, 3, 4] and table(other) == [4, 3, 2, 1, 0]
    assert len(table.table._listed) == 2


def test_urls_stay_as_they_are() -> None:
    paths = Paths(PathList(["s3://bucket/a.pt", "b.pt"], "/here"), np.array([0, 1]))
    assert paths.absolute() == ["s3://bucket/a.pt", "/here/b.pt"]


def test_an_epoch_is_drawn_when_it_is_needed() -> None:
    drawn: list[int] = []

    def draw() -> list[int]:
        drawn.append(1)
        return [1, 0, 1]

    upcoming = Upcoming(NAMES, draw, 2)
    assert not drawn
    assert list(upcoming) == [NAMES[1], NAMES[0], NAMES[1]] and len(upcoming) == 3
    assert drawn == [1]


@pytest.mark.parametrize(("policy", "builds"), [("clairvoyant", True), ("keep", False)])
def test_no_plan_is_built_before_something_must_go(
    make_files: Files, policy: str, builds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpucache_pipes.store import requests

    built: list[str] = []
    plan = requests.AccessPlan

    def counted(*args: object) -> object:
        built.append(threading.current_thread().name)
        return plan(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(requests, "AccessPlan", counted)
    paths = make_files(8)

    def epochs(count: int, **options: object) -> None:
        with GPUFeatureStore("cpu", policy=policy, **options) as store:  # type: ignore[arg-type]
            node = GPUCollator(GPUPrefetcher(PathLister(paths, batch_size=2, shuffle=True), store))
            for _ in range(count):
                node.reset()
                labels = torch.cat([batch["label"] for batch in node]).flatten()
                assert sorted(labels.tolist()) == list(range(8))
            store.check()

    epochs(3, max_cache_items=8)
    assert not built, "everything fits"
    epochs(3, max_cache_items=4)
    assert len(built) == (3 if builds else 0), "a plan for each announcement, once"
    assert all(name.startswith("gpucache-reader") for name in built)


def test_a_plan_that_is_asked_for_while_it_is_built_is_not_waited_for() -> None:
    """As by a signal handler that requests a batch in the thread that builds."""
    from gpucache_pipes.cache import AccessPlan
    from gpucache_pipes.store.announcement import Announcement

    def build() -> AccessPlan:
        announcement.build()
        assert announcement.plan is None
        return AccessPlan([1])

    announcement = Announcement(build)
    announcement.build()
    assert announcement.plan is not None and announcement.plan.end == 1


def test_an_announcement_that_cannot_be_used_fails_nobody(make_files: Files) -> None:
    paths = make_files(4)
    with GPUFeatureStore("cpu", max_cache_items=2) as store:
        store.announce("somebody", Upcoming(["", *paths], [0, 1, 2, 3, 4], 5))
        assert [int(feature["label"]) for feature in store.get_batch(paths)] == [0, 1, 2, 3]
        store.check()
