"""A path that is bad is an error of that path alone; and what a relative path means."""

import os
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdata.nodes
from conftest import sample
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import (
    FeatureFileDataset,
    FeatureLoadError,
    FeaturePathDataset,
    GPUCachedPathDataLoader,
    GPUFeatureStore,
    GPUPrefetcher,
    PathLister,
)
from gpucache_pipes.testing.contracts import in_threads

Files = Callable[..., list[str]]
BAD = ["/f/\0.pt", "/f\0/x.pt", "/f/\ud800.pt", "/\udfff/x.pt", "/f/" + "x" * 300, "/f/" * 2000]


def labels(batches: Any) -> list[list[int]]:
    return [[int(feature["label"]) for feature in batch] for batch in batches]


@pytest.mark.parametrize("bad", BAD, ids=lambda path: ascii(path)[:20])
@pytest.mark.parametrize("revalidate", [False, True])
@pytest.mark.parametrize("place", [0, 7])
def test_the_others_do_not_notice(
    make_files: Files, bad: str, revalidate: bool, place: int
) -> None:
    good = make_files(20)
    paths = [*good[:place], bad, *good[place:]]
    with GPUFeatureStore("cpu", max_cache_items=8, revalidate=revalidate) as store:
        assert bad not in store
        store.prefetch(paths)
        with pytest.raises((FeatureLoadError, FileNotFoundError)) as raised:
            store.get_batch(paths)
        assert repr(bad)[1:-1] in str(raised.value)
        for epoch in range(2):
            del epoch
            assert labels([store.get_batch(good)]) == [list(range(20))]
        lister = PathLister(paths, batch_size=4, bucket_by="file_size", shuffle=True)
        state = lister.state_dict()
        node = GPUPrefetcher(lister, store, on_error="skip")
        assert sorted(chain.from_iterable(labels(node))) == list(range(20))
        lister.reset(state)
        store.release(paths)
        with pytest.raises((FeatureLoadError, FileNotFoundError)):
            store.warm(paths, progress=False)
        store.check()
    dataset = FeatureFileDataset(paths)
    with pytest.raises((FeatureLoadError, FileNotFoundError)):
        _ = dataset[place]
    assert int(dataset[place - 1 if place else 1]["label"]) == max(0, place - 1)


def test_a_link_to_itself_is_one_bad_file(make_files: Files, tmp_path: Path) -> None:
    good = make_files(3)
    loop = tmp_path / "features" / "loop.pt"
    loop.symlink_to(loop)
    with GPUFeatureStore("cpu") as store:
        lister = PathLister(tmp_path / "features", batch_size=4)
        assert len(lister.paths) == len(good) + 1
        node = GPUPrefetcher(lister, store, on_error="skip")
        assert labels(node) == [[0, 1, 2]]


def test_a_path_that_may_not_be_looked_at(
    make_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below /proc/1/root for who is no superuser: even what its links mean is not told."""
    good = make_files(4)
    hidden = "/proc/1/root/x.pt"

    def realpath(path: str, *rest: Any, **named: Any) -> str:
        if str(path).startswith("/proc/1/root"):
            raise PermissionError(13, "Permission denied", "/proc/1/root")
        return before(path, *rest, **named)

    before = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", realpath)
    with GPUFeatureStore("cpu") as store:
        with pytest.raises((FeatureLoadError, FileNotFoundError), match=hidden):
            store.get_batch([*good, hidden])
        assert labels([store.get_batch(good)]) == [[0, 1, 2, 3]]
        node = GPUPrefetcher([[*good, hidden]], store, on_error="skip")
        assert labels(node) == [[0, 1, 2, 3]]


def directories(tmp_path: Path, count: int = 2) -> list[Path]:
    """Directories with files of the same names and other features."""
    roots = []
    for number in range(count):
        root = tmp_path / f"d{number}"
        root.mkdir()
        for name in range(6):
            torch.save(sample(10 * number + name), root / f"{name}.pt")
        roots.append(root)
    return roots


def test_changing_the_directory_in_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others, with absolute paths, do not notice; and no file gets two entries."""
    roots = directories(tmp_path)
    monkeypatch.chdir(tmp_path)
    absolute = [[str(root / f"{name}.pt") for name in range(6)] for root in roots]
    over = threading.Event()
    with GPUFeatureStore("cpu") as store:

        def change() -> None:
            try:
                for turn in range(300):
                    os.chdir(roots[turn % 2])
                    relative = [f"{name}.pt" for name in range(6)]
                    mixed = [*relative, absolute[0][0]]
                    expected = [10 * (turn % 2) + name for name in range(6)]
                    assert labels([store.get_batch(mixed)]) == [[*expected, 0]]
            finally:
                over.set()

        def use(who: int) -> None:
            if who == 0:
                change()
                return
            while not over.is_set():
                for number, paths in enumerate(absolute):
                    expected = [10 * number + name for name in range(6)]
                    assert labels([store.get_batch(paths)]) == [expected]

        in_threads(use, 4)
        assert store.stats().items == store.stats().files_read == 12
        store.check()


@given(st.data())
def test_a_relative_path_means_what_it_meant_when_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    roots = directories(tmp_path_factory.mktemp("r"))
    before = os.getcwd()
    with GPUFeatureStore("cpu", max_cache_items=data.draw(st.sampled_from([4, 100]))) as store:
        try:
            os.chdir(roots[0])
            given_as = data.draw(st.sampled_from([".", "?.pt", [f"{n}.pt" for n in range(6)]]))
            kind = data.draw(st.sampled_from(["lister", "dataset", "loader"]))
            source: Any = PathLister(given_as, batch_size=2)
            if kind == "dataset":
                source = torch.utils.data.DataLoader(
                    FeaturePathDataset(given_as), batch_size=2, collate_fn=list
                )
            node: Any = GPUPrefetcher(source, store, depth=data.draw(st.integers(1, 3)))
            if kind == "loader":
                node = GPUCachedPathDataLoader(source, store=store, collate_fn=list)
            else:
                node = torchdata.nodes.Loader(node)
            state = source.state_dict() if kind == "lister" else None
            got = []
            for _ in range(2):
                for batch in node:
                    got += labels([batch])[0]
                    os.chdir(data.draw(st.sampled_from([*roots, "/"])))
            assert got == 2 * list(range(6))
            if state is not None:
                source.reset(state)  # the fingerprint of the files is the same
            os.chdir(roots[1])
            assert int(store.get("0.pt")["label"]) == 10
        finally:
            os.chdir(before)


def test_a_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = directories(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(roots[0])
    relative = PathLister(".", batch_size=6)
    monkeypatch.chdir(gone)
    gone.rmdir()
    with GPUFeatureStore("cpu") as store:
        assert int(store.get(str(roots[1] / "3.pt"))["label"]) == 13
        with pytest.raises(FileNotFoundError):
            store.get("0.pt")
        assert labels(GPUPrefetcher(relative, store)) == [list(range(6))]
    monkeypatch.chdir(tmp_path)
