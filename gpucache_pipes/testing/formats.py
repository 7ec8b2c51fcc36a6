"""The contract that the reader of every file format keeps, as tests; inherit it to test yours."""

import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes.files import OpenFeature, Progress, planned
from gpucache_pipes.files.batch_reader import BatchReader
from gpucache_pipes.files.chunks import read_many
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import PlanReader
from gpucache_pipes.testing.contracts import (
    build_feature,
    error_of,
    in_threads,
    inherited,
    open_descriptors,
    read_feature,
)
from gpucache_pipes.testing.features import assert_same

_REFUSALS = (Unsupported, ValueError, OSError)
"""What a reader may raise for a file that it does not read."""

_MASKS = (0x01, 0xFF)
"""Bits that are flipped in each byte in turn."""


class FormatContract:
    """Tests of what the store requires of a `PlanReader`. A subclass defines five methods.

        class TestMyFormat(FormatContract):
            def make_reader(self): return MyReader()
            def features(self): return st.dictionaries(st.text(), tensors())
            def small(self): return {"x": torch.arange(3)}
            def write(self, feature, path): mylibrary.save(feature, path)
            def reference(self, path): return mylibrary.load(path)

    A reader that is stricter than its reference passes. One that reads what the reference refuses,
    or that reads it differently, does not.
    """

    def make_reader(self) -> PlanReader:
        """Return a new reader."""
        raise NotImplementedError

    def features(self) -> st.SearchStrategy[Any]:
        """What `write` accepts and the reader must be able to read."""
        raise NotImplementedError

    def small(self) -> Any:
        """A feature whose file has at most a few thousand bytes: the test damages each of them."""
        raise NotImplementedError

    def alike(self) -> Sequence[Any]:
        """Features like `small`, as other files of its data set may hold them: in other sizes, or
        with other plain values. From these the reader may learn in what files differ.
        """
        return ()

    def write(self, feature: Any, path: str) -> None:
        """Write a file as the library that defines the format does."""
        raise NotImplementedError

    def reference(self, path: str) -> Any:
        """Return the feature as the library that defines the format reads it.

        May raise anything. It is called only for files that the reader has read.
        """
        raise NotImplementedError

    def assert_equal(self, feature: Any, expected: Any) -> None:
        """Compare what the reader gives with the reference; here types, order of keys and bits."""
        assert_same(feature, expected)

    # Intact files

    @inherited(30)
    @given(st.data(), st.lists(st.integers(1, 300), max_size=3), st.integers(0, 40), st.booleans())
    def test_equals_the_reference(
        self, data: st.DataObject, cuts: list[int], spare: int, by_windows: bool
    ) -> None:
        """Into any cut of buffers, for the first time and by the plan that is remembered."""
        written = data.draw(st.lists(self.features(), min_size=1, max_size=3))
        with tempfile.TemporaryDirectory() as directory, _whole_files(not by_windows):
            reader = self.make_reader()
            paths = [f"{directory}/{number}" for number in range(len(written))]
            for path, feature in zip(paths, written, strict=True):
                self.write(feature, path)
                _age(path, 1)
            for path in paths * 2:
                self.assert_equal(_read(reader, path, cuts, spare), self.reference(path))

    @inherited(20)
    @given(st.data(), st.integers(0, 40) | st.just(16))
    def test_many_at_once(self, data: st.DataObject, spare: int) -> None:
        """Files of forms that are known and not, opened in one go, into memory side by side."""
        written = data.draw(st.lists(self.features(), min_size=1, max_size=3))
        with tempfile.TemporaryDirectory() as directory:
            at_once = AtOnce(self.make_reader())
            paths = [f"{directory}/{number}" for number in range(4 * len(written))]
            for number, path in enumerate(paths):
                self.write(written[number % len(written)], path)
            # A form is learned of the second file that has it.
            for _ in range(3):
                for path, feature in at_once.read(paths, spare):
                    self.assert_equal(feature, self.reference(path))

    @inherited(20)
    @given(st.data(), st.booleans(), st.booleans())
    def test_a_changed_file_is_not_read_by_its_old_plan(
        self, data: st.DataObject, old: bool, in_place: bool
    ) -> None:
        """Neither where its time has changed, nor where it changes faster than the clock."""
        written = data.draw(st.lists(self.features(), min_size=2, max_size=4))
        with tempfile.TemporaryDirectory() as directory:
            reader = self.make_reader()
            path, other = f"{directory}/x", f"{directory}/y"
            for number, feature in enumerate(written):
                self.write(feature, other)
                if in_place and number:
                    Path(path).write_bytes(Path(other).read_bytes())
                else:
                    os.replace(other, path)
                if old:
                    _age(path, number)
                for _ in range(2):
                    self.assert_equal(_read(reader, path), self.reference(path))

    def test_threads(self, tmp_path: Path) -> None:
        """Several threads use one reader at the same time."""
        paths = [str(tmp_path / str(number)) for number in range(4)]
        for number, path in enumerate(paths):
            self.write(self.small(), path)
            _age(path, number)
        expected = [self.reference(path) for path in paths]
        reader = self.make_reader()

        def work(thread: int) -> None:
            for step in range(20):
                at = (thread + step) % len(paths)
                self.assert_equal(_read(reader, paths[at]), expected[at])

        in_threads(work, 4)

    # Damaged files

    def test_truncated_anywhere(self, tmp_path: Path) -> None:
        """Each beginning of a file is refused, or is what the reference says."""
        path, data = self._small_file(tmp_path)
        self._require_agreement(path, data, (data[:end] for end in range(len(data))))

    def test_every_byte_flipped(self, tmp_path: Path) -> None:
        """Each flipped byte is refused, or is what the reference says."""
        path, data = self._small_file(tmp_path)
        flipped = (
            data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
            for mask in _MASKS
            for at in range(len(data))
        )
        self._require_agreement(path, data, flipped)

    @inherited(30)
    @given(st.data())
    def test_damaged_in_several_places(self, data: st.DataObject) -> None:
        """Bytes replaced, removed and inserted are refused, or are what the reference says."""
        with tempfile.TemporaryDirectory() as directory:
            path, intact = self._small_file(Path(directory))
            at = st.integers(0, len(intact))
            edit = st.tuples(at, st.integers(0, 4), st.binary(max_size=4))
            damaged = intact
            for start, removed, inserted in data.draw(st.lists(edit, min_size=1, max_size=3)):
                damaged = damaged[:start] + inserted + damaged[start + removed :]
            self._require_agreement(path, intact, [damaged])

    def test_a_file_that_shrinks_after_it_was_opened(self, tmp_path: Path) -> None:
        """Reading it raises an OSError, or gives the feature that was opened."""
        path, data = self._small_file(tmp_path)
        # Of a copy: what the library returns may be mapped from the file.
        copy = tmp_path / "copy"
        copy.write_bytes(data)
        expected = self.reference(str(copy))
        for end in {0, len(data) // 2, len(data) - 1}:
            for whole in (True, False):
                Path(path).write_bytes(data)
                with _whole_files(whole):
                    opened = self.make_reader().open(path)
                os.truncate(path, end)
                try:
                    feature = read_feature(opened)
                except OSError:
                    continue
                finally:
                    opened.close()
                self.assert_equal(feature, expected)

    def _small_file(self, directory: Path) -> tuple[str, bytes]:
        path = str(directory / "small")
        self.write(self.small(), path)
        return path, Path(path).read_bytes()

    def _require_agreement(
        self, path: str, intact: bytes, damaged: Sequence[bytes] | Iterator[bytes]
    ) -> None:
        """Require that each of the `damaged` contents is refused, or is what the reference says.

        A new reader and one that knows the intact file read each content. One of them reads the
        file whole and the other by windows; they swap for the next content. A third one knows the
        form of the intact file.
        """
        warm = self.make_reader()
        at_once = AtOnce(self.make_reader())
        for feature in (*self.alike(), self.small()):
            self.write(feature, path)
            list(at_once.read([path]))
        Path(path).write_bytes(intact)
        for _ in range(3):  # a reader may remember what it sees for the second time
            _read(warm, path)
            list(at_once.read([path]))
        for number, content in enumerate(damaged):
            Path(path).write_bytes(content)
            unknown = object()
            expected: Any = unknown
            whole = number % 2 == 0
            readers: list[tuple[PlanReader | AtOnce, bool]]
            readers = [(warm, whole), (self.make_reader(), not whole), (at_once, True)]
            for reader, as_whole in readers:
                with _whole_files(as_whole):
                    try:
                        if isinstance(reader, AtOnce):
                            [(_, feature)] = reader.read([path])
                        else:
                            feature = _read(reader, path)
                    except _REFUSALS:
                        continue
                    except Exception as error:
                        raise AssertionError(f"{error!r} for {content!r:.2000}") from error
                if expected is unknown:
                    expected = self._agreed(path, content)
                self.assert_equal(feature, expected)

    def _agreed(self, path: str, content: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self.reference(path)
            except Exception as error:
                raise AssertionError(
                    f"the reader reads what the reference refuses: {content!r:.2000}"
                ) from error

    # Descriptors

    def test_descriptors_are_closed(self, tmp_path: Path) -> None:
        """By `close`, and where opening raises."""
        path, data = self._small_file(tmp_path)
        cut, empty = str(tmp_path / "cut"), str(tmp_path / "empty")
        Path(cut).write_bytes(data[: len(data) // 2])
        Path(empty).write_bytes(b"")
        missing = str(tmp_path / "missing")
        _read(self.make_reader(), path)
        before = open_descriptors()
        for whole in (True, False):
            reader = self.make_reader()
            with _whole_files(whole):
                for _ in range(3):
                    _read(reader, path)
                    reader.open(path).close()
                    for bad in (cut, empty, missing, str(tmp_path)):
                        error = _refusal(reader, bad)
                        if bad in (missing, str(tmp_path)):
                            assert isinstance(error, OSError), f"opening {bad!r}: {error!r}"
                            assert bad in str(error), f"{error!r} does not name {bad!r}"
        assert open_descriptors() == before, "descriptors are left open"


class AtOnce:
    """Reads files as a store does: in one go those that can be, the others one by one."""

    def __init__(self, reader: PlanReader) -> None:
        self._reader = reader
        self._batch_reader = BatchReader(reader)

    def read(self, paths: list[str], spare: int = 0) -> Iterator[tuple[str, Any]]:
        """Each path, and the feature in it. Raises what the reader raises."""
        while paths:
            features = self._batch_reader.open(paths, Progress())
            opened = [f or self._reader.open(p) for p, f in zip(paths, features, strict=False)]
            if not features:
                opened = [self._reader.open(path) for path in paths]
            yield from zip(paths, _read_many(opened, spare), strict=False)
            paths = paths[len(opened) :]


def _read_many(opened: Sequence[OpenFeature], spare: int) -> Iterator[Any]:
    """The features, of which those that can be are read in one go."""
    sizes = [feature.layout.span + spare for feature in opened]
    ends = list(itertools.accumulate(sizes))
    begins = [end - size for end, size in zip(ends, sizes, strict=True)]
    memory = memoryview(bytearray(b"\xee" * (sum(sizes) + 1)))
    left = read_many(opened, memory, np.array(begins, np.int64))
    for at, feature in enumerate(opened):
        here = memory[begins[at] : ends[at]]
        if at in left:
            feature.read_into([here])
        feature.close()
        assert here[feature.layout.span :] == b"\xee" * spare, "bytes behind the feature changed"
        yield build_feature(feature, here)


def _read(reader: PlanReader, path: str, cuts: Sequence[int] = (), spare: int = 0) -> Any:
    opened = reader.open(path)
    try:
        return read_feature(opened, cuts, spare)
    finally:
        opened.close()


def _refusal(reader: PlanReader, path: str) -> Exception | None:
    return error_of(lambda: reader.open(path).close(), *_REFUSALS)


def _age(path: str, number: int) -> None:
    """Let a file look old: plans of files that were just written are not remembered."""
    os.utime(path, ns=(0, 1_000_000_000 + number))


@contextmanager
def _whole_files(whole: bool) -> Iterator[None]:
    """Have small files read whole, or by windows as only large ones are otherwise."""
    limit = planned.MAX_WHOLE_BYTES if whole else 0
    with mock.patch.object(planned, "MAX_WHOLE_BYTES", limit):
        yield
