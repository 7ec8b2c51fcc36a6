"""Pipelines over URLs give what they give over local files, with as few requests as they need."""

import io
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from remote.servers import Proxy, Request, SeaweedFS, options
from safetensors.torch import save as save_safetensors

from gpucache_pipes import (
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    NodeLoader,
    PathLister,
)
from gpucache_pipes.files import RemoteFiles, Source
from gpucache_pipes.testing import SourceContract
from gpucache_pipes.testing.features import assert_same, features

Put = Callable[..., str]
Options = dict[str, Any]
FEATURES = [{"x": torch.randn(40) + n, "n": n, "name": f"sample {n}"} for n in range(48)]
NAMES = [f"{n:03}.pt" for n in range(48)]


@pytest.fixture
def prefix(put: Put) -> str:
    """The URL below which FEATURES are."""
    urls = [put(name, feature) for name, feature in zip(NAMES, FEATURES, strict=True)]
    return urls[0].rpartition("/")[0]


def save_locally(directory: Path, names: list[str], features: list[Any]) -> None:
    for name, feature in zip(names, features, strict=True):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(feature, path)


def batches(source: Any, store: GPUFeatureStore, epochs: int = 2, **arguments: Any) -> list[Any]:
    lister = PathLister(source, batch_size=10, shuffle=True, seed=3, **arguments)
    loader = NodeLoader(GPUCollator(GPUPrefetcher(lister, store)))
    return [batch for _ in range(epochs) for batch in loader]


def gets(requests: list[Request]) -> list[str]:
    return sorted(
        request.name for request in requests if request.method == "GET" and not request.is_list
    )


class TestObjects(SourceContract):
    """RemoteFiles keeps the contract of sources, over a real server."""

    @pytest.fixture(autouse=True)
    def _server(self, weed: SeaweedFS, put: Put) -> None:
        self.options, self.put = options(weed.port), put

    def make_source(self, directory: Path, features: Any) -> tuple[Source, list[str]]:
        urls = [self.put(f"{number}.pt", feature) for number, feature in enumerate(features)]
        files = RemoteFiles(self.options)
        files.is_current(urls[0], b"")  # its connection stays open
        return files, urls

    def change(self, source: Source, path: str, feature: Any) -> None:
        self.put(path.rpartition("/")[2], feature)


def test_batches_are_those_of_local_files(prefix: str, remote: Options, tmp_path: Path) -> None:
    save_locally(tmp_path, NAMES, FEATURES)
    with GPUFeatureStore("cpu") as store:
        expected = batches(str(tmp_path), store)
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        assert_same(batches(prefix, store, storage_options=remote), expected)
    budget = {"max_cache_bytes": 20 * 160, "storage_options": remote}
    with GPUFeatureStore("cpu", **budget) as store:  # type: ignore[arg-type]
        assert_same(batches(prefix + "/*.pt", store, storage_options=remote), expected)
        assert store.stats().hit_rate < 0.5
        store.check()


@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
@given(feature=features(max_leaves=4))
def test_any_feature_is_what_torch_load_gives(feature: Any, put: Put, weed: SeaweedFS) -> None:
    url = put("any.pt", feature)
    with GPUFeatureStore("cpu", storage_options=options(weed.port), weights_only=False) as store:
        assert_same(store.get(url), feature)
        assert_same(store.get_batch([url])[0], feature)


def test_a_pipeline_resumes_in_the_middle(prefix: str, remote: Options) -> None:
    def loader(store: GPUFeatureStore) -> NodeLoader:
        lister = PathLister(prefix, batch_size=10, shuffle=True, storage_options=remote)
        return NodeLoader(GPUCollator(GPUPrefetcher(lister, store)))

    with GPUFeatureStore("cpu", storage_options=remote) as store:
        expected = list(loader(store))
        begun = loader(store)
        iterator = iter(begun)
        first = [next(iterator), next(iterator)]
        state = begun.state_dict()
    assert "secret" not in repr(state)
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        resumed = loader(store)
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert_same([*first, *resumed], expected)


