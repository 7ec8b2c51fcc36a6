"""What needs no server: URLs, listings by fsspec, retries, ranges, threads, errors."""

import builtins
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import fsspec.implementations.memory
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import FeatureLoadError, GPUFeatureStore, PathLister
from gpucache_pipes.files import AnyFiles, RemoteFiles, Source
from gpucache_pipes.files.plans import Extent
from gpucache_pipes.files.remote import listing
from gpucache_pipes.files.remote.clients import NoRangesError, Retries
from gpucache_pipes.files.remote.errors import translate
from gpucache_pipes.files.remote.pieces import PIECE_BYTES, pieces_of
from gpucache_pipes.files.remote.urls import locate, redacted
from gpucache_pipes.files.remote.versions import ObjectVersion
from gpucache_pipes.files.remote.workers import Turns, Workers
from gpucache_pipes.testing import SourceContract
from gpucache_pipes.testing.features import assert_same


@pytest.fixture
def memory() -> Any:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def save(url: str, feature: Any) -> str:
    with fsspec.open(url, "wb") as file:
        torch.save(feature, file)
    return url


class TestFsspec(SourceContract):
    """RemoteFiles keeps the contract of sources over what fsspec knows."""

    @pytest.fixture(autouse=True)
    def _memory(self, memory: Any) -> None:
        pass

    def make_source(self, directory: Path, features: Sequence[Any]) -> tuple[Source, list[str]]:
        urls = [f"memory://bucket/{number}.pt" for number in range(len(features))]
        for url, feature in zip(urls, features, strict=True):
            save(url, feature)
        return RemoteFiles(), urls


class TestAnyFiles(TestFsspec):
    """As do local files and objects as one source."""

    def make_source(self, directory: Path, features: Sequence[Any]) -> tuple[Source, list[str]]:
        paths = []
        for number, feature in enumerate(features):
            at = f"memory://bucket/{number}.pt" if number % 2 else str(directory / f"{number}.pt")
            paths.append(save(at, feature))
        return AnyFiles(), paths


def test_a_pipeline_over_fsspec(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_MOST_BELOW", 0)
    for n in range(30):
        save(f"memory://bucket/f/{n:02}.pt", {"n": n})
    save("memory://bucket/f/sub/x.pt", {"n": 99})
    lister = PathLister("memory://bucket/f", batch_size=7)
    assert len(lister.paths) == 30 and lister.paths[0] == "memory://bucket/f/00.pt"
    assert len(PathLister("memory://bucket/f", recursive=True).paths) == 31
    with GPUFeatureStore("cpu") as store:
        assert [f["n"] for batch in lister for f in store.get_batch(batch)] == list(range(30))
        with pytest.raises(FileNotFoundError):
            store.get("memory://bucket/f/none.pt")


# URLs


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/a.pt", "s3://***@bucket/a.pt"),
        ("https://host/a.pt?sig=secret&x=1", "https://host/a.pt?***"),
        ("s3://AKIA:wJalr/secret/K@bucket/a.pt", "s3://***@bucket/a.pt"),
        ("HTTPS://host/a?sig=secret", "HTTPS://host/a?***"),
        ("az://container/a.pt?sv=1&sig=secret", "az://container/a.pt?***"),
        ("abfss://container:secret@account.dfs.core.windows.net/a", "abfss://***@account.dfs"),
    ],
)
def test_urls_with_credentials_are_refused(url: str, shown: str) -> None:
    assert redacted(f"cannot read {url!r}").startswith(f"cannot read '{shown}")
    for attempt in (lambda: locate(url), lambda: PathLister(url)):
        with pytest.raises(ValueError, match="holds credentials, a signature or a query") as raised:
            attempt()
        assert "secret" not in str(raised.value)


def test_a_container_before_its_account_is_no_credential() -> None:
    url = "abfss://container@account.dfs.core.windows.net/a/b.pt"
    assert redacted(url) == url
    assert locate(url).root == "abfss://container@account.dfs.core.windows.net"


def test_a_url_that_pathlib_has_changed() -> None:
    with pytest.raises(FileNotFoundError, match="one slash of the two of a URL"):
        PathLister(Path("s3://bucket/features"))


def test_an_unknown_scheme() -> None:
    with pytest.raises(ValueError, match="neither obstore nor fsspec knows 'nothing'"):
        PathLister("nothing://bucket/a")


def test_storage_options_that_are_none() -> None:
    for make in (GPUFeatureStore, lambda **options: PathLister(["a.pt"], **options)):
        with pytest.raises(ValueError, match="storage_options must be a dict"):
            make(storage_options=["secret"])
    with pytest.raises(ValueError, match="a source reads files itself"):
        GPUFeatureStore("cpu", source=RemoteFiles(), storage_options={})


