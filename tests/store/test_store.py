"""GPUFeatureStore, call by call."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sample

from gpucache_pipes import FeatureLoadError, GPUFeatureStore
from gpucache_pipes.testing import assert_same

Files = Callable[..., list[str]]


def test_features_come_back_as_saved(make_files: Files) -> None:
    paths = make_files(5)
    with GPUFeatureStore("cpu") as store:
        for _ in range(2):
            assert_same(store.get(paths[3]), sample(3))
            batch = store.get_batch([paths[2], paths[0], paths[2]])
            assert [int(f["label"]) for f in batch] == [2, 0, 2]
            assert batch.paths == [os.path.realpath(paths[n]) for n in (2, 0, 2)]
            assert [int(f["label"]) for f in batch[1:]] == [0, 2]
            assert int(batch[-1]["label"]) == 2
            with pytest.raises(IndexError):
                batch[3]
        assert paths[0] in store and Path(paths[0]) in store and paths[4] not in store
        assert 3 not in store
        assert len(store) == 3
        stats = store.stats()
        assert (stats.misses, stats.hits, stats.files_read) == (3, 5, 3)
        assert stats.hit_rate == 5 / 8
        assert stats.cached_bytes == 3 * 40
        assert stats.bytes_read == sum(os.path.getsize(paths[n]) for n in (0, 2, 3))
        assert "3 items" in repr(store)


def test_collate_fn_gets_the_list(make_files: Files) -> None:
    paths = make_files(3)
    with GPUFeatureStore("cpu") as store:
        assert store.get_batch(paths, collate_fn=lambda fs: [int(f["label"]) for f in fs]) == [
            0, 1, 2,
        ]  # fmt: skip
        assert len(store.get_batch([])) == 0
        assert len(store.collect([])) == 0


def test_a_store_on_the_default_device(make_files: Files) -> None:
    [path] = make_files(1)
    with GPUFeatureStore() as store:
        assert store.get(path)["feature"].device == store.device


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_cache_bytes": 0}, "max_cache_bytes=0"),
        ({"max_cache_bytes": "lots"}, "max_cache_bytes='lots'"),
        ({"max_cache_items": -1}, "max_cache_items=-1"),
        ({"policy": "psychic"}, "policy='psychic'"),
        ({"reader_threads": 0}, "reader_threads=0"),
        ({"page_bytes": 100}, "page_bytes=100"),
        ({"load_fn": 3}, "load_fn=3"),
        ({"device": "abacus"}, "device='abacus'"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GPUFeatureStore(**{"device": "cpu", **options})


def test_features_without_tensors_are_items_of_no_bytes(make_files: Files) -> None:
    paths = make_files(4, lambda n: {"n": n, "s": "x", "none": None, "b": b"y", "f": [1.5]})
    with GPUFeatureStore("cpu", max_cache_items=3) as store:
        assert store.get(paths[2]) == {"n": 2, "s": "x", "none": None, "b": b"y", "f": [1.5]}
        store.get_batch(paths)[0]["f"].append(2)
        assert store.get(paths[0])["f"] == [1.5]
        assert len(store) == 3 and store.stats().cached_bytes == 0


def test_mutable_values_are_not_shared() -> None:
    with GPUFeatureStore("cpu", load_fn=lambda path: {"ids": {1, 2}}) as store:
        store.get("/x")["ids"].add(3)
        assert store.get("/x") == {"ids": {1, 2}}


def test_a_store_is_true_while_it_is_empty() -> None:
    with GPUFeatureStore("cpu") as store:
        assert store
        assert len(store) == 0


def test_load_fn_and_errors_see_the_path_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "cat.pt").symlink_to("blob")
    with GPUFeatureStore("cpu", load_fn=lambda path: {"name": Path(path).name}) as store:
        batch = store.get_batch([tmp_path / "cat.pt"])
        assert batch[0] == {"name": "cat.pt"} and batch.paths == [str(tmp_path / "cat.pt")]


def test_a_file_may_hold_long_keys_deep_down() -> None:
    feature: Any = torch.zeros(1)
    for _ in range(200):
        feature = {"k" * 20_000: feature}
    with GPUFeatureStore("cpu", load_fn=lambda path: feature) as store:
        tracemalloc.start()
        store.get("/x")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 50 << 20


def test_load_fn_gets_each_path_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    written = ["s3://bucket/x.pt", "a.pt", "sub/../b.pt", "sample-17", str(tmp_path / "c.pt")]
    seen: list[str] = []

    def load(path: str) -> Any:
        seen.append(path)
        return {"path": path}

    with GPUFeatureStore("cpu", load_fn=load) as store:
        batch = store.get_batch(written)
        assert [feature["path"] for feature in batch] == seen == written
        assert batch.paths[0] == written[0]
        assert batch.paths[1:4] == [str(tmp_path / "one" / name) for name in written[1:4]]
        # Read again behind a change of directory, the same file has an absolute path.
        store.clear()
        monkeypatch.chdir(tmp_path / "other")
        first = str(tmp_path / "one" / "a.pt")
        [feature] = store.get_batch([first])
        assert feature["path"] == first
        # Also if it was first written as an absolute one, and as a relative one later.
        store.get_batch(["b.pt"])
        absolute = str(tmp_path / "other" / "d.pt")
        store.get(absolute)
        store.release([absolute])
        store.get("d.pt")
        assert seen[-1] == absolute
        # The same text means another file now, and is handed on as it was written.
        [feature] = store.get_batch(["a.pt"])
        assert feature["path"] == "a.pt"


def test_a_url_of_an_unknown_scheme_is_an_error_under_its_own_name() -> None:
    with GPUFeatureStore("cpu") as store:
        with pytest.raises(FeatureLoadError, match="knows 'nothing'") as missing:
            store.get("nothing://bucket/x.pt")
        assert missing.value.path == "nothing://bucket/x.pt"
