"""Servers that are busy, break off, lie, deny and die."""

import logging
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote.servers import Fault, Proxy, Rclone, Request, options

from gpucache_pipes import (
    FeatureLoadError,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    NodeLoader,
    PathLister,
)
from gpucache_pipes.files import AnyFiles, RemoteFiles
from gpucache_pipes.testing.features import assert_same

Put = Callable[..., str]
Options = dict[str, Any]
SMALL = {"x": torch.arange(300.0), "n": 7}
LARGE = {"x": torch.arange(900_000), "y": torch.ones(400_000)}


def first(times: int, fault: Fault) -> Callable[[Request], Fault]:
    """A fault in the first answers to each request, but for listings."""
    seen: Counter[Request] = Counter()

    def choose(request: Request) -> Fault:
        seen[request] += 1
        return fault if seen[request] <= times and not request.is_list else None

    return choose


@pytest.mark.parametrize("feature", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("fault", [429, 500, 503, "close", "reset", "short"])
def test_what_passes_is_tried_again(
    fault: Fault, feature: Any, put: Put, remote: Options, proxy: Proxy
) -> None:
    url = put("a.pt", feature)
    proxy.fault = first(2, fault)
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        assert_same(store.get(url), feature)
        assert_same(store.get_batch([url])[0], feature)
    assert len(proxy.take()) > 2


@pytest.mark.parametrize("fault", [429, 500, 503, "close", "reset", "short"])
def test_what_does_not_pass_is_an_error_in_the_end(
    fault: Fault, put: Put, remote: Options, proxy: Proxy
) -> None:
    url, other = put("a.pt", SMALL), put("b.pt", SMALL)
    proxy.fault = lambda request: fault if request.name.endswith("a.pt") else None
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        with pytest.raises(FeatureLoadError) as raised:
            store.get_batch([url, other])
        assert_same(store.get(other), SMALL)
        proxy.fault = lambda request: None
        assert_same(store.get(url), SMALL)
    text = str(raised.value)
    assert url in text and "secret" not in text
    assert (str(fault) in text) == isinstance(fault, int), text


@pytest.mark.parametrize("name", ["missing.pt", "denied.pt"])
def test_what_is_final_is_asked_for_once(
    name: str, put: Put, remote: Options, proxy: Proxy
) -> None:
    good = put("good.pt", SMALL)
    url = good.replace("good.pt", name)
    proxy.fault = lambda request: 403 if "denied" in request.name else None
    expected = FileNotFoundError if name == "missing.pt" else FeatureLoadError
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        with pytest.raises(expected, match=name) as raised:
            store.get_batch([good, url])
        assert sum(request.name.endswith(name) for request in proxy.take()) == 1
        assert_same(store.get(good), SMALL)
        assert not proxy.take()  # it was read in spite of its neighbour
    if expected is FeatureLoadError:
        assert isinstance(raised.value.__cause__, PermissionError)
        assert "access is denied (403" in str(raised.value)


def test_wrong_credentials_are_named_and_not_shown(
    put: Put, remote: Options, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = put("a.pt", SMALL)
    wrong = {**remote, "secret_access_key": "another-secret-that-is-wrong"}
    shown = []
    with GPUFeatureStore("cpu", storage_options=wrong) as store:
        with pytest.raises(FeatureLoadError, match="SignatureDoesNotMatch") as raised:
            store.get(url)
        shown += [repr(store), repr(store.stats()), store._repr_html_()]
    error: BaseException | None = raised.value
    while error is not None:  # what a traceback shows
        shown += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    with pytest.raises(PermissionError) as denied:
        PathLister(url.rpartition("/")[0], storage_options=wrong)
    shown += [str(denied.value), repr(denied.value.__cause__), repr(denied.value.__context__)]
    lister = PathLister(url.rpartition("/")[0], batch_size=1, storage_options=remote)
    lister.reset()
    shown += [repr(lister), repr(lister.state_dict()), repr(pickle.dumps(lister)), caplog.text]
    for text in shown:
        assert "secret-that" not in text and "AKIDEXAMPLE" not in text, text


def test_a_byte_that_was_changed_on_its_way(put: Put, remote: Options, proxy: Proxy) -> None:
    urls = [put(f"{n}.pt", {"x": torch.full((50,), float(n))}) for n in range(4)]
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        store.get(urls[0])  # its etag is its MD5, so those of the others are, too
        proxy.fault = first(1, "flip")
        assert store.get(urls[1])["x"].tolist() == [1.0] * 50  # asked for again
        proxy.fault = lambda request: "flip" if request.name.endswith("2.pt") else None
        with pytest.raises(FeatureLoadError, match=r"2\.pt' do not have the MD5 that is their"):
            store.get_batch(urls)
        assert store.get(urls[3])["x"].tolist() == [3.0] * 50


def test_etags_that_are_no_md5(put: Put, remote: Options, proxy: Proxy) -> None:
    """As of objects that are encrypted by a key of their own: the same bytes come twice."""
    urls = [put(f"{n}.pt", {"x": torch.full((50,), float(n))}) for n in range(3)]
    files = RemoteFiles(remote)
    proxy.etag = "0123456789abcdef0123456789abcdef"
    with GPUFeatureStore("cpu", source=files) as store:
        for n, url in enumerate(urls):
            assert store.get(url)["x"].tolist() == [float(n)] * 50
    assert len(proxy.take()) == 6  # each twice, until it is certain
    with GPUFeatureStore("cpu", source=RemoteFiles(remote, verify=False)) as store:
        store.get_batch(urls)
    assert len(proxy.take()) == 3


def test_an_object_that_changes_between_two_ranges(put: Put, remote: Options, proxy: Proxy) -> None:
    """What is read is one of the versions, or an error; never a part of each."""
    zeros, ones = ({"x": torch.full((6_000_000,), float(n))} for n in range(2))
    url = put("a.pt", zeros)
    seen = 0

    def change(request: Request) -> Fault:
        nonlocal seen
        seen += 1
        if seen == 4:
            put("a.pt", ones)
        return None

    with GPUFeatureStore("cpu", storage_options=remote) as store:
        proxy.fault = change
        error = None
        try:
            assert store.get(url)["x"].unique().tolist() in ([0.0], [1.0])
        except FeatureLoadError as raised:
            error = str(raised)
        assert error is None or "the object changed while it was read" in error
        assert store.get(url)["x"].unique().tolist() in ([0.0], [1.0])
        store.clear()
        assert store.get(url)["x"].unique().tolist() == [1.0]


@pytest.mark.parametrize("before", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("after", [{"x": torch.ones(3)}, {"x": torch.ones(500_000)}, LARGE, None])
def test_an_object_that_changes_between_listing_and_reading(
    before: Any, after: Any, put: Put, weed: Any, remote: Options, proxy: Proxy
) -> None:
    url = put("a.pt", before)
    lister = PathLister(url.rpartition("/")[0], batch_size=1, storage_options=remote)
    if after is None:
        import obstore
        from obstore.store import S3Store

        obstore.delete(S3Store("tests", **options(weed.port)), url.removeprefix("s3://tests/"))
    else:
        put("a.pt", after)
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        [batch] = list(lister)
        if after is None:
            with pytest.raises(FileNotFoundError, match=r"a\.pt"):
                store.get_batch(batch)
        else:
            assert_same(store.get_batch(batch)[0], after)
    assert len(proxy.take()) < 20


@pytest.fixture
def rclone(tmp_path: Path) -> Iterator[Rclone]:
    """A server over the files of `tmp_path/served/bucket`."""
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    try:
        server = Rclone(tmp_path / "served")
    except RuntimeError as error:
        pytest.skip(str(error))
    yield server
    server.kill()


def test_a_server_that_sends_no_ranges(rclone: Rclone, tmp_path: Path) -> None:
    for n, feature in enumerate((SMALL, LARGE, SMALL)):
        torch.save(feature, tmp_path / "served" / "bucket" / f"{n}.pt")
    given = options(rclone.port)
    lister = PathLister("s3://bucket/", storage_options=given)
    assert [path[-4:] for path in lister.paths] == ["0.pt", "1.pt", "2.pt"]
    for some in (lister.paths, list(map(str, lister.paths))[::-1]):
        with GPUFeatureStore("cpu", storage_options=given) as store:
            batch = store.get_batch(some)
            for url, feature in zip(some, batch, strict=True):
                assert_same(feature, LARGE if url.endswith("1.pt") else SMALL)


def test_a_server_that_dies_and_comes_back_in_the_middle_of_an_epoch(
    rclone: Rclone, tmp_path: Path
) -> None:
    for n in range(64):
        torch.save({"n": n, "x": torch.ones(9) * n}, tmp_path / "served" / "bucket" / f"{n:02}.pt")
    proxy = Proxy(rclone.port)
    reached, back = threading.Event(), threading.Event()

    def die(request: Request) -> Fault:
        if len(proxy.requests) == 20:
            rclone.kill()
            reached.set()
        return None if not reached.is_set() or back.is_set() else "close"

    def come_back() -> None:
        reached.wait(30)
        nonlocal second
        second = Rclone(tmp_path / "served")
        proxy.upstream = second.port
        back.set()

    second: Rclone | None = None
    proxy.fault = die
    helper = threading.Thread(target=come_back)
    helper.start()
    try:
        given = options(proxy.port)
        with GPUFeatureStore("cpu", storage_options=given) as store:
            lister = PathLister("s3://bucket", batch_size=8, storage_options=given)
            loader = NodeLoader(GPUCollator(GPUPrefetcher(lister, store)))
            assert [n for batch in loader for n in batch["n"].tolist()] == list(range(64))
        assert back.is_set()
    finally:
        helper.join(30)
        proxy.close()
        if second is not None:
            second.kill()


def test_on_error_leaves_out_what_cannot_be_read(put: Put, remote: Options, proxy: Proxy) -> None:
    for n in range(12):
        url = put(f"{n:02}.pt", {"n": n})
    proxy.fault = lambda request: 403 if request.name.endswith(("03.pt", "07.pt")) else None
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        lister = PathLister(url.rpartition("/")[0], batch_size=4, storage_options=remote)
        loader = NodeLoader(GPUCollator(GPUPrefetcher(lister, store, on_error="skip")))
        assert [batch["n"].tolist() for batch in loader] == [[0, 1, 2], [4, 5, 6], [8, 9, 10, 11]]


def test_read_timeout_ends_waiting_for_an_answer(put: Put, remote: Options, proxy: Proxy) -> None:
    urls = [put(f"{n}.pt", {"n": n}) for n in range(6)]
    proxy.fault = lambda request: "stall" if request.name.endswith("2.pt") else None
    with GPUFeatureStore(
        "cpu", storage_options=remote, read_timeout=0.5, reader_threads=1
    ) as store:
        with pytest.raises(FeatureLoadError, match=r"2\.pt.*TimeoutError"):
            store.get_batch(urls)
        others = [url for url in urls if not url.endswith("2.pt")]
        assert [feature["n"] for feature in store.get_batch(others)] == [0, 1, 3, 4, 5]
        proxy.fault = lambda request: None
        proxy.release.set()
        assert store.get(urls[2])["n"] == 2


def test_a_request_that_is_repeated_and_stalls_fails_no_other_file(
    put: Put, remote: Options, proxy: Proxy
) -> None:
    urls = [put(f"{n}.pt", {"n": n}) for n in range(6)]
    seen: Counter[str] = Counter()

    def flip_then_stall(request: Request) -> Fault:
        seen[request.name] += 1
        if not request.name.endswith("0.pt"):
            return None
        return "flip" if seen[request.name] == 1 else "stall"

    with GPUFeatureStore(
        "cpu", storage_options=remote, read_timeout=0.5, reader_threads=1
    ) as store:
        store.get(put("other.pt", {"n": 9}))
        proxy.fault = flip_then_stall
        lister = PathLister(urls, batch_size=6)
        loader = NodeLoader(GPUCollator(GPUPrefetcher(lister, store, on_error="skip")))
        assert [batch["n"].tolist() for batch in loader] == [[1, 2, 3, 4, 5]]
        proxy.release.set()


def test_an_interrupt_ends_the_requests_and_keeps_no_answers(
    put: Put, remote: Options, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpucache_pipes.files.remote.small_objects import SmallObjects

    urls = [put(f"{n}.pt", {"n": n}) for n in range(40)]
    get = SmallObjects._get

    def interrupted(*arguments: Any) -> Any:
        get(*arguments)
        raise KeyboardInterrupt

    with GPUFeatureStore("cpu", storage_options=remote, asynchronous=False) as store:
        with monkeypatch.context() as patch:
            patch.setattr(SmallObjects, "_get", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.get_batch(urls)
        for n in range(40):
            put(f"{n}.pt", {"n": 100 + n})
        assert [feature["n"] for feature in store.get_batch(urls)] == list(range(100, 140))


def test_local_files_and_objects_in_one_batch(put: Put, remote: Options, tmp_path: Path) -> None:
    paths = []
    for n in range(20):
        torch.save({"n": n}, tmp_path / f"{n} b.pt")
        url = (tmp_path / f"{n} b.pt").as_uri()
        paths += [str(tmp_path / f"{n} b.pt") if n % 2 else url, put(f"{n}.pt", {"n": 100 + n})]
    with GPUFeatureStore("cpu", storage_options=remote, disk_cache=tmp_path / "cache") as store:
        expected = [number for n in range(20) for number in (n, 100 + n)]
        assert [feature["n"] for feature in store.get_batch(paths)] == expected
        assert store._disk is not None and store._disk.wait(20)
        store.clear()
        assert [feature["n"] for feature in store.get_batch(paths)] == expected
        with pytest.raises(FileNotFoundError):
            store.get_batch([*paths, str(tmp_path / "none.pt")])
    assert AnyFiles().absolute((tmp_path / "a b.pt").as_uri(), "/") == str(tmp_path / "a b.pt")