def test_without_obstore_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "obstore":
            raise ImportError(name)
        return ordinary(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'gpucache-pipes\[remote\]'"):
        PathLister("s3://bucket/a")
    store = GPUFeatureStore("cpu")
    with store, pytest.raises(FeatureLoadError, match=r"gpucache-pipes\[remote\]"):
        store.get("s3://bucket/a.pt")


# Listings


@given(st.data())
def test_globs_mean_what_they_mean_in_the_file_system(data: st.DataObject) -> None:
    import glob

    part = st.sampled_from(["a", "ab", "b", ".a", "a.pt", "b.pt", "ab.pt"])
    pattern_part = st.sampled_from(["a", "*", "a*", "**", "?", "*.pt", "[ab]", ".*", "[!a]*"])
    names = data.draw(st.lists(st.lists(part, min_size=1, max_size=4).map("/".join), max_size=8))
    pattern = "/".join(data.draw(st.lists(pattern_part, min_size=1, max_size=4)))
    matches = listing._globbed(pattern)
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        files = []
        for name in dict.fromkeys(names):
            try:
                path = Path(root, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(exist_ok=False)
                files.append(name)
            except OSError:  # a file and a directory of one name
                continue
        # For "a/**" and a file "a", glob also gives "a/", which is no file.
        found = glob.glob(f"{root}/{pattern}", recursive=True)
        found = [os.path.relpath(path, root) for path in found if not path.endswith("/")]
        expected = sorted({name for name in found if Path(root, name).is_file()})
        assert sorted(filter(matches, files)) == expected


# Requests


class Clock:
    """A clock that sleeping moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_retries_have_pauses_that_grow_and_differ_and_a_deadline() -> None:
    clock = Clock()
    retries = Retries(30, 1000, clock.sleep, lambda: clock.now)

    def fail() -> None:
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError, match="s3://b/a"):
        retries.call(fail, "s3://b", "a")
    assert sum(clock.slept) <= 30 and len(clock.slept) >= 5
    assert all(0.5 * min(5, 0.1 * 2**n) <= s for n, s in enumerate(clock.slept))
    assert len(set(clock.slept)) == len(clock.slept)
    few = Retries(1e9, 3, clock.sleep, lambda: clock.now)
    del clock.slept[:]
    with pytest.raises(ConnectionError):
        few.call(fail, "s3://b", "a")
    assert len(clock.slept) == 2


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x"), ValueError("x")])
def test_what_is_final_is_not_tried_again(error: Exception) -> None:
    clock = Clock()

    def fail() -> None:
        raise error

    with pytest.raises((OSError, ValueError)) as raised:
        Retries(30, 9, clock.sleep, lambda: clock.now).call(fail, "s3://b", "a")
    assert not clock.slept and raised.value.__context__ is None and raised.value.__cause__ is None


def test_texts_of_clients_are_not_passed_on() -> None:
    text = (
        "Generic S3 error: Error performing GET http://10.0.0.7/b/a in 1ms, after 3 retries, "
        "max_retries: 3 - Server returned non-2xx status code: 503 Slow Down: <Error><Code>SlowDown"
        "</Code><AWSAccessKeyId>AKIA</AWSAccessKeyId></Error>"
    )
    failure = translate(RuntimeError(text), "s3://b/a")
    assert str(failure.error) == (
        "[Errno 5] the server answers 503 SlowDown after 3 retries: 's3://b/a'"
    )
    assert not failure.again  # obstore has tried three times
    assert translate(
        RuntimeError("Received non-partial response when range requested"), ""
    ).no_ranges


def test_a_server_without_ranges_is_no_failure() -> None:
    def fail() -> None:
        raise RuntimeError("Received non-partial response when range requested")

    with pytest.raises(NoRangesError):
        Retries().call(fail, "s3://b", "a")


def test_versions() -> None:
    listed, got = ObjectVersion.of(9, '"abc"', 5.0), ObjectVersion.of(9, 'W/"abc"', 5.9)
    assert listed == got and listed.is_same(got) and listed.stored == (9, listed.etag)
    assert not listed.is_same(ObjectVersion.of(9, '"abd"', 5.0))
    assert not listed.is_same(ObjectVersion.of(8, '"abc"', 5.0))
    unnamed = ObjectVersion.of(9, None, 5.0)
    assert unnamed.is_same(listed) and unnamed.stored == (9, 5) and unnamed.packed is not None
    assert ObjectVersion.of(9, None, None).stored is None
    assert ObjectVersion.of(9, None, 9e9).stored is None  # it may change again and keep its time


# Ranges


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3 * PIECE_BYTES), st.integers(0, 100), st.integers(1, 2 * PIECE_BYTES)
        ),
        max_size=6,
    )
)
def test_pieces_cover_what_is_asked_for(ranges: list[tuple[int, int, int]]) -> None:
    extents = [Extent(start, offset, nbytes) for start, offset, nbytes in ranges]
    pieces = pieces_of(extents)
    moved = []
    for piece in pieces:
        assert 0 < piece.end - piece.start <= PIECE_BYTES
        for start, offset, nbytes in piece.moves:
            assert nbytes > 0 and piece.start + start + nbytes <= piece.end
            moved.append((piece.start + start, offset, nbytes))
    # The same bytes, cut at the ends of pieces.
    joined: dict[tuple[int, int], int] = {}
    for start, offset, nbytes in sorted(moved):
        for (begin, at), length in list(joined.items()):
            if begin + length == start and at + length == offset:
                joined[begin, at] = length + nbytes
                break
        else:
            joined[start, offset] = nbytes
    total = sum(extent.nbytes for extent in extents)
    assert sum(nbytes for _, _, nbytes in moved) == total


# Threads


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 40))
def test_turns_hand_out_each_position_once(count: int, threads: int, room: int) -> None:
    begun: list[int] = []
    turns = Turns(range(count), room, lambda at, moment: not begun.append(at), lambda: 0)  # type: ignore[func-returns-value]
    taken: list[int] = []
    workers = Workers(threads, "gpucache-test")

    def run() -> None:
        while (at := turns.take()) >= 0:
            taken.append(at)
            turns.done(at, 1)

    for _ in range(threads):
        workers.submit(run)
    turns.wait()
    workers.end()
    assert sorted(taken) == list(range(len(taken)))
    assert min(count, room + 1) <= len(taken) <= min(count, room + threads)
    assert begun == sorted(begun)


def test_workers_without_threads_do_the_work_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers = Workers(2, "gpucache-test")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert list(workers.each(str, range(20), 4)) == list(map(str, range(20)))
    assert list(workers.each(str, range(20), 4)) == list(map(str, range(20)))


def test_workers_end_and_begin_again() -> None:
    workers = Workers(2, "gpucache-test")
    assert list(workers.each(lambda n: n * n, range(50), 4)) == [n * n for n in range(50)]
    workers.end()
    assert list(workers.each(lambda n: n + 1, range(5), 4)) == [1, 2, 3, 4, 5]
    with pytest.raises(ZeroDivisionError):
        list(workers.each(lambda n: 1 // (n - 3), range(50), 4))
    del workers  # its threads end with it: the fixture that looks for them waits for no more


def test_workers_work_after_a_fork() -> None:
    workers = Workers(2, "gpucache-test")
    list(workers.each(str, range(5), 2))

    def child() -> None:
        sys.exit(list(workers.each(str, range(5), 2)) != list("01234"))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_the_interpreter_ends_while_a_request_hangs(tmp_path: Path) -> None:
    program = """
import threading
from gpucache_pipes.files.remote.workers import Workers
workers = Workers(2, "gpucache-test")
begun = threading.Event()
workers.submit(lambda: (begun.set(), threading.Event().wait()))
begun.wait()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_interrupt_ends_waiting_for_a_request() -> None:
    import signal

    from gpucache_pipes.files.remote.clients import interruptible

    release = threading.Event()

    def request() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        release.wait()

    with pytest.raises(KeyboardInterrupt):
        interruptible(request)
    release.set()


def test_a_feature_only_torch_load_reads(memory: Any) -> None:
    with fsspec.open("memory://bucket/old.pt", "wb") as file:
        torch.save({"x": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    feature, reason = RemoteFiles().probe("memory://bucket/old.pt")
    assert reason is not None
    feature.close()
    with GPUFeatureStore("cpu") as store:
        assert_same(store.get("memory://bucket/old.pt"), {"x": torch.ones(3)})


class HostFiles(fsspec.implementations.memory.MemoryFileSystem):  # type: ignore[misc]
    """A file system whose URLs name a host."""

    protocol = "hosted"
    hosts: ClassVar[list[str]] = []

    def __init__(self, host: str = "default", **options: Any) -> None:
        super().__init__(**options)
        self.hosts.append(host)

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        return {"host": path.removeprefix("hosted://").partition("/")[0]}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hosted://").strip("/")


def test_fsspec_gets_what_a_url_says_of_its_host(memory: Any) -> None:
    fsspec.register_implementation("hosted", HostFiles, clobber=True)
    save("memory://cluster/a.pt", {"n": 1})
    with GPUFeatureStore("cpu") as store:
        assert store.get("hosted://cluster/a.pt") == {"n": 1}
    assert HostFiles.hosts[-1] == "cluster"


def test_an_error_of_a_client_that_is_not_of_the_network_is_not_tried_again() -> None:
    for error in (NotImplementedError("x"), KeyError("x"), IsADirectoryError("x")):
        failure = translate(error, "x://b/a")
        assert not failure.again and type(error).__name__ in str(failure.error)
    assert translate(ConnectionResetError("x"), "x://b/a").again


def test_options_of_listings_show_no_credentials() -> None:
    from gpucache_pipes.files import RemoteOptions

    assert "secret" not in repr(RemoteOptions({"secret_access_key": "secret"}, "list"))
    assert redacted("http://[::1]:8000/a.pt") == "http://[::1]:8000/a.pt"
    assert redacted("http://u:p@[::1]:8000/a.pt") == "http://***@[::1]:8000/a.pt"
