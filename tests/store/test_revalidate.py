"""revalidate=True: what is served is what the file held when it was asked for."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import GPUFeatureStore

Files = Callable[..., list[str]]


def write(path: str, value: int, at: int = 0, width: int = 4) -> None:
    """A file of that value, written long ago: `at` seconds after the beginning of time."""
    torch.save(torch.full((width,), value), path)
    if at:
        os.utime(path, (at, at))


def value(feature: torch.Tensor) -> int:
    return int(feature[0])


STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3)),
    st.tuples(st.just("request"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
    st.tuples(st.just("collect"), st.integers(0, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("prefetch"), st.lists(st.integers(0, 3), max_size=4)),
    st.tuples(st.just("release"), st.integers(0, 3)),
    st.tuples(st.just("warm"), st.integers(0, 3)),
    st.tuples(st.just("clear"), st.none()),
)


@given(
    steps=st.lists(STEP, max_size=40),
    items=st.sampled_from([None, 1, 2]),
    policy=st.sampled_from(["clairvoyant", "lru", "keep"]),
)
def test_each_request_gets_what_the_files_held(
    tmp_path: Path, steps: list[tuple[str, object]], items: int | None, policy: str
) -> None:
    paths = [str(tmp_path / f"{n}.pt") for n in range(4)]
    clock = 0
    held = [0] * 4

    def change(number: int) -> None:
        nonlocal clock
        clock += 1
        held[number] = clock
        write(paths[number], clock, at=clock)

    for number in range(4):
        change(number)
    open_tickets = []
    with GPUFeatureStore(
        "cpu", asynchronous=False, revalidate=True, max_cache_items=items, policy=policy
    ) as store:
        for what, argument in steps:
            if what == "write":
                change(argument)  # type: ignore[arg-type]
            elif what == "request":
                wanted: list[int] = argument  # type: ignore[assignment]
                batch = store.request([paths[n] for n in wanted])
                open_tickets.append((batch, [held[n] for n in wanted]))
            elif what in ("collect", "cancel") and open_tickets:
                batch, expected = open_tickets.pop(argument % len(open_tickets))  # type: ignore
                if what == "cancel":
                    batch.cancel()
                else:
                    assert [value(feature) for feature in batch.result()] == expected
            elif what == "prefetch":
                store.prefetch([paths[n] for n in argument])  # type: ignore[attr-defined]
            elif what == "release":
                store.release([paths[argument]])  # type: ignore[call-overload]
            elif what == "warm":
                store.warm([paths[argument]], progress=False)  # type: ignore[call-overload]
            elif what == "clear":
                store.clear()
            store.check()
        assert [value(store.get(path)) for path in paths] == held
        assert len(store) == sum(path in store for path in paths)


def test_what_does_not_change_is_read_once(make_files: Files) -> None:
    paths = make_files(3, lambda n: torch.full((4,), n))
    for path in paths:
        os.utime(path, (1, 1))
    with GPUFeatureStore("cpu", revalidate=True) as store:
        for _ in range(3):
            assert [value(feature) for feature in store.get_batch(paths)] == [0, 1, 2]
        assert store.stats().files_read == 3


def test_another_file_of_the_same_size_and_time(tmp_path: Path) -> None:
    path, other = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    write(path, 1, at=5)
    with GPUFeatureStore("cpu", revalidate=True) as store:
        assert value(store.get(path)) == 1
        write(other, 2, at=5)
        os.replace(other, path)
        assert value(store.get(path)) == 2


def test_a_change_that_the_clock_does_not_show(tmp_path: Path) -> None:
    path = str(tmp_path / "a.pt")
    now = int(time.time())
    write(path, 1, at=now)
    with GPUFeatureStore("cpu", revalidate=True) as store:
        assert value(store.get(path)) == 1
        write(path, 2, at=now)
        assert value(store.get(path)) == 2


def test_a_file_that_goes_and_comes_back(tmp_path: Path) -> None:
    path = str(tmp_path / "a.pt")
    write(path, 1, at=5)
    with GPUFeatureStore("cpu", revalidate=True) as store:
        kept = store.request([path])
        assert value(store.get(path)) == 1
        os.unlink(path)
        with pytest.raises(FileNotFoundError, match=r"a\.pt"):
            store.get(path)
        assert value(kept.result()[0]) == 1
        write(path, 2, at=6)
        assert value(store.get(path)) == 2


def test_other_spellings_follow(tmp_path: Path) -> None:
    path = str(tmp_path / "a.pt")
    link = str(tmp_path / "link.pt")
    os.symlink(path, link)
    write(path, 1, at=5)
    with GPUFeatureStore("cpu", asynchronous=False, revalidate=True) as store:
        tickets = []
        for n in range(1, 6):
            write(path, n, at=n)
            tickets.append(store.request([link, path, Path(path)]))
            assert link in store and len(store) == 1
        for n, batch in enumerate(tickets, 1):
            assert [value(feature) for feature in batch.result()] == [n] * 3
        store.release([link])
        assert path not in store and len(store) == 0


def test_a_link_that_is_changed(tmp_path: Path) -> None:
    files = [str(tmp_path / f"v{n}.pt") for n in (1, 2)]
    for n, path in enumerate(files, 1):
        write(path, n, at=5)
    link = tmp_path / "latest.pt"
    with GPUFeatureStore("cpu", revalidate=True) as store:
        for n in (1, 2, 1):
            link.unlink(missing_ok=True)
            link.symlink_to(files[n - 1])
            assert value(store.get(link)) == n
            assert [value(store.get(path)) for path in files] == [1, 2]
        link.unlink()
        assert [value(store.get(path)) for path in files] == [1, 2]
        assert len(store) == 2


def test_versions_are_not_kept_for_ever(tmp_path: Path) -> None:
    path = str(tmp_path / "a.pt")
    write(path, 0, at=1)
    with GPUFeatureStore("cpu", asynchronous=False, revalidate=True) as store:
        ahead = store.request([path])
        for n in range(1, 50):
            write(path, n, at=n + 1)
            batch = store.request([path])
            assert value(ahead.result()[0]) == n - 1
            ahead = batch
            store.check()
        assert len(store._shared.cache.entries) <= 3
        assert store.warm([path, Path(path)], progress=False) == 1


def test_other_sizes(tmp_path: Path) -> None:
    path = str(tmp_path / "a.pt")
    with GPUFeatureStore("cpu", revalidate=True) as store:
        for width in (4, 40_000, 8):
            write(path, width, at=width, width=width)
            assert store.get(path).shape == (width,)
        assert store.stats().cached_bytes == 8 * 8


def test_without_it_a_file_is_read_once(tmp_path: Path) -> None:
    path = str(tmp_path / "a.pt")
    write(path, 1, at=5)
    with GPUFeatureStore("cpu") as store:
        assert value(store.get(path)) == 1
        write(path, 2, at=6)
        assert value(store.get(path)) == 1