def test_a_small_object_takes_one_get_and_a_job_one_listing(
    prefix: str, remote: Options, proxy: Proxy
) -> None:
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        batches(prefix, store, epochs=3, storage_options=remote)
    requests = proxy.take()
    assert sum(request.is_list for request in requests) == 1
    assert [name.rpartition("/")[2] for name in gets(requests)] == NAMES
    assert len(requests) == 1 + len(NAMES)


def test_urls_that_were_not_listed_take_one_get_each(
    prefix: str, remote: Options, proxy: Proxy
) -> None:
    urls = [f"{prefix}/{name}" for name in NAMES]
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        assert_same(list(store.get_batch(urls)), FEATURES)
        store.get_batch(urls)
    assert len(proxy.take()) == len(NAMES)


def test_a_list_cache_spares_the_second_listing(
    prefix: str, remote: Options, proxy: Proxy, tmp_path: Path
) -> None:
    cache = tmp_path / "lists" / "objects.npz"
    first = PathLister(prefix, storage_options=remote, list_cache=cache)
    assert len(proxy.take()) == 1 and not list(cache.parent.glob("*.lock"))
    second = PathLister(prefix, storage_options=remote, list_cache=cache)
    assert second.paths == first.paths and not proxy.take()
    sizes = RemoteFiles(remote)
    assert sizes.sample_sizes(second.paths) == [sizes.size(url) for url in second.paths]
    assert not proxy.take()  # sizes are in the list
    other = PathLister(prefix, pattern="00*.pt", storage_options=remote, list_cache=cache)
    assert len(other.paths) == 10 and len(proxy.take()) == 1  # of other arguments: listed again
    assert b"secret" not in cache.read_bytes()
    cache.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"objects\.npz' is not a list of objects"):
        PathLister(prefix, storage_options=remote, list_cache=cache)
    assert cache.read_bytes() == b"something else"


@pytest.mark.parametrize("listed", [True, False])
def test_with_a_disk_cache_later_epochs_and_runs_ask_for_nothing(
    prefix: str, remote: Options, proxy: Proxy, tmp_path: Path, listed: bool
) -> None:
    cache, list_cache = tmp_path / "cache", tmp_path / "list"
    source: Any = prefix if listed else [f"{prefix}/{name}" for name in NAMES]
    given: dict[str, Any] = {"storage_options": remote}
    if listed:
        given["list_cache"] = list_cache

    def run(epochs: int) -> list[Any]:
        with GPUFeatureStore(
            "cpu", max_cache_bytes=800, storage_options=remote, disk_cache=cache
        ) as store:
            found = batches(source, store, 1, **given)
            assert store._disk is not None and store._disk.wait(20)
            lister = batches(source, store, epochs - 1, **given)
            assert store.stats().disk_unpackable == 0
            return found + lister

    first = run(2)
    requests = proxy.take()
    assert [name.rpartition("/")[2] for name in gets(requests)] == NAMES
    assert len(requests) == listed + len(NAMES)  # nothing but a GET each, and the listing
    assert_same(run(2), first)
    # Objects that were given by their URLs are looked at once a run.
    later = proxy.take()
    assert gets(later) == [] and len(later) == (0 if listed else len(NAMES))


def test_a_changed_object_is_not_taken_from_the_disk(
    put: Put, remote: Options, tmp_path: Path
) -> None:
    url = put("a.pt", FEATURES[0])
    for feature in FEATURES[:3]:
        put("a.pt", feature)
        with GPUFeatureStore("cpu", storage_options=remote, disk_cache=tmp_path / "c") as store:
            assert_same(store.get(url), feature)


