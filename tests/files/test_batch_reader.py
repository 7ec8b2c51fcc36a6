"""Many files in one go: what is particular to it. That it reads as others do: test_formats.py."""

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpucache_pipes import FeatureLoadError, GPUFeatureStore
from gpucache_pipes.files import OpenFeature, Progress, batch_reader, chunks, forms, scratch
from gpucache_pipes.files.batch_reader import BatchReader
from gpucache_pipes.files.chunks import ScratchFeature
from gpucache_pipes.files.planned import Bytes
from gpucache_pipes.files.plans import ReadPlan
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.store.load_tracker import LoadTracker
from gpucache_pipes.store.task_reader import TaskReader

pytestmark = pytest.mark.skipif(
    batch_reader._native is None,
    reason="there is no native reader: " + str(batch_reader.native_problem),
)


def write(directory: Path, count: int, rows: int = 4) -> list[str]:
    paths = [str(directory / f"{number:03d}.pt") for number in range(count)]
    for number, path in enumerate(paths):
        torch.save({"x": torch.full((rows,), float(number))}, path)
    return paths


def known(reader: BatchReader) -> int:
    assert reader._known is not None
    return len(reader._known.forms)


def test_one_damaged_file_fails_alone(tmp_path: Path) -> None:
    paths = write(tmp_path, 8)
    data = Path(paths[3]).read_bytes()
    size = (16).to_bytes(4, "little")
    at = data.rindex(size + size)  # of the storage, in the directory: less than the pickle says
    Path(paths[3]).write_bytes(data[:at] + b"\x0c\0\0\0\x0c\0\0\0" + data[at + 8 :])
    with GPUFeatureStore("cpu") as store:
        batch = store.request(paths)
        assert list(batch.wait()) == [3]
        with pytest.raises(FeatureLoadError, match=r"003\.pt"):
            batch.result()
        assert len(store.get_batch(paths[:3] + paths[4:])) == 7


def test_stats_and_forms(tmp_path: Path) -> None:
    paths = write(tmp_path, 40)
    with GPUFeatureStore("cpu") as store:
        store.get_batch(paths)
        stats = store.stats()
    assert stats.files_read == 40
    assert stats.files_read_natively >= 36


def test_of_many_kinds_of_files_the_latest_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "MOST_FORMS", 8)
    monkeypatch.setattr(forms, "MOST_GROWING_FORMS", 4)
    reader = BatchReader(PtReader())
    for rows in range(1, 30):
        paths = write(tmp_path, 3, rows)
        for _ in range(2):
            found = reader.open(paths, Progress())
            assert [f is not None for f in found] == [True] * 3
        assert known(reader) <= 12


def test_many_forms_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files with a number of their own in the pickle have; those that come again are known."""
    monkeypatch.setattr(forms, "MOST_OF_A_SIZE", 4)
    reader = BatchReader(PtReader())
    path = str(tmp_path / "x.pt")
    for number in range(10):
        torch.save({"x": torch.ones(3), "n": number}, path)
        for _ in range(3):
            [feature] = reader.open([path], Progress())
            assert feature is not None and feature.values == (number,)
        assert known(reader) <= 4


def test_a_file_that_was_just_written_has_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time when it was read, however late that is asked."""
    paths = write(tmp_path, 2)
    os.utime(paths[0], ns=(0, 10**9))
    old, new = BatchReader(PtReader()).open(paths, Progress())
    assert old is not None and new is not None
    later = time.time_ns() + 60 * 10**9
    monkeypatch.setattr(batch_reader.time, "time_ns", lambda: later)
    assert old.version is not None
    assert new.version is None


def test_the_file_that_is_parsed_is_the_one_at_hand(tmp_path: Path) -> None:
    """A watcher with a read_timeout must not blame the last one for all."""
    progress = Progress()
    seen = []

    class Reader(PtReader):
        def parse(self, file: Bytes) -> Any:
            seen.append((progress.current, progress.since))
            return super().parse(file)

    paths = write(tmp_path, 4)
    BatchReader(Reader()).open(paths, progress)
    assert [current for current, _ in seen] == [0, 1, 2, 3]
    times = [since for _, since in seen]
    assert times == sorted(times)


def test_opening_ends_where_it_is_told_to(tmp_path: Path) -> None:
    progress = Progress()

    class Reader(PtReader):
        def parse(self, file: Bytes) -> Any:
            progress.stop()
            return super().parse(file)

    paths = write(tmp_path, 4)
    reader = BatchReader(Reader())
    assert len(reader.open(paths, progress)) == 1
    assert reader.open(paths, progress) == []


