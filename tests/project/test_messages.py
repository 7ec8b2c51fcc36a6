"""What people write in the first ten minutes works, or is answered by what to write instead."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

from gpucache_pipes import (
    FeaturePathDataset,
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    Lockstep,
    PathLister,
    Trace,
    simulate,
)
from gpucache_pipes.adapters import checks
from gpucache_pipes.cache.policies import make_policy, register
from gpucache_pipes.device import AcceleratorBackend, DeviceMemory, memory
from gpucache_pipes.device.memory import total_host_bytes
from gpucache_pipes.files import RowFiles
from gpucache_pipes.nodes import sharding
from gpucache_pipes.store import progress
from gpucache_pipes.testing import SimulatedRuntime
from gpucache_pipes.units import parse_bytes

Files = Callable[[int], list[str]]


@pytest.fixture
def store() -> Any:
    with GPUFeatureStore("cpu") as made:
        yield made


# Sources of paths


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (b"features", TypeError, r"os\.fsdecode"),
        ([("a.pt", 1)], TypeError, r"labels=\[\.\.\.\]"),
        ([{"path": "a.pt", "label": 1}], TypeError, r"labels=\{\.\.\.\}"),
        ({"a.pt": 1}, TypeError, "the dict as labels="),
        ([b"a.pt"], TypeError, r"os\.fsdecode"),
        ([1, 2], TypeError, "a path is a str"),
        (3, TypeError, "a source is a node or an iterable"),
    ],
)
def test_what_is_no_source(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PathLister(source)


@pytest.mark.parametrize("shuffle", ["yes", 1, None])
def test_shuffle_is_a_flag(shuffle: Any) -> None:
    with pytest.raises(ValueError, match=r"shuffle=.* must be True or False"):
        PathLister(["a.pt"], shuffle=shuffle)


def test_every_list_is_a_list(make_files: Files, tmp_path: Path) -> None:
    paths = make_files(5)

    class Column:  # as data sets have them: neither a Sequence nor an array
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, at: int) -> str:
            return paths[at]

    for source in (
        np.array(paths),
        np.array(paths, object),
        tuple(paths),
        Column(),
        [Path(path) for path in paths],
    ):
        lister = PathLister(source, batch_size=2, shuffle=True, seed=3)
        assert list(lister.paths) == paths
        assert len(lister) == 3
    pandas = pytest.importorskip("pandas")
    assert list(PathLister(pandas.Series(paths)).paths) == paths
    assert list(PathLister(pandas.Series(paths, index=range(5, 10))).paths) == paths
    assert list(PathLister(np.array(paths[0])).paths) == paths[:1]


# Sizes


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (8e9, 8_000_000_000),
        ("8g", 8 << 30),
        ("8G", 8 << 30),
        ("512m", 512 << 20),
        ("2 GB", 2 * 10**9),
    ],
)
def test_sizes_that_are_clear(given: Any, meant: int) -> None:
    assert parse_bytes("max_cache_bytes", given) == meant


@pytest.mark.parametrize(
    "given", ["0%", "150%", "x%", "much", 0.5, -1, True, "", float("nan"), float("inf")]
)
def test_sizes_that_are_not(given: Any) -> None:
    with pytest.raises(ValueError, match="max_cache_bytes="):
        GPUFeatureStore("cpu", max_cache_bytes=given)


def test_a_part_of_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with GPUFeatureStore("cpu", max_cache_bytes="25 %") as store:
        assert store._shared.cache.ledger.max_bytes == total_host_bytes() // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with GPUFeatureStore("cpu", max_cache_bytes="100%") as store:
        quarter = total_host_bytes()
        assert store._shared.cache.ledger.max_bytes == quarter
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert quarter == total_host_bytes() // 4
    runtime = SimulatedRuntime(0)
    monkeypatch.setattr(runtime, "memory", lambda: DeviceMemory(9, 1 << 20, 0, 0, 0, 0))
    with GPUFeatureStore(AcceleratorBackend(runtime), max_cache_bytes="50%") as store:
        assert store._shared.cache.ledger.max_bytes == 1 << 19
    monkeypatch.setattr(runtime, "memory", lambda: None)
    with pytest.raises(ValueError, match=r"max_cache_bytes='50%'.*give a number"):
        GPUFeatureStore(AcceleratorBackend(runtime), max_cache_bytes="50%")
    with pytest.raises(ValueError, match="staging_bytes='50%' is not a size"):
        GPUFeatureStore("cpu", staging_bytes="50%")


@pytest.mark.parametrize("version", [1, 2])
def test_containers_limit_the_memory_of_the_host(tmp_path: Path, version: int) -> None:
    """The least limit of the groups that the process is in, however deep."""
    root = tmp_path / "groups" / ("memory" if version == 1 else "")
    limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
    used = "memory.usage_in_bytes" if version == 1 else "memory.current"
    (root / "outer" / "inner").mkdir(parents=True)
    for group, most in (("", "9000"), ("outer", "1000"), ("outer/inner", "5000")):
        (root / group / limit).write_text(f"{most}\n")
        (root / group / used).write_text("300\n")
    if version == 2:
        (root / limit).write_text("max\n")
    own = tmp_path / "own"
    own.write_text("5:cpu:/x\n4:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_GROUPS", tmp_path / "groups")
        patch.setattr(memory, "_OWN_GROUPS", own)
        patch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert memory.total_host_bytes() == 1000
        assert memory.available_host_bytes() == 700
        patch.setattr(memory, "_OWN_GROUPS", tmp_path / "nowhere")
        assert memory.total_host_bytes() > 1 << 20


# Ragged


def test_ragged_is_a_mode() -> None:
    with pytest.raises(ValueError, match=r"ragged=True must be a mode \(error, pad"):
        GPUCollator([], ragged=True)  # type: ignore[arg-type]


def test_a_leaf_that_is_not_there(tmp_path: Path, store: GPUFeatureStore) -> None:
    paths = []
    for length in (2, 3):
        paths.append(str(tmp_path / f"{length}.pt"))
        torch.save({"feature": torch.ones(length), "label": torch.tensor(1)}, paths[-1])
    batches = GPUCollator(GPUPrefetcher([paths], store), ragged={"featrue": "pad"})
    batches.reset()
    with pytest.raises(
        RuntimeError, match=r"cannot stack \['feature'\].*'featrue', but the leaves are 'feature', "
    ):
        next(batches)


def test_a_mode_in_collate(make_files: Files, store: GPUFeatureStore) -> None:
    batch = store.get_batch(make_files(2))
    assert batch.collate(ragged="pad")["feature"].lengths.tolist() == [8, 8]
    assert batch.collate("list")["feature"][0].shape == (8,)
    with pytest.raises(ValueError, match="not known"):
        batch.collate(ragged="padded")


def test_max_length_needs_ragged() -> None:
    with pytest.raises(ValueError, match="max_length= is for ragged="):
        GPUCollator([], max_length=5)


# Files of other formats


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "a JPEG image"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        ("npz", "an archive of numpy.savez"),
        ("npy", r"whose name must end with \.npy"),
    ],
)
def test_files_of_other_formats(
    tmp_path: Path, store: GPUFeatureStore, content: Any, message: str
) -> None:
    """The way out is not to let them run code."""
    buffer = io.BytesIO()
    if content == "npz":
        np.savez(buffer, x=np.ones(3))
    elif content == "npy":
        np.save(buffer, np.ones(3))
    path = tmp_path / "x.pt"
    path.write_bytes(content if isinstance(content, bytes) else buffer.getvalue())
    with pytest.raises(Exception, match=message) as caught:
        store.get(path)
    assert "load_fn" in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_arrays_of_numpy_in_a_pt_file(tmp_path: Path, store: GPUFeatureStore) -> None:
    """The message has the one step that helps."""
    path = tmp_path / "x.pt"
    torch.save({"x": np.arange(3), "y": 1}, path)
    with pytest.raises(Exception, match="holds arrays of numpy") as caught:
        store.get(path)
    assert "default_convert" in str(caught.value)

    def load(path: str) -> Any:
        return torch.utils.data.default_convert(torch.load(path, weights_only=False))

    with GPUFeatureStore("cpu", load_fn=load) as converting:
        assert converting.get(path)["x"].tolist() == [0, 1, 2]


def test_a_file_that_lacks_a_key(tmp_path: Path, store: GPUFeatureStore) -> None:
    paths = [str(tmp_path / f"{number}.pt") for number in range(3)]
    for number, path in enumerate(paths):
        feature = {"x": torch.ones(3), "label": torch.tensor(number)}
        torch.save(feature if number != 1 else {"x": feature["x"]}, path)
    batch = store.get_batch(paths)
    for ragged in (None, "pad"):
        with pytest.raises(
            RuntimeError, match=r"1\.pt' lacks the key 'label', which that of .*0\.pt"
        ):
            batch.collate(ragged)
    assert len(list(batch)) == 3
    assert store.get_batch(paths[1:]).collate()["x"].shape == (2, 3)  # a key more does no harm


# Policies


def test_a_policy_that_lacks_methods() -> None:
    class Half:
        def on_insert(self, key: int) -> None: ...

        def victims(self, key: int) -> None: ...

    with pytest.raises(ValueError, match="it lacks on_access, on_remove, begin_epoch"):
        GPUFeatureStore("cpu", policy=Half())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an object of the class, not the class"):
        GPUFeatureStore("cpu", policy=Half)  # type: ignore[arg-type]


# What is at hand


def test_warming_what_one_has(make_files: Files, store: GPUFeatureStore, tmp_path: Path) -> None:
    paths = make_files(6)
    assert store.warm(PathLister(paths, batch_size=2)) == 6
    store.clear()
    assert store.warm(str(Path(paths[0]).parent)) == 6
    assert store.warm(paths[0]) == 1


def test_bars_are_for_terminals(
    make_files: Files, store: GPUFeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.warm(make_files(3))
    assert capsys.readouterr().err == ""
    store.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "_in_notebook", lambda: True)
        store.warm(make_files(3))
    assert "warming" in capsys.readouterr().err


def test_lengths(make_files: Files, store: GPUFeatureStore) -> None:
    lister = PathLister(make_files(7), batch_size=2)
    features = GPUPrefetcher(lister, store)
    assert (len(features), len(GPUCollator(features))) == (4, 4)
    singles = GPUPrefetcher(PathLister(make_files(7)), store)
    assert len(GPUCollator(singles, batch_size=3)) == 3
    assert len(GPUCollator(singles, batch_size=3, drop_last=True)) == 2
    stream = GPUPrefetcher(PathLister(iter(["a.pt"])), store)
    assert stream
    with pytest.raises(TypeError):
        len(stream)


def test_stats_for_people_and_loggers(make_files: Files) -> None:
    lister = PathLister(make_files(6), batch_size=2)
    with GPUCachedPathDataLoader(lister, device="cpu", max_cache_bytes="1g") as loader:
        assert (
            repr(loader.store) == "GPUFeatureStore(cpu, 0 B of 1 GiB cached, 0 items, clairvoyant)"
        )
        for _ in range(2):
            list(loader)
        assert repr(loader.store).endswith("of 1 GiB cached, 6 items, clairvoyant, 50% hits)")
        stats = loader.stats()
    figures = stats.as_dict()
    assert figures["hit_rate"] == 0.5 and figures["hits"] == 6
    assert all(isinstance(value, (int, float)) for value in figures.values())
    text = str(stats)
    assert "hit_rate              50.0%" in text and "KiB" in text
    assert stats._repr_html_().count("<tr>") == len(figures)


def test_a_transform_on_the_batch(make_files: Files) -> None:
    lister = PathLister(make_files(6), batch_size=2, labels=list(range(6)))
    seen: list[Any] = []

    def transform(batch: Any) -> Any:
        features, labels = batch
        seen.append(labels.tolist())
        return features["feature"] * 0, labels

    with GPUFeatureStore("cpu") as store:
        nodes = GPUCollator(GPUPrefetcher(lister, store), transform=transform)
        loader = GPUCachedPathDataLoader(
            PathLister(lister.paths, batch_size=2, labels=list(range(6))),
            store=store,
            transform=transform,
            build_batch_fn=lambda batch, original, paths: (batch, len(paths)),
        )
        for source in (nodes, (batch for batch, count in loader if count == 2)):
            for features, labels in source:
                assert not features.any() and labels.tolist() == seen[-1]
        forgetful = GPUCollator(GPUPrefetcher(lister, store), transform=seen.append)
        forgetful.reset()
        with pytest.raises(TypeError, match="transform returned None"):
            next(forgetful)
    with pytest.raises(ValueError, match="transform=3 must be callable"):
        GPUCollator([], transform=3)  # type: ignore[arg-type]
    assert len(seen) == 7


@pytest.mark.parametrize("mode", ["pad", "list", "jagged"])
def test_sequences_are_cut(tmp_path: Path, store: GPUFeatureStore, mode: str) -> None:
    """Equal to cutting the features themselves."""
    paths = []
    for length in (1, 4, 9, 3):
        paths.append(str(tmp_path / f"{length}.pt"))
        torch.save({"x": torch.randn(length, 3), "n": torch.tensor(length)}, paths[-1])
    for source in (paths, paths[:1] * 3, paths[2:3] * 3):
        lister = PathLister(source, batch_size=4)
        [batch] = GPUCollator(GPUPrefetcher(lister, store), ragged=mode, max_length=4)
        expected = [torch.load(path)["x"][:4] for path in source]
        rows = batch["x"]
        if mode == "pad":
            assert rows.values.shape[1] == max(map(len, expected))
            rows = [row[:n] for row, n in zip(rows.values, rows.lengths, strict=True)]
        for row, one in zip(rows if mode == "list" else list(rows), expected, strict=True):
            assert torch.equal(row, one)


def test_padded_moves_as_a_whole(make_files: Files, store: GPUFeatureStore) -> None:
    padded = store.get_batch(make_files(2)).collate("pad")["feature"].to(torch.float64)
    assert padded.values.dtype is torch.float64
    assert padded.lengths.dtype is torch.int64 and padded.mask.dtype is torch.bool


def test_every_public_object_says_what_it_is(make_files: Files) -> None:
    paths = make_files(7)
    with GPUFeatureStore("cpu", max_cache_bytes="1g") as store:
        lister = PathLister(paths, batch_size=2, labels=list(range(7)), shuffle=True)
        shown = "PathLister(7 files with labels, batch_size=2, shuffle=True, seed=0)"
        assert repr(lister) == shown
        features = GPUPrefetcher(lister, store, depth=3)
        held = repr(store)
        assert repr(features) == f"GPUPrefetcher({shown}, {held}, depth=3)"
        batches = GPUCollator(features, ragged="pad")
        assert repr(batches) == f"GPUCollator({features!r}, ragged='pad')"
        loader = GPUCachedPathDataLoader(lister, store=store)
        assert repr(loader) == f"GPUCachedPathDataLoader({shown}, {held})"
        over_torch = GPUCachedPathDataLoader(DataLoader(paths), store=store)  # type: ignore[arg-type]
        assert repr(over_torch) == f"GPUCachedPathDataLoader(DataLoader, {held})"
        assert repr(Lockstep(paths)) == "Lockstep(IterableWrapper)"
        sharded = PathLister(paths, num_shards=2, shard_index=1)
        assert repr(sharded) == (
            "PathLister(7 files, shard 1 of 2, batch_size=None, shuffle=False, seed=0)"
        )
        pairs = PathLister({"a": paths, "b": paths}, batch_size=2)
        assert repr(pairs).startswith("PathLister(7 samples of a, b, batch_size=2")
        assert repr(PathLister(iter(paths))) == "PathLister(a stream, batch_size=None)"
        assert repr(FeaturePathDataset(paths)) == "FeaturePathDataset(7 files)"
        assert repr(Trace.epochs([paths])) == "Trace(7 requests of 7 files)"
        pending = store.request(paths)
        pending.wait()
        assert repr(pending) == "PendingBatch(7 files, 0 still loading)"
        assert repr(pending.result()) == "FeatureBatch(7 features on cpu)"
        assert repr(pending) == "PendingBatch(7 files, used)"
    for made in (store, loader):
        assert "object at 0x" not in repr(made)
    assert store._repr_html_().startswith("<b>GPUFeatureStore(cpu, ")


# What a loader is over


def test_options_that_there_are_not(make_files: Files) -> None:
    lister = PathLister(make_files(2), batch_size=2)
    for name, hint in (
        ("max_cache_byte", r"did you mean max_cache_bytes\?"),
        ("batch_size", "belongs to the PathLister or DataLoader"),
        ("shuffle", "belongs to the PathLister or DataLoader"),
        ("max_len", r"did you mean max_length\?"),
        ("xyz", "there are device, max_cache_bytes"),
    ):
        with pytest.raises(TypeError, match=f"has no option '{name}': .*{hint}"):
            GPUCachedPathDataLoader(lister, **{name: 1})  # type: ignore[misc]


def test_what_is_no_loader_of_paths(make_files: Files, store: GPUFeatureStore) -> None:
    paths = make_files(4)
    with pytest.raises(ValueError, match="yields single paths: give it a batch_size"):
        GPUCachedPathDataLoader(PathLister(paths), store=store)

    class Features(Dataset[Any]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, at: int) -> Any:
            return torch.load(paths[at])

    with pytest.raises(TypeError, match=r"a Features is no loader: wrap DataLoader\(dataset"):
        GPUCachedPathDataLoader(Features(), store=store)  # type: ignore[arg-type]
    loaded = GPUCachedPathDataLoader(DataLoader(Features(), batch_size=2), store=store)
    with pytest.raises(TypeError, match="let its dataset return paths"):
        next(iter(loaded))
    pairs: Any = [(path, number) for number, path in enumerate(paths)]
    labelled = GPUCachedPathDataLoader(DataLoader(pairs, batch_size=2), store=store)
    with pytest.raises(TypeError, match=r"path_extractor=lambda batch: batch\[0\]"):
        next(iter(labelled))
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"the loader is a table: wrap PathLister\(df"):
        GPUCachedPathDataLoader(pandas.DataFrame({"path": paths}), store=store)
    loader = GPUCachedPathDataLoader(PathLister(paths, batch_size=2), store=store)
    with pytest.raises(AttributeError, match="nor the PathLister in it has 'hit_rate'"):
        _ = loader.hit_rate
    with pytest.raises(AttributeError, match="skip_first_batches of accelerate does, resume by"):
        _ = loader.dataset
    with pytest.raises(ValueError, match="a state is a dict, not NoneType"):
        loader.load_state_dict(None)  # type: ignore[arg-type]


def test_samplers_yield_positions(make_files: Files) -> None:
    paths = make_files(5)
    for weights in ([1.0] * 5, torch.rand(5), [0.5, 2.7]):
        lister = PathLister(paths, sampler=weights)
        with pytest.raises(TypeError, match=r"no position of a file; of weights, .*Weighted"):
            lister.reset()
    with pytest.raises(ValueError, match="the sampler has 4 weights for 5 files"):
        PathLister(paths, sampler=WeightedRandomSampler([1.0] * 4, 5))
    for positions in ([0, 4], torch.tensor([0, 4]), np.array([0, 4])):
        lister = PathLister(paths, sampler=positions)  # type: ignore[arg-type]
        lister.reset()
        assert [next(lister), next(lister)] == [paths[0], paths[4]]


def test_numbers_that_are_missing(make_files: Files) -> None:
    with pytest.raises(ValueError, match=r"1 of 3 labels are None among numbers.*position 1"):
        PathLister(make_files(3), labels=[1, None, 2])
    assert PathLister(make_files(3), labels=["a", None, "b"])
    with pytest.raises(ValueError, match="list the paths of that part"):
        PathLister(str(Path(make_files(3)[0]).parent), labels={"none": 3})


def test_dtypes_by_name(make_files: Files) -> None:
    for name in ("bfloat16", "torch.bfloat16"):
        with GPUFeatureStore("cpu", dtype=name) as store:  # type: ignore[arg-type]
            assert store.get(make_files(1)[0])["feature"].dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype='bf16' .* such as torch\.bfloat16"):
        GPUFeatureStore("cpu", dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a size is for max_cache_bytes="):
        GPUFeatureStore("2GB")


def test_a_closed_store_says_so(store: GPUFeatureStore) -> None:
    store.close()
    assert repr(store) == "GPUFeatureStore(cpu, closed)"


def test_what_is_no_source_of_features() -> None:
    with pytest.raises(ValueError, match=r"source=.* must be an object with .*, not the class"):
        GPUFeatureStore("cpu", source=RowFiles)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lacks absolute, key, are_keys, is_link, open, version"):
        GPUFeatureStore("cpu", source=object())  # type: ignore[arg-type]


def test_epochs_are_numbers(make_files: Files) -> None:
    lister = PathLister(make_files(2))
    for wrong in ("x", -1, 1.5, None):
        with pytest.raises(ValueError, match="epoch="):
            lister.set_epoch(wrong)  # type: ignore[arg-type]


def test_policies_are_registered_as_classes() -> None:
    with pytest.raises(ValueError, match="register the class"):
        register("mine", make_policy("lru"))  # type: ignore[arg-type]


def test_a_capacity_in_bytes_needs_sizes() -> None:
    with pytest.raises(ValueError, match="capacity='1KiB' is in bytes, which needs sizes="):
        simulate("ab", "1KiB", "lru")


def test_samplers_that_know_nothing_of_ranks(
    make_files: Files, monkeypatch: pytest.MonkeyPatch, store: GPUFeatureStore
) -> None:
    paths = make_files(4)
    lister = PathLister(paths, sampler=RandomSampler(range(4)), batch_size=2)
    early = GPUCachedPathDataLoader(DataLoader(paths, batch_size=2), store=store)
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "find_rank", lambda: (2, 0))
        patch.setattr(checks, "find_rank", lambda: (2, 0))
        with pytest.warns(UserWarning, match="2 ranks may read all files of this PathLister"):
            lister.reset()
        lister.reset()  # once
        with pytest.warns(UserWarning, match="2 ranks may read all files of this DataLoader"):
            next(iter(early))
        assert len(list(early)) == 2
