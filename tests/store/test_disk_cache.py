"""disk_cache=: what was read once comes from the disk: exact and never stale."""

import errno
import gc
import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, device_for
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes import FeatureLoadError, GPUFeatureStore, PathLister
from gpucache_pipes.adapters import GPUCachedPathDataLoader
from gpucache_pipes.device import host, staging
from gpucache_pipes.files import LocalFiles, RowFiles
from gpucache_pipes.files.packed import disk_directory, native, packer, segment_writer
from gpucache_pipes.files.packed import readahead as disk_reader
from gpucache_pipes.files.packed.segment import Segment
from gpucache_pipes.store import Upcoming
from gpucache_pipes.testing.features import Pair, assert_same

Files = Callable[..., list[str]]
LONG_AGO = 1_000_000_000


def age(*paths: str, at: int = LONG_AGO) -> None:
    """Make files look as if they were written long ago: new ones may still change."""
    for path in paths:
        os.utime(path, (at, at))


def spoil(*paths: str) -> None:
    """Replace what files hold, and leave size and modification time."""
    for path in paths:
        status = os.stat(path)
        Path(path).write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def segments(cache: Path) -> list[Path]:
    return sorted((cache / "segments").iterdir())


def names(cache: Path) -> list[str]:
    """The names of all records of all segments."""
    return [name for path in segments(cache) for name in Segment(str(path), True).names()]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def files(make_files: Files) -> list[str]:
    """Thirty old files: small, with labels, ragged and large ones, and one without tensors."""

    def feature(number: int) -> Any:
        if number == 7:
            return {"nothing": None, "text": "abc"}
        rows = 200_000 if number == 11 else 3 + number % 4
        return {
            "x": torch.arange(rows * 3).view(rows, 3) + number,
            "label": number,
            "id": f"{number}",
        }

    paths = make_files(30, feature)
    age(*paths)
    return paths


@pytest.fixture
def features(files: list[str]) -> list[Any]:
    return [torch.load(path) for path in files]


@pytest.fixture(params=["native", "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(native, "native", None)
        monkeypatch.setattr(native, "_packed", None)


def read(store: GPUFeatureStore, paths: list[str], size: int = 8) -> list[Any]:
    found: list[Any] = []
    for at in range(0, len(paths), size):
        found += store.get_batch(paths[at : at + size])
    return found


def same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_second_run_reads_no_file(
    files: list[str], features: list[Any], cache: Path, kind: str, asynchronous: bool, reader: None
) -> None:
    with GPUFeatureStore(device_for(kind), disk_cache=cache, asynchronous=asynchronous) as store:
        same(read(store, files), features)
        assert store.stats().disk_hits == 0
    assert store.stats().disk_written == len(files) == len(set(names(cache)))
    assert store.stats().disk_bytes == sum(path.stat().st_size for path in segments(cache))
    spoil(*files)
    with GPUFeatureStore(device_for(kind), disk_cache=cache, asynchronous=asynchronous) as store:
        assert all(path in store for path in files)
        same(read(store, files[::-1]), features[::-1])
        assert store.stats().disk_hits == store.stats().files_read == len(files)
    assert len(names(cache)) == len(files)


def test_a_loader_takes_it(files: list[str], cache: Path) -> None:
    for hits in (0, len(files) - 1):
        lister = PathLister(files[:7] + files[8:], batch_size=4, shuffle=True)
        with GPUCachedPathDataLoader(
            lister, device="cpu", disk_cache=cache, keys=["label", "id"]
        ) as loader:
            assert sum(len(batch["label"]) for batch in loader) == len(files) - 1
            assert loader.stats().disk_hits == hits


def test_what_is_evicted_comes_from_the_disk(
    files: list[str], features: list[Any], cache: Path
) -> None:
    with GPUFeatureStore("cpu", max_cache_items=5, disk_cache=cache) as store:
        store.begin_epoch()
        same(read(store, files), features)
        assert store._disk is not None and store._disk.wait(30)
        spoil(*files)
        for _ in range(2):
            store.begin_epoch()
            same(read(store, files), features)
        assert store.stats().disk_hits >= 2 * (len(files) - 5)


# Is it still the same file?

STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 3)),
    st.tuples(st.just("run"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
)


@settings(max_examples=25)
@given(steps=st.lists(STEP, min_size=2, max_size=8), check=st.sampled_from(["stat", "listing"]))
def test_no_run_gets_what_a_file_does_not_hold(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any]], check: str
) -> None:
    root = tmp_path_factory.mktemp("run")
    paths = [str(root / f"{n}.pt") for n in range(4)]
    clock = 0
    held = [0] * 4
    for kind, what in [("write", n) for n in range(4)] + steps:
        if kind == "write":
            clock += 1
            held[what] = clock
            # A check by the listing finds changes of names only.
            if check == "listing":
                paths[what] = str(root / f"{what}-{clock}.pt")
            torch.save(torch.tensor(clock), paths[what])
            age(paths[what], at=LONG_AGO + clock)
            continue
        options = {"disk_cache": root / "cache", "disk_cache_check": check}
        with GPUFeatureStore("cpu", **options) as store:  # type: ignore[arg-type]
            found = store.get_batch([paths[n] for n in what])
            assert [int(feature) for feature in found] == [held[n] for n in what]