def test_samples_of_several_objects_with_labels_and_buckets(
    put: Put, remote: Options, proxy: Proxy
) -> None:
    sizes = [int(n) for n in np.random.default_rng(0).integers(1, 60, 24)]
    for n, size in enumerate(sizes):
        put(f"video/{n:02}.pt", torch.arange(float(size)))
        root = put(f"audio/{n:02}.safetensors", raw=save_safetensors({"a": torch.full((3,), n)}))
    root = root.rpartition("/audio/")[0]
    proxy.take()
    lister = PathLister(
        {"video": root + "/video", "audio": root + "/audio/*.safetensors"},
        batch_size=6, shuffle=True, bucket_by="file_size", storage_options=remote,
        labels={f"{n:02}": n for n in range(24)},
    )  # fmt: skip
    assert len(proxy.take()) == 2  # sizes are in the listings
    seen = []
    for batch, label in GPUCachedPathDataLoader(
        lister, device="cpu", ragged="pad", storage_options=remote
    ):
        assert batch["audio"]["a"].values[:, 0].tolist() == label.tolist()
        lengths = [sizes[n] for n in label.tolist()]
        assert batch["video"].lengths.tolist() == lengths
        seen += label.tolist()
    assert sorted(seen) == list(range(24))


def test_other_formats(put: Put, remote: Options) -> None:
    array = io.BytesIO()
    np.save(array, np.arange(12).reshape(3, 4))
    urls = [
        put("a.npy", raw=array.getvalue()),
        put("b.safetensors", raw=save_safetensors({"x": torch.ones(3)})),
    ]
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        assert store.get(urls[0]).tolist() == np.arange(12).reshape(3, 4).tolist()
        assert_same(store.get(urls[1]), {"x": torch.ones(3)})
        both = store.get_batch([*urls, put("c.pt", FEATURES[0])])
        assert_same(both[2], FEATURES[0])


def test_what_only_torch_load_reads(put: Put, remote: Options, proxy: Proxy) -> None:
    sparse = {"s": torch.eye(3).to_sparse(), "x": torch.ones(2)}
    buffer = io.BytesIO()
    torch.save(FEATURES[1], buffer, _use_new_zipfile_serialization=False)
    url = put("old.pt", raw=buffer.getvalue())
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        assert_same(store.get(url), FEATURES[1])
        assert len(proxy.take()) == 1
        with pytest.raises(RuntimeError, match="sparse"):
            store.get(put("sparse.pt", sparse))


