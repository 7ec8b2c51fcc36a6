"""The contract that every source keeps, as tests; inherit it to test a source of your own."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes.errors import FeatureLoadError
from gpucache_pipes.files import Source
from gpucache_pipes.store import GPUFeatureStore
from gpucache_pipes.testing.contracts import (
    error_of,
    in_threads,
    inherited,
    open_descriptors,
    read_feature,
)
from gpucache_pipes.testing.features import assert_same, features

_FEW = [{"x": torch.arange(8, device="cpu") + number, "n": number} for number in range(5)]

_ODD = [
    "/",
    "//",
    "/.",
    "/..",
    "/a/",
    "/a/.",
    "/a/..",
    "a\0b",
    "/a\0b",
    "/\udc80",
    "/" + "a" * 5000,
]

_ODD_PATHS = st.one_of(st.sampled_from(_ODD), st.text(min_size=1, max_size=20))


class SourceContract:
    """Tests of what the store requires of a `files.Source`. A subclass defines `make_source`.

        class TestMyFiles(SourceContract):
            def make_source(self, directory, features):
                paths = [f"{directory}/{number}.mine" for number in range(len(features))]
                for path, feature in zip(paths, features):
                    write(path, feature)
                return MyFiles(), paths

    The other hooks have defaults: `features`, `spellings`, `missing`, `change` and `age`.
    """

    def make_source(self, directory: Path, features: Sequence[Any]) -> tuple[Source, list[str]]:
        """Return a new source over `features`, and the absolute path of each of them in order.

        Args:
            directory: an empty directory, which exists as long as the source is used. A source
                that keeps its files elsewhere need not use it.
            features: what the files hold. The test does not change them.
        """
        raise NotImplementedError

    def features(self) -> st.SearchStrategy[Any]:
        """Features that the source can hold: by default of any kind that `torch.load` accepts."""
        return features(max_leaves=4)

    def spellings(self, path: str) -> list[str]:
        """Other spellings of a path, which name the same file. They may be relative."""
        return []

    def missing(self, paths: Sequence[str]) -> str:
        """A path that looks like these and names no file."""
        return f"{paths[0]}.missing"

    def change(self, source: Source, path: str, feature: Any) -> None:
        """Replace what a file holds. Without an override, the tests of changes are skipped."""
        raise SkipTest("the subclass does not define `change`")

    def age(self, source: Source, path: str) -> None:
        """Make a file look old enough that its version is known.

        Only for sources that know no version of a file for some time after a change. Two calls for
        one path must not make a changed file look like the one before.
        """

    # Identity

    def test_all_spellings_have_one_key(self, tmp_path: Path) -> None:
        """Keys of different files differ, and a key is its own key."""
        source, paths = self.make_source(tmp_path, _FEW)
        cwd = os.getcwd()
        keys = [source.key(path) for path in paths]
        assert len(set(keys)) == len(paths), f"two files have one key: {keys}"
        for path, key in zip(paths, keys, strict=True):
            assert source.absolute(path, "/elsewhere") == path, f"{path!r} is absolute already"
            assert source.key(key) == key, f"{key!r} is not its own key"
            for spelling in [path, *self.spellings(path)]:
                absolute = source.absolute(spelling, cwd)
                assert source.absolute(absolute, "/elsewhere") == absolute, f"{absolute!r} changes"
                found = source.key(absolute)
                assert found == key, f"{spelling!r} and {path!r} have keys {found!r} and {key!r}"

    def test_are_keys_agrees_with_key(self, tmp_path: Path) -> None:
        """`are_keys` says True only for paths that are their own keys."""
        source, paths = self.make_source(tmp_path, _FEW)
        for path in paths:
            head = path.rpartition("/")[0]
            # Repeatedly: a source may look closer once more files of a directory are asked about.
            for files in (1, 100, 100_000):
                for names in ([path], [path, f"{head}/."], [f"{head}/..", path]):
                    text = "\0".join(["", *names, ""])
                    if source.are_keys(head, text, files):
                        assert [source.key(name) for name in names] == names

    @inherited(60)
    @given(_ODD_PATHS, _ODD_PATHS)
    def test_odd_paths(self, path: str, other: str) -> None:
        """Only `open`, `version` and `size` raise for them, and only errors of the file."""
        with tempfile.TemporaryDirectory() as directory:
            source, paths = self.make_source(Path(directory), _FEW[:1])
            absolute = source.absolute(path, directory)
            key = source.key(absolute)
            assert isinstance(absolute, str) and isinstance(key, str)
            assert isinstance(source.is_link(absolute), bool)
            assert isinstance(source.are_keys(directory, f"\0{path}\0{other}\0", 2), bool)
            version = _require_version(source, key)
            assert isinstance(source.is_current(absolute, version), bool)
            _require_sizes(source.sample_sizes([absolute, paths[0], other]), 3)
            _require_size(source, absolute)

    # Contents

    @inherited(30)
    @given(st.data(), st.lists(st.integers(1, 300), max_size=3), st.integers(0, 40))
    def test_open_gives_the_feature(self, data: st.DataObject, cuts: list[int], spare: int) -> None:
        """Into any cut of buffers, and each time that it is opened."""
        written = data.draw(st.lists(self.features(), min_size=1, max_size=3))
        with tempfile.TemporaryDirectory() as directory:
            source, paths = self.make_source(Path(directory), written)
            for path, feature in [*zip(paths, written, strict=True)] * 2:
                assert_same(_read(source, path, cuts, spare), feature)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        """Opening it raises an OSError that names it, and leaves nothing open."""
        source, paths = self.make_source(tmp_path, _FEW)
        path = self.missing(paths)
        key = source.key(path)
        before = open_descriptors()
        for _ in range(3):
            error = error_of(lambda: source.open(key, path).close(), OSError)
            assert error is not None, f"{path!r} is missing, and opening it raises nothing"
            text = str(error)
            assert path in text or key in text, f"{text!r} does not name {path!r}"
        assert isinstance(source.is_current(path, _require_version(source, key)), bool)
        assert isinstance(source.is_current(path, b"another"), bool)
        _require_sizes(source.sample_sizes([path]), 1)
        _require_size(source, path)
        assert open_descriptors() == before, "descriptors are left open"

    def test_close_releases_what_open_took(self, tmp_path: Path) -> None:
        """Also where nothing was read."""
        source, paths = self.make_source(tmp_path, _FEW)
        _read(source, paths[0])
        before = open_descriptors()
        for path in paths:
            source.open(source.key(path), path).close()
            _read(source, path)
        assert open_descriptors() == before, "descriptors are left open"

    def test_sizes(self, tmp_path: Path) -> None:
        """Sizes are numbers of bytes, and a sample stays small."""
        source, paths = self.make_source(tmp_path, _FEW)
        for path in paths:
            _require_size(source, path)
        assert isinstance(source.sample_sizes([]), list)
        for some in (paths[:1], paths, paths * 1000):
            _require_sizes(source.sample_sizes(some), len(some))

    def test_threads(self, tmp_path: Path) -> None:
        """Several threads use it at the same time."""
        source, paths = self.make_source(tmp_path, _FEW)
        keys = [source.key(path) for path in paths]

        def work(thread: int) -> None:
            for step in range(20):
                at = (thread * 7 + step) % len(paths)
                assert source.key(paths[at]) == keys[at]
                source.version(keys[at])
                source.sample_sizes(paths)
                assert_same(_read(source, paths[at]), _FEW[at])

        in_threads(work, 4)

    # Changes

    def test_a_version_changes_with_the_file(self, tmp_path: Path) -> None:
        """The version of an unchanged file is current, and that of a changed one is not."""
        source, [path] = self.make_source(tmp_path, _FEW[:1])
        self.age(source, path)
        key = source.key(path)
        before = source.version(key)
        if before is None:
            raise SkipTest("the source has no versions")
        assert source.version(key) == before, "the version of an unchanged file changes"
        assert source.is_current(path, before), "an unchanged file is not current"
        self.change(source, path, _FEW[1])
        assert not source.is_current(path, before), "a changed file is still current"
        self.age(source, path)
        assert not source.is_current(path, before), "a changed file is still current"
        assert source.version(key) != before, "a changed file keeps its version"
        assert_same(_read(source, path), _FEW[1])

    def test_changes_at_once_after_each_other(self, tmp_path: Path) -> None:
        """A file that changes faster than a clock ticks has another version, or none."""
        source, [path] = self.make_source(tmp_path, _FEW[:1])
        key = source.key(path)
        for number in range(20):
            feature = _FEW[(number + 1) % len(_FEW)]  # a version may be made of the bytes
            before = source.version(key)
            self.change(source, path, feature)
            assert before is None or not source.is_current(path, before), "a change goes unseen"
            assert_same(_read(source, path), feature)

    def test_a_store_reads_changed_files_again(self, tmp_path: Path) -> None:
        """With revalidate=True, a hit of a changed file is a miss."""
        source, [path] = self.make_source(tmp_path, _FEW[:1])
        self.age(source, path)
        with GPUFeatureStore("cpu", source=source, revalidate=True) as store:
            for feature in _FEW[1:]:
                store.get(path)
                self.change(source, path, feature)
                self.age(source, path)
                assert_same(store.get(path), feature)
            store.check()

    # With a store

    def test_a_store_serves_all_features(self, tmp_path: Path) -> None:
        """Also those that were evicted, which it reads again."""
        source, paths = self.make_source(tmp_path, _FEW)
        with GPUFeatureStore(
            "cpu", source=source, max_cache_items=2, policy="lru", reader_threads=2
        ) as store:
            for step in range(30):
                wanted = [(step * 3 + n * n) % len(paths) for n in range(3)]
                batch = store.get_batch([paths[at] for at in wanted])
                for feature, at in zip(batch, wanted, strict=True):
                    assert_same(feature, _FEW[at])
            stats = store.stats()
            assert stats.evictions and stats.files_read > len(paths), stats
            store.check()

    def test_a_store_reads_a_file_once_for_all_spellings(self, tmp_path: Path) -> None:
        """Spellings of one path share one entry."""
        source, paths = self.make_source(tmp_path, _FEW[:2])
        with GPUFeatureStore("cpu", source=source) as store:
            for path, feature in zip(paths, _FEW, strict=False):
                for spelling in [path, *self.spellings(path)]:
                    assert_same(store.get(spelling), feature)
            assert store.stats().files_read == len(paths) == len(store)

    def test_an_error_of_one_file_reaches_that_file_alone(self, tmp_path: Path) -> None:
        """The other files of the batch, and of the store, are served."""
        source, paths = self.make_source(tmp_path, _FEW[:2])
        missing = self.missing(paths)
        with GPUFeatureStore("cpu", source=source) as store:
            for _ in range(2):
                batch = store.request([paths[0], missing, paths[1]])
                errors = batch.wait()
                assert list(errors) == [1], f"the failed positions are {list(errors)}, not [1]"
                assert isinstance(errors[1], (FileNotFoundError, FeatureLoadError)), errors[1]
                assert missing in str(errors[1]), f"{errors[1]} does not name {missing!r}"
                batch.replace(1)
                for feature, expected in zip(batch.result(), _FEW, strict=False):
                    assert_same(feature, expected)
                assert missing not in store and paths[0] in store
            store.check()


def _read(source: Source, path: str, cuts: Sequence[int] = (), spare: int = 0) -> Any:
    opened = source.open(source.key(path), path)
    try:
        return read_feature(opened, cuts, spare)
    finally:
        opened.close()


def _require_sizes(sizes: Sequence[int], files: int) -> None:
    assert isinstance(sizes, list) and all(type(n) is int and n >= 0 for n in sizes), sizes
    # A source may look at the neighbours of a few files, and at about 64 of many.
    assert len(sizes) <= files + 256 and len(sizes) <= 512, f"a sample of {len(sizes)} files"


def _require_size(source: Source, path: str) -> None:
    size = _unless(lambda: source.size(path), OSError, ValueError)
    assert size is None or (type(size) is int and size >= 0), f"size={size!r}"


def _require_version(source: Source, key: str) -> bytes | None:
    version: bytes | None = _unless(lambda: source.version(key), OSError, ValueError)
    assert version is None or isinstance(version, bytes), f"version={version!r}"
    return version


def _unless(call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """The result of `call`, or None if it raises one of `errors`."""
    try:
        return call()
    except errors:
        return None