@pytest.mark.parametrize(("check", "expected"), [("stat", 5), ("listing", 0), ("never", 0)])
def test_what_is_looked_at(make_files: Files, cache: Path, check: str, expected: int) -> None:
    [path] = make_files(1, lambda n: torch.tensor(0))
    age(path)
    for change in (lambda: None, lambda: torch.save(torch.tensor(5), path)):
        change()
        age(path, at=LONG_AGO + len(segments(cache) if cache.exists() else []))
        with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_check=check) as store:
            found = int(store.get(path))
    assert found == expected
    Path(path).unlink()
    with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_check=check) as store:
        if check == "never":
            assert int(store.get(path)) == expected
        else:
            with pytest.raises(FileNotFoundError, match=r"0000\.pt"):
                store.get(path)


def test_revalidate_sees_changes_while_a_run_lasts(make_files: Files, cache: Path) -> None:
    [path] = make_files(1, lambda n: torch.tensor(0))
    age(path)
    for run in range(2):
        with GPUFeatureStore("cpu", disk_cache=cache, revalidate=True) as store:
            assert int(store.get(path)) == run
            hits = store.stats().disk_hits
            assert int(store.get(path)) == run and store.stats().disk_hits == hits == run
            torch.save(torch.tensor(run + 1), path)
            age(path, at=LONG_AGO + run + 1)
            assert int(store.get(path)) == run + 1
            assert store.stats().disk_hits == hits


def test_a_file_that_was_just_written_is_not_kept(make_files: Files, cache: Path) -> None:
    """It may change again without a change of its modification time."""
    paths = make_files(3)
    age(paths[0])
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, paths)
    assert names(cache) == [os.path.realpath(paths[0])]


# Damage, and a disk that fails