NAMES_TO_TRY = [
    "a b.pt", "ä漢.pt", "a#1.pt", "a%20b.pt", "a+b.pt", "a&b=c.pt", "~a.pt", "a*b.pt",
    "(a).pt", "a,b;c.pt", "a@b:c.pt", "{a}.pt", "-.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_TO_TRY)
def test_odd_names(name: str, put: Put, weed: SeaweedFS) -> None:
    given = options(weed.port)
    url = put(name, FEATURES[2])
    lister = PathLister(url.rpartition("/")[0] + "/", storage_options=given)
    assert list(lister.paths) == [url]
    with GPUFeatureStore("cpu", storage_options=given) as store:
        assert_same(store.get(url), FEATURES[2])


@pytest.mark.parametrize(
    "url", ["s3://tests/a//b.pt", "s3://tests/../b.pt", "s3://tests", "s3:///a"]
)
def test_urls_that_name_no_object(url: str, remote: Options) -> None:
    store = GPUFeatureStore("cpu", storage_options=remote)
    with store, pytest.raises(RuntimeError, match="ValueError: the URL"):
        store.get(url)


# Large objects


def large(leaves: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"leaf {n}": torch.randn(700_000 + n, generator=generator) for n in range(leaves)} | {
        "t": torch.arange(600_000).reshape(600, 1000).T
    }


def ranges(requests: list[Request]) -> list[tuple[int, int]]:
    found = []
    for request in requests:
        assert request.range is not None, request
        begin, end = request.range.removeprefix("bytes=").split("-")
        found.append((int(begin), int(end) + 1))
    return found


def test_large_objects_are_read_by_ranges(put: Put, remote: Options, proxy: Proxy) -> None:
    feature = large()
    url = put("large.pt", feature)
    prefix = url.rpartition("/")[0]
    lister = PathLister(prefix, storage_options=remote)
    size = RemoteFiles(remote).size(url)
    proxy.take()
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        assert_same(store.get(url), feature)
        first = ranges(proxy.take())
        # The data once, in pieces of 8 MiB at most, and the ends of the object for its headers.
        assert max(end - begin for begin, end in first) <= 8 << 20
        assert sum(end - begin for begin, end in first) <= size + 3 * (64 << 10)
        store.clear()
        assert_same(store.get(url), feature)
        # What is known of the object is not asked for again.
        assert sum(end - begin for begin, end in ranges(proxy.take())) <= size
    with GPUFeatureStore("cpu", storage_options=remote, keys=["leaf 1"], dtype=torch.float16) as s:
        assert_same(s.get(url), {"leaf 1": feature["leaf 1"].half()})
        some = ranges(proxy.take())
        assert sum(end - begin for begin, end in some) <= 4 * 700_001 + 3 * (64 << 10)
    assert lister.paths == [url]


def test_a_large_object_that_was_not_listed(put: Put, remote: Options, proxy: Proxy) -> None:
    url = put("large.safetensors", raw=save_safetensors({"x": torch.arange(900_000)}))
    with GPUFeatureStore("cpu", storage_options=remote, reader_threads=2) as store:
        assert_same(store.get(url), {"x": torch.arange(900_000)})


def test_a_large_object_that_changes_between_epochs(put: Put, remote: Options) -> None:
    url = put("large.pt", {"x": torch.zeros(600_000)})
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        assert store.get(url)["x"].sum() == 0
        put("large.pt", {"x": torch.ones(600_000)})
        store.release([url])
        assert store.get(url)["x"].sum() == 600_000


def test_a_listing_leaves_out_large_subdirectories(
    put: Put, remote: Options, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpucache_pipes.files.remote import listing

    monkeypatch.setattr(listing, "_MOST_BELOW", 5)
    wanted = [put("a.pt", raw=b"-"), put("z.pt", raw=b"-")]
    inside = [put(f"sub/{n}.pt", raw=b"-") for n in range(20)]
    prefix = wanted[0].rpartition("/")[0]
    assert list(PathLister(prefix, storage_options=remote).paths) == wanted
    every = PathLister(prefix, recursive=True, storage_options=remote).paths
    assert list(every) == sorted([*wanted, *inside])
    glob = PathLister(prefix + "/**/1*.pt", storage_options=remote).paths
    assert list(glob) == sorted(url for url in inside if "/1" in url)


def test_a_list_cache_of_several_parts_and_of_another_server(
    put: Put, remote: Options, proxy: Proxy, tmp_path: Path
) -> None:
    for n in range(3):
        put(f"v/{n}.pt", FEATURES[n])
        root = put(f"a/{n}.pt", FEATURES[n]).rpartition("/a/")[0]
    source = {"v": root + "/v", "a": root + "/a"}
    for times in (2, 0):
        proxy.take()
        PathLister(source, batch_size=1, storage_options=remote, list_cache=tmp_path / "list")
        assert len(proxy.take()) == times
    other = Proxy(proxy.upstream)
    given = {**remote, "endpoint": f"http://127.0.0.1:{other.port}"}
    PathLister(root + "/v", storage_options=remote, list_cache=tmp_path / "one")
    PathLister(root + "/v", storage_options=given, list_cache=tmp_path / "one")
    assert len(other.take()) == 1  # the file is of another endpoint
    other.close()


def test_a_damaged_list_cache_is_named(put: Put, remote: Options, tmp_path: Path) -> None:
    prefix = put("a.pt", FEATURES[0]).rpartition("/")[0]
    cache = tmp_path / "list"
    PathLister(prefix, storage_options=remote, list_cache=cache)
    good = cache.read_bytes()
    for at in range(0, len(good), 7):
        cache.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        try:
            assert len(PathLister(prefix, storage_options=remote, list_cache=cache).paths) == 1
        except ValueError as error:
            assert "list' is not a list of objects, or a damaged one" in str(error)  # noqa: PT017
    for bad in ("", 5, tmp_path):
        with pytest.raises(ValueError, match="must be the path of a file"):
            PathLister(prefix, storage_options=remote, list_cache=bad)  # type: ignore[arg-type]


def test_the_latest_listing_counts(put: Put, remote: Options, tmp_path: Path) -> None:
    url = put("a.pt", {"x": torch.zeros(600_000)})
    prefix = url.rpartition("/")[0]
    with GPUFeatureStore("cpu", storage_options=remote, disk_cache=tmp_path / "cache") as store:
        first = PathLister(prefix, storage_options=remote)
        assert store.get(url)["x"].sum() == 0
        assert store._disk is not None and store._disk.wait(20)
    put("a.pt", {"x": torch.ones(600_000)})
    second = PathLister(prefix, storage_options=remote)
    with GPUFeatureStore("cpu", storage_options=remote, disk_cache=tmp_path / "cache") as store:
        assert store.get(url)["x"].sum() == 600_000
    assert first.paths == second.paths


@pytest.mark.parametrize("what", ["store", "lister", "used"])
def test_a_forked_process_says_that_it_cannot(what: str, put: Put, remote: Options) -> None:
    url = put("a.pt", FEATURES[0])
    files = RemoteFiles(remote)
    files.open(url, url).close()

    def child() -> None:
        try:
            if what == "store":
                GPUFeatureStore("cpu", storage_options=remote).get(url)
            elif what == "used":
                GPUFeatureStore("cpu", source=files).get_batch([url, url + "x"])
            else:
                PathLister(url.rpartition("/")[0], storage_options=remote)
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_name_that_cannot_be_asked_for(put: Put, remote: Options) -> None:
    prefix = put("a.pt", FEATURES[0]).rpartition("/")[0]
    with GPUFeatureStore("cpu", storage_options=remote) as store:
        for url in (f"{prefix}/a.pt/", f"{prefix}/b\n.pt"):
            with pytest.raises((RuntimeError, FileNotFoundError), match=r"a\.pt/|b\\n\.pt"):
                store.get(url)
    for wrong, text in (
        ({"endpoint": "127.0.0.1:1"}, "the endpoint needs a scheme"),
        ({"retry_config": "x"}, "retry_config must be a dict"),
        ({"retry_config": {"max_retries": "x"}}, "max_retries of retry_config"),
        ({"nonsense": "a-secret"}, "'nonsense' is not valid"),
    ):
        with pytest.raises(ValueError, match=text) as raised:
            PathLister(prefix, storage_options={**remote, **wrong})
        assert "a-secret" not in str(raised.value)


def test_what_cannot_be_listed(put: Put, remote: Options) -> None:
    url = put("a.txt", raw=b"-")
    prefix = url.rpartition("/")[0]
    with pytest.raises(FileNotFoundError, match=r"no objects below .*; 1 have other names"):
        PathLister(prefix, storage_options=remote)
    with pytest.raises(FileNotFoundError, match="0 have other names"):
        PathLister("s3://tests/nothing/", storage_options=remote)
    with pytest.raises(FileNotFoundError, match="No such bucket: 's3://no-bucket/a/'"):
        PathLister("s3://no-bucket/a", storage_options=remote)
    with pytest.raises(PermissionError, match=r"access is denied \(403 .*'s3://tests/a/'"):
        PathLister("s3://tests/a", storage_options={**remote, "secret_access_key": "wrong"})
    with pytest.raises(ValueError, match="HTTP has no listing of 'https://host/a/'"):
        PathLister("https://host/a/")
    assert list(PathLister(url, storage_options=remote).paths) == [url]
