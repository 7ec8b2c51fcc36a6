"""Files that cannot be loaded, and policies that raise."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Gate, sample

from gpucache_pipes import FeatureLoadError, GPUFeatureStore, GPUPrefetcher, PolicyError
from gpucache_pipes.cache.policies import LRU
from gpucache_pipes.testing import assert_same

Files = Callable[..., list[str]]


def test_errors_name_the_path_and_the_next_request_tries_again(tmp_path: Path) -> None:
    path = tmp_path / "late.pt"
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a torch file")
    with GPUFeatureStore("cpu") as store:
        with pytest.raises(FileNotFoundError) as missing:
            store.get(path)
        assert missing.value.filename == str(path)
        torch.save(sample(1), path)
        assert_same(store.get(path), sample(1))
        for _ in range(2):
            with pytest.raises(FeatureLoadError, match=r"bad\.pt") as broken:
                store.get_batch([path, bad])
            assert broken.value.path == str(bad)
            assert broken.value.__cause__ is not None
        assert_same(store.get(path), sample(1))
        assert store.stats().failures == 3


def test_weights_only_is_the_default(make_files: Files) -> None:
    [path] = make_files(1, lambda n: {"x": {1}, "p": Path("x")})
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match="weights_only"):
        store.get(path)
    with GPUFeatureStore("cpu", weights_only=False) as store:
        assert store.get(path)["p"] == Path("x")


def test_an_error_in_the_callers_thread(tmp_path: Path) -> None:
    with GPUFeatureStore("cpu", asynchronous=False) as store:
        with pytest.raises(FileNotFoundError):
            store.get(tmp_path / "no.pt")
        store.prefetch([tmp_path / "no.pt"])  # nobody has asked yet


def test_an_error_reaches_everybody_who_waits_and_nobody_else() -> None:
    gate = Gate({"/a": OSError("disk on fire"), "/b": torch.tensor([2.0])})
    with GPUFeatureStore("cpu", load_fn=gate, reader_threads=2) as store:
        pending = [store.request(["/b", "/a"]), store.request(["/a"])]
        fine = store.request(["/b"])
        gate.open("/b", "/a")
        for batch in pending:
            with pytest.raises(FeatureLoadError, match="disk on fire"):
                batch.result()
        assert float(fine.result()[0]) == 2


def test_a_policy_that_names_what_is_not_cached_is_told_so(make_files: Files) -> None:

    class Wrong(LRU):
        def victims(self, key: int) -> Any:
            return iter([key])

    paths = make_files(2)
    with GPUFeatureStore("cpu", max_cache_items=1, policy=Wrong()) as store:
        store.get(paths[0])
        with pytest.raises(PolicyError, match="not cached"):
            store.get(paths[1])


class Moody(LRU):
    """Raises when told to."""

    mood = ""

    def on_insert(self, key: int) -> None:
        if self.mood == "insert":
            raise ValueError("not today")
        super().on_insert(key)

    def on_access(self, keys: Any, owner: object) -> None:
        if self.mood == "access":
            raise ValueError("not today")
        super().on_access(keys, owner)


@pytest.mark.parametrize("mood", ["insert", "access"])
def test_a_policy_that_raises_hangs_nobody(make_files: Files, mood: str) -> None:
    paths = make_files(3)
    policy = Moody()
    with GPUFeatureStore("cpu", max_cache_items=2, policy=policy) as store:
        store.get_batch(paths[:2])
        policy.mood = mood
        with pytest.raises(PolicyError, match="not today"):
            store.get_batch(paths)
        store.check()
        policy.mood = ""
        assert [int(f["label"]) for f in store.get_batch(paths)] == [0, 1, 2]


def test_a_policy_that_fails_is_not_a_bad_file(make_files: Files) -> None:
    """No file is left out for it."""
    policy = Moody()
    asked: list[str] = []
    with GPUFeatureStore("cpu", max_cache_items=2, policy=policy) as store:
        few, many = make_files(2), make_files(4)
        batches = GPUPrefetcher(
            [few, few, many], store, depth=1, on_error=lambda path, error: asked.append(path)
        )
        assert len(next(batches)) == 2
        policy.mood = "insert"
        with pytest.raises(PolicyError, match=r"Moody.* has failed: ValueError: not today"):
            list(batches)
        assert not asked
        policy.mood = ""
        store.check()


def test_arrays_are_refused_and_not_cached_uncounted() -> None:
    import numpy as np

    with (
        GPUFeatureStore("cpu", load_fn=lambda path: {"x": np.ones(3)}) as store,
        pytest.raises(FeatureLoadError, match=r"feature\['x'\].*numpy.*from_numpy"),
    ):
        store.get("/x")
    with GPUFeatureStore("cpu", load_fn=lambda path: {"n": np.float32(2)}) as store:
        assert store.get("/x")["n"] == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\x00" * 100, "not a torch.save file, or a damaged one"),
        (b"hello, world", "not a torch.save file, or a damaged one"),
        (random.Random(0).randbytes(1000), "not a torch.save file, or a damaged one"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=says):
        store.get(path)


def test_what_weights_only_refuses_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"when": Path("x")}, path)
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError) as caught:
        store.get(path)
    for word in ("pathlib", "add_safe_globals", "weights_only=False", "load_fn"):
        assert word in str(caught.value)


def test_a_missing_file_that_a_load_fn_needs_is_named() -> None:
    with (
        GPUFeatureStore("cpu", load_fn=lambda path: Path("/no/index").read_text()) as store,
        pytest.raises(FileNotFoundError, match=r"/no/index.*needed to load.*/x"),
    ):
        store.get("/x")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_weights_only_refuses_is_named(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(2), "v": frozenset([1])}, path, pickle_protocol=protocol)
    says = "refuses frozenset" if protocol == 2 else "protocol 2"
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=says):
        store.get(path)