def test_a_damaged_segment_is_read_from_its_files_and_written_again(
    files: list[str], features: list[Any], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with GPUFeatureStore("cpu", disk_cache=cache) as store:
            same(read(store, files), features)
        [path, *_] = segments(cache)
        segment = Segment(str(path))
        with path.open("r+b") as file:
            for row in (3, 11, 20):  # the 11th is large
                file.seek(segment.record(row).start + 2)
                file.write(b"?!")
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        same(read(store, files), features)
        # Written again by the second run: the newest record counts.
        assert store.stats().disk_hits == len(files)
    path.write_bytes(path.read_bytes()[:9000])
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        assert "1 segments cannot be read" in caplog.text
        same(read(store, files), features)
        assert store.stats().disk_hits == 3
    spoil(*files)
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        same(read(store, files), features)


def full(*arguments: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["pwrite", "fsync", "rename"])
def test_a_full_disk_is_one_warning(
    files: list[str], features: list[Any], cache: Path, fails: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store = GPUFeatureStore("cpu", max_cache_items=3, disk_cache=cache)
    with store, monkeypatch.context() as patch:
        patch.setattr(segment_writer.os, fails, full)
        for _ in range(2):
            store.begin_epoch()
            same(read(store, files), features)
            assert store._disk is not None and store._disk.wait(30)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text and str(cache) in caplog.text
    assert not segments(cache) and not list((cache / "writers").iterdir())


def test_a_directory_that_vanishes_is_one_warning(
    files: list[str], features: list[Any], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with GPUFeatureStore("cpu", max_cache_items=3, disk_cache=cache) as store:
        for path in sorted(cache.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        cache.rmdir()
        for _ in range(2):
            store.begin_epoch()
            same(read(store, files), features)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not cache.exists()


def test_segments_that_vanish_are_read_from_files(
    files: list[str], features: list[Any], cache: Path
) -> None:
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, files)
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        for path in segments(cache):
            path.unlink()
        same(read(store, files), features)


def test_a_directory_that_cannot_be_made_is_one_warning(
    files: list[str], features: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with GPUFeatureStore("cpu", disk_cache=tmp_path / "file" / "cache") as store:
        same(read(store, files), features)
    assert "no disk cache at" in caplog.text and len(caplog.records) == 1


def test_a_directory_that_cannot_be_written_is_read(
    files: list[str], features: list[Any], cache: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, files[:10])
    spoil(*files[:10])
    before = sorted(cache.rglob("*"))
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(disk_directory.os, "open", read_only)
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        same(read(store, files), features)
        assert store.stats().disk_hits == 10
    assert "cannot be written" in caplog.text and len(caplog.records) == 1
    assert sorted(cache.rglob("*")) == before


def test_what_others_wrote_is_left_alone(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex', which is not of a disk cache"):
        GPUFeatureStore("cpu", disk_cache=tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    cache = tmp_path / "cache"
    with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_bytes=4096) as store:
        (cache / "notes.txt").write_text("a")
        (cache / "segments" / "notes.safetensors").write_text("b")
        read(store, files)
    assert (cache / "notes.txt").read_text() == "a"
    assert (cache / "segments" / "notes.safetensors").read_text() == "b"


def test_the_directory_is_the_users_own(tmp_path: Path) -> None:
    with GPUFeatureStore("cpu", disk_cache=tmp_path / "a" / "cache"):
        assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700


# The budget


def sized(make_files: Files, count: int, directory: str = "features") -> list[str]:
    paths = make_files(count, lambda n: torch.full((1000,), n, dtype=torch.uint8), directory)
    age(*paths)
    return paths


def total(cache: Path) -> int:
    return sum(path.stat().st_size for path in segments(cache))


@settings(max_examples=10)
@given(share=st.floats(0.15, 0.9), gpu=st.integers(1, 60), seed=st.integers(0, 99))
def test_hits_over_epochs_are_those_of_both_tiers(
    tmp_path_factory: pytest.TempPathFactory, share: float, gpu: int, seed: int
) -> None:
    """(G + D) / N, whatever order: what does not fit is read from its files, and nothing moves."""
    root = tmp_path_factory.mktemp("budget")
    paths = [str(root / f"{n:04d}.pt") for n in range(200)]
    for n, path in enumerate(paths):
        torch.save(torch.full((1000,), n, dtype=torch.uint8), path)
    age(*paths)
    rng = np.random.default_rng(seed)
    cache = root / "cache"
    budget = int(200 * 1080 * share) + 9000
    with GPUFeatureStore(
        "cpu", max_cache_items=gpu, disk_cache=cache, disk_cache_bytes=budget
    ) as store:
        disk = store._disk
        assert disk is not None
        before = None
        for epoch in range(4):
            store.begin_epoch("a")
            order = rng.permutation(200)
            store.announce("a", Upcoming(paths, order, 200))
            for at in range(0, 200, 20):
                store.request([paths[n] for n in order[at : at + 20]], owner="a").result()
                assert disk.wait(30)
            assert total(cache) <= budget
            stats = store.stats()
            if epoch == 1:
                before, held = stats, set(names(cache))
        assert before is not None and set(names(cache)) == held
        since = stats.since(before)
        assert since.disk_written == 0
        assert len(held) * 1100 > budget * 0.6 - 8192
        assert since.hits == 2 * gpu
        assert since.files_read - since.disk_hits == 2 * max(0, 200 - gpu - len(held))


def test_old_segments_make_room_and_used_ones_stay(make_files: Files, cache: Path) -> None:
    first, second, third = (sized(make_files, 20, directory) for directory in "abc")
    room = {"disk_cache": cache, "disk_cache_bytes": 80_000}
    for part in (first, second):
        with GPUFeatureStore("cpu", **room) as store:  # type: ignore[arg-type]
            read(store, part)
    with GPUFeatureStore("cpu", **room) as store:  # type: ignore[arg-type]
        read(store, first)  # in use
        assert store.stats().disk_hits == 20
        with GPUFeatureStore("cpu", **room) as other:  # type: ignore[arg-type]
            read(other, third)
        kept = set(names(cache))
        assert kept >= {os.path.realpath(path) for path in first}
        assert kept >= {os.path.realpath(path) for path in third[:8]}
        assert not kept >= {os.path.realpath(path) for path in second}
    assert total(cache) <= 80_000


def test_a_process_with_less_writes_less_and_removes_nothing(
    make_files: Files, cache: Path
) -> None:
    first, second = (sized(make_files, 20, directory) for directory in "ab")
    with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_bytes=60_000) as store:
        read(store, first)
    before = names(cache)
    with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_bytes=20_000) as store:
        read(store, second)
    assert names(cache) == before


# Features that are not like others


def test_what_has_other_objects_is_counted_and_not_kept(
    make_files: Files, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    paths = make_files(4, lambda n: {"x": torch.ones(2), "p": Pair(1, n) if n % 2 else n})
    age(*paths)
    for run in range(2):
        with GPUFeatureStore("cpu", disk_cache=cache, weights_only=False) as store:
            same(read(store, paths), [torch.load(path, weights_only=False) for path in paths])
            assert store.stats().disk_unpackable == 2
            assert store.stats().disk_hits == 2 * run
    assert caplog.text.count("it holds a Pair") == 2  # once a run


def test_keys_and_dtype_have_records_of_their_own(files: list[str], cache: Path) -> None:
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, files[:5])
    for hits in (0, 5):
        with GPUFeatureStore("cpu", disk_cache=cache, keys=["label"]) as store:
            assert read(store, files[:5]) == [{"label": n} for n in range(5)]
            assert store.stats().disk_hits == hits
        with GPUFeatureStore("cpu", disk_cache=cache, dtype={"x": torch.float64}) as store:
            assert read(store, files[:5])[4]["x"].dtype == torch.float64
            assert store.stats().disk_hits == hits


def test_a_load_fn_needs_a_key(files: list[str], cache: Path) -> None:
    with pytest.raises(ValueError, match="needs disk_cache_key="):
        GPUFeatureStore("cpu", disk_cache=cache, load_fn=torch.load)
    with pytest.raises(ValueError, match="needs disk_cache_key="):
        GPUFeatureStore("cpu", disk_cache=cache, source=LocalFiles(torch.load))
    calls: list[str] = []

    def first(path: str) -> Any:
        calls.append(path)
        return torch.load(path)["label"] * torch.ones(1)

    for key, expected in (("1", 5), ("1", 5), ("2", 10)):
        with GPUFeatureStore("cpu", disk_cache=cache, load_fn=first, disk_cache_key=key) as store:
            assert [float(feature) for feature in read(store, files[:5])] == [0, 1, 2, 3, 4]
        assert len(calls) == expected


def test_rows_are_kept(make_files: Files, cache: Path) -> None:
    [path] = make_files(1, lambda n: {"x": torch.arange(40).view(10, 4)})
    age(path)
    for hits in (0, 10):
        rows = RowFiles()
        with GPUFeatureStore("cpu", disk_cache=cache, source=rows) as store:
            found = read(store, rows.paths(path))
            same(found, [{"x": row} for row in torch.arange(40).view(10, 4)])
            assert store.stats().disk_hits == hits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disk_cache_bytes": "1GiB"}, "needs disk_cache="),
        ({"disk_cache_key": "a"}, "needs disk_cache="),
        ({"disk_cache": ""}, "must be the path of a directory"),
        ({"disk_cache": 3}, "must be the path of a directory"),
        ({"disk_cache": "x", "disk_cache_check": "mtime"}, "must be one of stat, listing, never"),
        ({"disk_cache": "x", "disk_cache_bytes": "0%"}, "disk_cache_bytes='0%'"),
        ({"disk_cache": "x", "disk_cache_key": ""}, "disk_cache_key=''"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPUFeatureStore("cpu", **options)


# Several processes

SCRIPT = """
    import sys, time, torch
    from gpucache_pipes import GPUFeatureStore
    cache, count, *paths = sys.argv[1:]
    store = GPUFeatureStore("cpu", disk_cache=cache, max_cache_items=int(count))
    print("ready", flush=True)
    sys.stdin.readline()
    store.begin_epoch()
    for at in range(0, len(paths), 8):
        for n, feature in enumerate(store.get_batch(paths[at : at + 8])):
            assert int(feature[0]) == int(paths[at + n][-7:-3]), paths[at + n]
    print(store.stats().files_read - store.stats().disk_hits, flush=True)
    sys.stdin.readline()
"""


def process(cache: Path, paths: list[str], count: int = 10_000) -> "subprocess.Popen[str]":
    script = textwrap.dedent(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(cache), str(count), *paths],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def tell(running: "subprocess.Popen[str]") -> str:
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write("go\n")
    running.stdin.flush()
    return running.stdout.readline().strip()


@pytest.fixture
def wide(make_files: Files) -> list[str]:
    paths = make_files(120, lambda n: torch.full((2000,), n))
    age(*paths)
    return paths


def test_processes_share_a_directory(wide: list[str], cache: Path) -> None:
    running = [process(cache, part) for part in (wide, wide[::-1], wide[:60])]
    try:
        for one in running:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        for one in running:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        for one, paths in zip(running, (120, 120, 60), strict=True):
            assert one.stdout is not None
            assert int(one.stdout.readline()) <= paths
        # They leave without `close`: the exit of the interpreter completes the segments.
        for one in running:
            one.communicate("\n", timeout=60)
            assert one.returncode == 0
    finally:
        for one in running:
            one.kill()
            one.wait()
    found = names(cache)
    assert len(found) == len(set(found)) == 120
    spoil(*wide)
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, wide)
        assert store.stats().disk_hits == 120
    assert not list((cache / "writers").iterdir())


def test_a_process_finds_what_another_writes_while_both_run(wide: list[str], cache: Path) -> None:
    later = process(cache, wide)
    try:
        assert later.stdout is not None and later.stdout.readline() == "ready\n"
        with GPUFeatureStore("cpu", disk_cache=cache) as store:
            read(store, wide)
            assert store._disk is not None and store._disk.wait(30)
            assert int(tell(later)) == 0
    finally:
        later.kill()
        later.communicate()


@pytest.mark.parametrize("after", [0.02, 0.1, None])
def test_a_kill_loses_the_segment_in_hand_at_most(
    wide: list[str], cache: Path, after: float | None
) -> None:
    """More of them: tests/kills.py."""
    killed = process(cache, wide, count=5)
    try:
        assert killed.stdout is not None and killed.stdout.readline() == "ready\n"
        if after is None:
            tell(killed)
        else:
            assert killed.stdin is not None
            killed.stdin.write("go\n")
            killed.stdin.flush()
            time.sleep(after)
    finally:
        killed.kill()
        killed.communicate()
    for _ in range(2):
        with GPUFeatureStore("cpu", disk_cache=cache) as store:
            found = read(store, wide)
            assert [int(feature[0]) for feature in found] == list(range(120))
    assert store.stats().disk_hits == 120
    assert len(names(cache)) == 120
    assert not list((cache / "writers").iterdir())


# The end


def test_close_waits_for_the_last_segment(wide: list[str], cache: Path) -> None:
    store = GPUFeatureStore("cpu", disk_cache=cache)
    read(store, wide)
    store.close()
    store.close()
    assert len(names(cache)) == 120


def test_a_store_that_is_dropped_writes_its_segment(wide: list[str], cache: Path) -> None:
    store = GPUFeatureStore("cpu", disk_cache=cache)
    read(store, wide)
    del store
    deadline = time.monotonic() + 30
    while not segments(cache) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(names(cache)) == 120


def test_a_segment_ends_after_a_time(
    wide: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "_SEGMENT_SECONDS", 0.05)
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, wide)
        deadline = time.monotonic() + 30
        while len(names(cache)) < 120 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(names(cache)) == 120


# What was found by attacking it


def test_revalidate_sees_a_file_of_the_same_size_and_time(make_files: Files, cache: Path) -> None:
    [path] = make_files(1, lambda n: torch.tensor(0))
    age(path)
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        store.get(path)
    with GPUFeatureStore("cpu", disk_cache=cache, revalidate=True) as store:
        assert int(store.get(path)) == 0 and store.stats().disk_hits == 1
        torch.save(torch.tensor(5), f"{path}.new")
        age(f"{path}.new")
        os.replace(f"{path}.new", path)
        assert int(store.get(path)) == 5


def test_a_file_larger_than_the_budget_makes_no_room(make_files: Files, cache: Path) -> None:
    paths = sized(make_files, 20)
    [large] = make_files(1, lambda n: torch.zeros(200_000), "large")
    age(large)
    with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_bytes=100_000) as store:
        read(store, paths)
    before = names(cache)
    with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_bytes=100_000) as store:
        read(store, [large])
    assert names(cache) == before