def test_a_task_that_begins_after_the_store_was_closed_opens_nothing() -> None:
    class Source:
        def open_many(self, *arguments: object) -> list[OpenFeature | None]:
            raise AssertionError("must not be called")

    class Loads(LoadTracker):
        def __init__(self) -> None:
            self.failed: dict[int, BaseException] = {}

        def complete(
            self, left: Any, ready: Any = None, failed: Any = (), natively: int = 0
        ) -> None:
            self.failed.update(failed)

    loads = Loads()
    reader = TaskReader(
        Source(),
        loads,
        None,
        in_threads=True,
        page_bytes=None,
        upload_bytes=1,
        revalidate=False,  # type: ignore[arg-type]
    )
    reader.stop()
    with pytest.raises(RuntimeError, match="closed"):
        reader.read([1, 2], [])
    assert loads.failed.keys() == {1, 2}


def test_large_plans_are_not_kept(tmp_path: Path) -> None:
    reader = BatchReader(PtReader())
    paths = [str(tmp_path / f"{number}.pt") for number in range(5)]
    for number, path in enumerate(paths):
        torch.save([str(number)] * 20_000 + [f"{number} {n}" for n in range(3000)], path)
    found = reader.open(paths, Progress())
    assert len(found) == batch_reader._FIRST and None not in found
    assert not reader._last


def test_scratch_memory_has_one_borrower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_returned", deque())  # without what other tests have returned

    class Borrower:
        pass

    one, other = Borrower(), Borrower()
    first, second = scratch.borrow(one), scratch.borrow(other)
    assert first is not second
    del one
    third = Borrower()
    assert scratch.borrow(third) is first
    assert len(scratch._returned) <= scratch._MOST_FREE


def test_what_is_in_scratch_stays(tmp_path: Path) -> None:
    """A call in a signal handler, between opening and reading, uses other memory."""
    reader = BatchReader(PtReader())
    (tmp_path / "second").mkdir()
    first, second = write(tmp_path, 3), write(tmp_path / "second", 3, 5)
    reader.open(first, Progress())
    features = reader.open(first, Progress())
    reader.open(second, Progress())
    memory = bytearray(16 * 3)
    kept = [feature for feature in features if feature is not None]
    left = chunks.read_many(kept, memoryview(memory), np.arange(3) * 16)
    for at in left:
        kept[at].read_into([memoryview(memory)[16 * at :]])
    found = torch.frombuffer(memory, dtype=torch.float32)
    for number, path in enumerate(first):
        assert torch.equal(torch.load(path)["x"][:4], found[4 * number : 4 * number + 4])
    assert all(isinstance(feature, ScratchFeature) for feature in kept)


def test_forms_must_lie_in_their_files() -> None:
    native = batch_reader._native
    assert native is not None

    def packed(*numbers: int) -> bytes:
        return np.array(numbers, np.int64).tobytes()

    run, number = packed(0, 4, 1), packed(4, 4, 1, 7, 0, 1, 1, 4)
    native.Form(8, 1, run, b"abcd", b"", b"", number)
    for size, growing, equal, content, numbers in (
        (7, 1, run, b"abcd", number),
        (8, 1, run, b"abc", number),
        (8, 1, run[:8], b"abcd", number),
        (8, 0, run, b"abcd", b""),
        (8, 17, run, b"abcd", number),
        (8, 3, run, b"abcd", number),
        (0, 0, b"", b"", b""),
        (8, 1, packed(-1, 4, 0), b"abcd", b""),
        (8, 1, run, b"abcd", packed(4, 5, 1, 7, 0, 1, 1, 4)),
        (8, 1, run, b"abcd", packed(4, 4, 1, 7, 0, 1, 1, 0)),
        (8, 1, run, b"abcd", packed(4, 4, 1, 7, 1, 0, 1, 1)),
        (8, 2, run, b"abcd", packed(4, 4, 1, 7, 0, 1, 1, 1)),
    ):
        with pytest.raises(ValueError, match="not within"):
            native.Form(size, growing, equal, content, b"", b"", numbers)


def test_equal_plans_of_other_files_are_one_form(tmp_path: Path) -> None:
    plans: list[ReadPlan] = []
    reader = BatchReader(PtReader())
    for _ in range(3):
        for feature in reader.open(write(tmp_path, 6), Progress()):
            assert isinstance(feature, ScratchFeature)
            plans.append(feature.plan)
    assert known(reader) == 1
    assert all(plan == plans[0] for plan in plans)


def test_bools_of_other_bytes_stay_as_they_are(tmp_path: Path) -> None:
    """Also where they are strided: torch makes 1 of them in some copies."""
    path = tmp_path / "x.pt"
    torch.save({"x": torch.tensor([[True, False, True]] * 70).t()}, path)
    data = path.read_bytes()
    at = data.index(b"\x01\x00\x01" * 3)
    path.write_bytes(data[:at] + b"\x02\x00\x03" + data[at + 3 :])
    expected = torch.load(path)["x"]
    with GPUFeatureStore("cpu") as store:
        for _ in range(4):  # by each of the readers
            found = store.get(path)["x"]
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
            store.clear()
