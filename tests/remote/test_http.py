"""Objects over plain HTTP, by a list of URLs: no listing, no etags, no ranges."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from remote.servers import serve

from gpucache_pipes import FeatureLoadError, GPUFeatureStore, PathLister
from gpucache_pipes.testing.features import assert_same

OPTIONS = {"client_options": {"allow_http": True}}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[str]:
    with serve(tmp_path) as address:
        yield address


def test_features_by_their_urls(root: str, tmp_path: Path) -> None:
    small, large = {"x": torch.arange(9.0)}, {"x": torch.arange(700_000)}
    for name, feature in (("a b.pt", small), ("large.pt", large), ("c.pt", small)):
        torch.save(feature, tmp_path / name)
    urls = [f"{root}/a%20b.pt", f"{root}/large.pt", f"{root}/c.pt"]
    lister = PathLister(urls, batch_size=3)
    with GPUFeatureStore("cpu", storage_options=OPTIONS) as store:
        for batch in [*lister, urls]:
            found = store.get_batch(batch)
            for feature, expected in zip(found, (small, large, small), strict=True):
                assert_same(feature, expected)
            store.clear()
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            store.get(f"{root}/none.pt")


def test_objects_of_one_size_and_time_are_not_confused(root: str, tmp_path: Path) -> None:
    """Plain values are in the read plan, and a server of files tells versions by time and size."""
    for n in range(8):
        torch.save({"x": torch.full((9,), float(n)), "n": n, "name": f"s{n}"}, tmp_path / f"{n}.pt")
        os.utime(tmp_path / f"{n}.pt", (1e9, 1e9))
    urls = [f"{root}/{n}.pt" for n in range(8)]
    with GPUFeatureStore("cpu", storage_options=OPTIONS) as store:
        for _ in range(2):
            found = [*store.get_batch(urls), *map(store.get, urls)]
            assert [(f["n"], f["name"], f["x"][0].item()) for f in found] == [
                (n, f"s{n}", float(n)) for n in range(8)
            ] * 2
            store.clear()


def test_a_signed_url_is_refused_without_its_signature(root: str) -> None:
    signed = f"{root}/a.pt?X-Amz-Signature=abc123"
    with GPUFeatureStore("cpu", storage_options=OPTIONS) as store:
        with pytest.raises(FeatureLoadError, match="holds credentials, a signature") as raised:
            store.get(signed)
        assert "abc123" not in str(raised.value) and "abc123" not in repr(raised.value)