def test_a_batch_larger_than_the_room_is_written_in_part(make_files: Files, cache: Path) -> None:
    paths = sized(make_files, 64)
    with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_bytes=50_000) as store:
        read(store, paths, size=64)
    assert 15 < len(names(cache)) < 50
    assert total(cache) <= 50_000


def test_long_keys_count_against_the_budget(make_files: Files, cache: Path) -> None:
    paths = make_files(20, lambda n: {f"{n}-{k}-" + "x" * 60: torch.ones(1) for k in range(100)})
    age(*paths)
    with GPUFeatureStore("cpu", disk_cache=cache, disk_cache_bytes=100_000) as store:
        read(store, paths, size=3)
    assert 0 < total(cache) <= 100_000


def test_a_handler_may_read_while_a_hit_is_counted(files: list[str], cache: Path) -> None:
    with GPUFeatureStore("cpu", disk_cache=cache, asynchronous=False) as store:
        disk = store._disk
        assert disk is not None
        with disk._counting:
            disk._count(1)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_segment_that_is_none_is_left_out(
    files: list[str], features: list[Any], cache: Path, when: str
) -> None:
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, files)
    odd = cache / "segments" / f"{time.time_ns():020d}-{'a' * 16}.safetensors"
    if when == "before":
        os.mkfifo(odd)
    with GPUFeatureStore("cpu", disk_cache=cache, max_cache_items=1) as store:
        same(read(store, files[:5]), features[:5])
        if when == "meanwhile":
            odd.write_bytes(b"{" * 5000)
        for _ in range(2):
            store.begin_epoch()
            same(read(store, files), features)
        stats = store.stats()
        assert stats.disk_hits + stats.hits == 5 + 2 * len(files)
        if when == "meanwhile":
            assert store._disk is not None and store._disk.wait(10)


def test_a_thread_that_has_died_is_not_missed(
    files: list[str], features: list[Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GPUFeatureStore("cpu", disk_cache=cache, max_cache_items=1) as store:
        monkeypatch.setattr(packer.Packer, "_step", full)
        for _ in range(3):
            store.begin_epoch()
            same(read(store, files), features)


def test_a_path_that_none_can_be_fails_alone(files: list[str], cache: Path) -> None:
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        batch = store.request([*files[:3], "/features/bad\ud800.pt"])
        with pytest.raises((FeatureLoadError, FileNotFoundError), match="bad"):
            batch.result()
        assert len(store.get_batch(files[:3])) == 3


def test_descriptors_are_closed(files: list[str], cache: Path) -> None:
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, files)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for n in range(5):
        store = GPUFeatureStore("cpu", disk_cache=cache)
        if n % 2:
            read(store, files)
        del store
    gc.collect()
    for one in list(packer._packers):
        one.join(10)
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_what_is_left_of_a_process_that_was_killed_while_it_made_the_directory(
    files: list[str], cache: Path
) -> None:
    cache.mkdir()
    (cache / "gpucache-disk-cache.json.123").write_text("{")
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, files)
    assert len(names(cache)) == len(files)


@pytest.mark.parametrize("text", ["", "[" * 5000, "{}", "3", '{"format": 2, "max_bytes": 1}'])
def test_a_marker_that_cannot_be_read_is_an_error(cache: Path, text: str) -> None:
    cache.mkdir()
    (cache / "gpucache-disk-cache.json").write_text(text)
    with pytest.raises(ValueError, match=r"gpucache-disk-cache\.json cannot be read"):
        GPUFeatureStore("cpu", disk_cache=cache, disk_cache_bytes="1GiB")


def test_hits_are_counted_once(make_files: Files, cache: Path) -> None:
    paths = sized(make_files, 24)
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, paths[::3])
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, paths, size=24)
        assert store.stats().disk_hits == 8


@pytest.mark.parametrize("how", ["release", "clear"])
def test_what_is_released_is_looked_at_again(make_files: Files, cache: Path, how: str) -> None:
    [path] = make_files(1, lambda n: torch.tensor(0))
    age(path)
    for run in range(2):
        with GPUFeatureStore("cpu", disk_cache=cache) as store:
            assert int(store.get(path)) == 0
            assert store.stats().disk_hits == run
            if run:
                torch.save(torch.tensor(5), path)
                age(path, at=LONG_AGO + 1)
                store.release([path]) if how == "release" else store.clear()
                assert int(store.get(path)) == 5


def test_an_error_of_the_disk_concerns_no_file(
    make_files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where features lie in one piece nor where they do not."""
    paths = make_files(16, lambda n: torch.full((40 * (1 + n % 4),), n, dtype=torch.uint8))
    age(*paths)
    with GPUFeatureStore("cpu", disk_cache=cache, page_bytes=16) as store:
        read(store, paths)
    monkeypatch.setattr(native, "_packed", None)

    def broken(*arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with GPUFeatureStore("cpu", disk_cache=cache, page_bytes=16) as store:
        store.get_batch(paths[::3])
        store.release(paths[::6])  # leaves holes among the pages
        with monkeypatch.context() as patch:
            patch.setattr(native.os, "preadv", broken)
            patch.setattr(disk_reader, "_is_cached", lambda fd, size: True)
            keep = native.read
            patch.setattr(native, "read", lambda *a: keep(*a))
            found = store.get_batch([path for n, path in enumerate(paths) if n % 3])
        assert [int(feature[0]) for feature in found] == [n for n in range(16) if n % 3]


def test_files_are_looked_at_once(
    make_files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sized(make_files, 30)
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, paths[:10])
    looked: list[str] = []
    real = native.versions
    monkeypatch.setattr(native, "versions", lambda keys, p: looked.extend(keys) or real(keys, p))
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        read(store, paths, size=30)
    assert sorted(looked) == sorted(map(os.path.realpath, paths))


@pytest.mark.parametrize("kind", ["host", "staged"])
def test_a_device_whose_uploads_have_buffers_only(
    files: list[str], features: list[Any], cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Upload.memory` is optional."""
    for upload in (host.HostUpload, staging.StagedUpload):
        monkeypatch.setattr(upload, "memory", lambda self: (None, np.empty(0, np.int64)))
    for hits in (0, len(files)):
        with GPUFeatureStore(
            device_for(kind), disk_cache=cache, host_cache_bytes="1MiB", max_cache_items=3
        ) as store:
            same(read(store, files), features)
            assert store.stats().disk_hits == hits
            store.check()


@pytest.fixture(autouse=True)
def no_packer_is_left() -> Iterator[None]:
    yield
    for one in list(packer._packers):
        one.end()
        one.join(30)
