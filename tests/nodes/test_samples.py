"""Samples of several files: each part is gathered by itself, and they stay together."""

import glob
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, default_collate
from torchdata.nodes import Loader, Mapper

from gpucache_pipes import (
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    PathLister,
)
from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.device import AcceleratorBackend
from gpucache_pipes.files import PathList, Paths, Samples
from gpucache_pipes.nodes import prefetcher
from gpucache_pipes.testing import SimulatedRuntime, assert_same

FILES = 11


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two directories of files that go together by name; features say which sample they are of."""
    for part in ("video", "audio"):
        (tmp_path / part).mkdir()
    for number in range(FILES):
        name = f"clip_{number:02d}.pt"
        frames = torch.full((number % 3 + 1, 4), float(number))
        torch.save({"frames": frames, "fps": 25 + number}, tmp_path / "video" / name)
        torch.save(torch.full((6,), float(number)), tmp_path / "audio" / name)
    return tmp_path


@pytest.fixture
def store() -> Any:
    with GPUFeatureStore("cpu") as made:
        yield made


def columns(root: Path) -> dict[str, list[str]]:
    return {
        part: sorted(str(path) for path in (root / part).iterdir()) for part in ("video", "audio")
    }


def ids(batch: Any) -> list[int]:
    """Which samples the features of a collated batch are of; both parts say the same."""
    audio = batch["audio"][:, 0].tolist()
    assert [float(frames[0, 0]) for frames in batch["video"]["frames"]] == audio
    assert batch["video"]["fps"].tolist() == [25 + number for number in audio]
    return [int(number) for number in audio]


def loader(store: GPUFeatureStore, source: Any, **options: Any) -> GPUCachedPathDataLoader:
    return GPUCachedPathDataLoader(
        PathLister(source, batch_size=3, **options), store=store, ragged={"frames": "list"}
    )


@pytest.mark.parametrize("form", ["directories", "globs", "columns", "rows", "arrays", "series"])
def test_sources(root: Path, store: GPUFeatureStore, form: str) -> None:
    known = columns(root)
    source: Any = known
    if form == "directories":
        source = {part: root / part for part in known}
    elif form == "globs":
        source = {part: f"{root}/{part}/*.pt" for part in known}
    elif form == "rows":
        source = [{"video": v, "audio": a} for v, a in zip(*known.values(), strict=True)]
    elif form == "arrays":
        source = {part: np.array(paths) for part, paths in known.items()}
    elif form == "series":
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(known)
        source = {part: frame[part] for part in known}
    batches = loader(store, source)
    assert len(batches) == 4
    assert [ids(batch) for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    assert store.stats().files_read == 2 * FILES


@pytest.mark.parametrize("make", [tuple, list, np.array])
def test_tuples(root: Path, store: GPUFeatureStore, make: Callable[[Any], Any]) -> None:
    rows = [make(row) for row in zip(*columns(root).values(), strict=True)]
    for source in (rows, np.array(rows)):
        lister = PathLister(source, batch_size=4)
        features = next(iter(GPUPrefetcher(lister, store)))
        video, audio = features[1]
        assert video["fps"] == 26 and audio.tolist() == [1.0] * 6
        video, audio = features.collate({"frames": "list"})
        assert audio.shape == (4, 6) and len(video["frames"]) == 4


def test_equals_reading_the_files(root: Path, store: GPUFeatureStore) -> None:
    first, second = (
        PathLister(columns(root), batch_size=4, shuffle=True, seed=1) for _ in range(2)
    )
    for samples, batch in zip(Loader(first), Loader(GPUPrefetcher(second, store)), strict=True):
        expected = [{part: torch.load(path) for part, path in row.items()} for row in samples]
        assert_same(list(batch), expected)
        assert batch.paths == list(samples) and len(batch) == len(expected)
        audio = [row["audio"] for row in expected]
        assert_same(batch.collate({"frames": "list"})["audio"], default_collate(audio))
        assert "samples of video, audio on cpu" in repr(batch)


def test_files_that_samples_share(root: Path, store: GPUFeatureStore) -> None:
    """Such as one image with several captions: it is read once."""
    known = columns(root)
    source = {"video": [known["video"][0]] * 5, "audio": known["audio"][:5]}
    for batch in loader(store, source):
        assert batch["video"]["fps"].tolist() == [25] * len(batch["audio"])
    assert store.stats().files_read == 6


def test_ragged_by_part(root: Path, store: GPUFeatureStore) -> None:
    lister = PathLister(columns(root), batch_size=FILES)
    [features] = GPUPrefetcher(lister, store)
    for ragged in ({"frames": "pad"}, {"video": "pad"}, {"['video']['frames']": "pad"}):
        batch = next(iter(GPUCollator(GPUPrefetcher(lister, store), ragged=ragged)))
        assert batch["video"]["frames"].values.shape == (FILES, 3, 4)
        assert batch["audio"].shape == (FILES, 6)
    assert features.collate("pad")["audio"].values.shape == (FILES, 6)
    with pytest.raises(RuntimeError, match=r"cannot stack \['frames'\].*clip_00"):
        features.collate()


def test_labels_follow_samples(root: Path, store: GPUFeatureStore) -> None:
    by_name = {f"clip_{number:02d}": number for number in range(FILES)}
    directories = {part: root / part for part in ("video", "audio")}
    for source, labels in ((directories, by_name), (columns(root), list(range(FILES)))):
        for batch, label in loader(store, source, labels=labels, shuffle=True):
            assert ids(batch) == label.tolist()


@given(data=st.data())
def test_samples_are_like_a_list(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    parts: Any = data.draw(st.sampled_from([("a", "b"), (0, 1, 2)]))
    paths = [f"{part}{n}" for part in parts for n in range(count)]
    files = PathList(paths, parts=parts)
    at = data.draw(st.lists(st.integers(0, count - 1), max_size=6))
    rows = [[f"{part}{n}" for part in parts] for n in at]
    expected = [dict(zip(parts, r, strict=True)) if parts[0] == "a" else tuple(r) for r in rows]
    samples = Samples.pick(files, np.array(at, np.intp))
    assert samples == expected and list(samples) == expected and len(samples) == len(expected)
    assert [samples[n] for n in range(len(at))] == expected
    cut = data.draw(st.slices(len(at)))
    assert samples[cut] == expected[cut]
    assert pickle.loads(pickle.dumps(samples)) == expected
    left_out = data.draw(st.sets(st.integers(0, max(0, len(samples.paths) - 1)), max_size=3))
    if at:
        lost = {position % len(at) for position in left_out}
        kept = [row for n, row in enumerate(expected) if n not in lost]
        assert samples.without(left_out) == kept
        assert Samples.of(expected) == expected
        assert isinstance(samples.without(left_out).paths, Paths)


@pytest.mark.parametrize("batches", [False, True])
def test_the_announced_order_is_that_of_the_requests(
    root: Path, store: GPUFeatureStore, batches: bool
) -> None:
    count = range(FILES)
    options: dict[str, Any] = {"batch_size": 3, "shuffle": True}
    if batches:
        options = {"sampler": BatchSampler(RandomSampler(count), 4, drop_last=False)}
    lister = PathLister(columns(root), **options)
    lister.reset()
    announced = lister.upcoming()
    requested = [path for samples in lister for path in samples.paths]
    assert list(announced)[: announced.left] == requested
    assert len(announced) == 2 * announced.left


def test_half_of_the_samples_fit(root: Path) -> None:
    with GPUFeatureStore("cpu", max_cache_items=FILES) as store:
        batches = loader(store, columns(root), shuffle=True)
        list(batches)
        before = store.stats()
        for _ in range(4):
            list(batches)
        assert store.stats().since(before).hit_rate >= 0.49
        store.check()


def test_resuming_is_exact(root: Path, store: GPUFeatureStore) -> None:
    def made() -> GPUCachedPathDataLoader:
        return loader(store, columns(root), shuffle=True, seed=5, labels=list(range(FILES)))

    expected = [ids(batch) for batch, _ in made()]
    for stop in range(1, 4):
        first = made()
        iterator = iter(first)
        got = [ids(next(iterator)[0]) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        second = made()
        second.load_state_dict(state)
        for batch, label in second:
            assert ids(batch) == label.tolist()
            got.append(ids(batch))
        assert got == expected


def test_shards_and_buckets(root: Path, store: GPUFeatureStore) -> None:
    seen = []
    for rank in range(2):
        options: Any = {"num_shards": 2, "shard_index": rank, "shard": "static", "shuffle": True}
        lister = PathLister(columns(root), batch_size=3, bucket_by="file_size", **options)
        assert len(lister.own_paths()) == 2 * 6
        batches = GPUCachedPathDataLoader(lister, store=store, ragged={"frames": "list"})
        seen += [number for batch in batches for number in ids(batch)]
    assert set(seen) == set(range(FILES))

    def length(sample: Any) -> float:
        return os.path.getsize(sample["audio"])

    assert len(PathLister(columns(root), batch_size=3, bucket_by=length)) == 4
    assert store.warm(PathLister(columns(root), batch_size=2)) == 2 * FILES


@pytest.mark.parametrize("part", ["video", "audio"])
def test_a_file_that_fails_takes_its_sample_along(
    root: Path, store: GPUFeatureStore, part: str
) -> None:
    known = columns(root)
    Path(known[part][4]).write_bytes(b"broken")
    batches = loader(store, known, labels=list(range(FILES)))
    with pytest.raises(Exception, match="clip_04"):
        list(batches)
    lister = PathLister(known, batch_size=3, labels=list(range(FILES)))
    skipping = GPUCachedPathDataLoader(
        lister, store=store, on_error="skip", ragged={"frames": "list"}
    )
    seen = []
    for batch, label in skipping:
        assert ids(batch) == label.tolist()
        seen += label.tolist()
    assert seen == [n for n in range(FILES) if n != 4]

    def substitute(path: str, error: Exception) -> Any:
        other = known[part][7]
        return torch.load(other)

    replacing = GPUPrefetcher(lister, store, on_error=substitute)
    rows = [row for features, labels in replacing for row in features]
    assert len(rows) == FILES
    video, audio = rows[4]["video"]["fps"] - 25, rows[4]["audio"][0]
    assert sorted([video, int(audio)]) == [4, 7]


def test_a_sample_of_which_both_files_fail(root: Path, store: GPUFeatureStore) -> None:
    known = columns(root)
    for part in known:
        Path(known[part][4]).write_bytes(b"broken")
    asked = []

    def on_error(path: str, error: Exception) -> Any:
        asked.append(Path(path).parent.name)
        return torch.zeros(6) if "audio" in path else None  # the other part is left out

    lister = PathLister(known, batch_size=5)
    batches = [list(batch) for batch in GPUPrefetcher(lister, store, on_error=on_error)]
    assert list(map(len, batches)) == [4, 5, 1] and sorted(asked) == ["audio", "video"]
    store.check()


def test_loaders_of_rows(root: Path, store: GPUFeatureStore) -> None:
    """A DataLoader collates rows of two paths and a label to a dict of columns."""
    known = columns(root)
    rows = [
        {"video": v, "audio": a, "label": n}
        for n, (v, a) in enumerate(zip(*known.values(), strict=True))
    ]

    def extract(batch: Any) -> Any:
        return {part: batch[part] for part in known}

    joined = GPUCachedPathDataLoader(
        DataLoader(rows, batch_size=4, shuffle=True),  # type: ignore[arg-type]
        store=store,
        path_extractor=extract,
        ragged={"frames": "list"},
    )
    for batch, original in joined:
        assert ids(batch) == original["label"].tolist()
    only_paths = [{part: row[part] for part in known} for row in rows]
    plain = GPUCachedPathDataLoader(
        DataLoader(only_paths, batch_size=4),  # type: ignore[arg-type]
        store=store,
        ragged={"frames": "list"},
    )
    assert [n for batch in plain for n in ids(batch)] == list(range(FILES))
    # A node between that makes lists of rows.
    listed = Mapper(PathLister(known, batch_size=4), list)
    collated = GPUCollator(GPUPrefetcher(listed, store), ragged={"frames": "list"})
    assert [n for batch in collated for n in ids(batch)] == list(range(FILES))


def test_a_change_of_directory(
    root: Path, store: GPUFeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    batches = loader(store, {"video": "video", "audio": "audio"})
    first = next(iter(batches))
    monkeypatch.chdir("/")
    assert ids(first) == [0, 1, 2]
    assert [n for batch in batches for n in ids(batch)] == list(range(FILES))


def test_what_does_not_fit_together(root: Path, store: GPUFeatureStore) -> None:
    known = columns(root)
    short = {"video": known["video"], "audio": known["audio"][:-1]}
    with pytest.raises(ValueError, match="there are 11 of 'video', 10 of 'audio'"):
        PathLister(short, batch_size=2)
    with pytest.raises(ValueError, match="give a batch_size"):
        PathLister(known)
    unbatched = PathLister(known, sampler=range(3))
    unbatched.reset()
    with pytest.raises(ValueError, match="give a batch_size"):
        next(unbatched)
    with pytest.raises(ValueError, match="columns for all parts"):
        PathLister({"video": known["video"], "audio": root / "audio"}, batch_size=2)
    with pytest.raises(ValueError, match="does not have the files of"):
        PathLister([{"video": "a.pt", "audio": "b.pt"}, {"video": "a.pt"}], batch_size=2)
    with pytest.raises(ValueError, match="does not have the files of"):
        PathLister([("a.pt", "b.pt"), ("a.pt",)], batch_size=2)
    with pytest.raises(
        TypeError,
        match=r"'cat', which is 1 of a sample, does not look like a path.*labels=\[\.\.\.\]",
    ):
        PathLister([("a.pt", "cat"), ("b.pt", "dog")], batch_size=2)
    with pytest.raises(FileNotFoundError, match="empty"):
        PathLister({}, batch_size=2)
    with pytest.raises(TypeError, match=r"'a\.pt' is 'cat'.*the dict as labels="):
        PathLister({"a.pt": "cat"}, batch_size=2)
    os.rename(known["audio"][3], root / "audio" / "other.pt")
    with pytest.raises(ValueError, match=r"1 of 11 files of 'video'.*'audio'.*clip_03\.pt'"):
        PathLister({part: root / part for part in known}, batch_size=2)
    batches = [store.request(Samples.of(known)[:2]) for _ in range(2)]
    with pytest.raises(ValueError, match="one by one"):
        store.collect(batches)


def test_what_is_no_sample(root: Path, store: GPUFeatureStore) -> None:
    for source in ([{}], [()]):
        with pytest.raises(FileNotFoundError, match="the samples have no files"):
            PathLister(source, batch_size=2)
    for other in (None, "c.pt", {"a": "b.pt"}, 3):
        with pytest.raises(ValueError, match="does not have the files of"):
            PathLister([("a.pt", "b.pt"), other], batch_size=2)
    with pytest.raises(TypeError, match=r"but 'video' is \{'a.pt': 1\}"):
        PathLister({"video": {"a.pt": 1}, "audio": {"a.pt": 1}}, batch_size=2)
    # Names that no file has, for a load_fn.
    assert len(PathLister([{"v": "clip1", "a": "clip1"}], batch_size=2)) == 1
    short = {part: paths[:4] for part, paths in columns(root).items()}
    batches = GPUCachedPathDataLoader(
        PathLister(short, batch_size=4), store=store, ragged={"audio": "pad"}
    )
    with pytest.raises(RuntimeError, match=r"part 'video' of samples: cannot stack \['frames'\]"):
        next(iter(batches))


def test_modes_of_parts_that_are_numbered(root: Path, store: GPUFeatureStore) -> None:
    rows = list(zip(*columns(root).values(), strict=True))
    lister = PathLister(rows, batch_size=4)
    for ragged in ({0: "pad"}, {"[0]": "pad"}, {"[0]['frames']": "pad"}):
        batches = GPUCollator(GPUPrefetcher(lister, store), ragged=ragged)  # type: ignore[arg-type]
        video, audio = next(iter(batches))
        assert video["frames"].values.shape[0] == 4 and audio.shape == (4, 6)


def test_a_mode_is_for_its_part(tmp_path: Path, store: GPUFeatureStore) -> None:
    """A part may have the name of a leaf of another part."""
    for name in ("x", "y"):
        torch.save({"x": torch.ones(2, 3)}, tmp_path / f"{name}.pt")
    lister = PathLister({name: [tmp_path / f"{name}.pt"] for name in ("x", "y")}, batch_size=1)
    batch = next(iter(GPUCollator(GPUPrefetcher(lister, store), ragged={"x": "pad"})))
    assert batch["y"]["x"].shape == (1, 2, 3) and batch["x"]["x"].values.shape == (1, 2, 3)


def test_parts_are_cropped_at_one_place(tmp_path: Path, store: GPUFeatureStore) -> None:
    for part in ("video", "audio"):
        (tmp_path / part).mkdir()
        for number in range(8):
            torch.save(torch.arange(20 + number), tmp_path / part / f"{number}.pt")
    source = {part: tmp_path / part for part in ("video", "audio")}
    for nodes in (
        GPUCachedPathDataLoader(
            PathLister(source, batch_size=8), store=store, ragged="pad", max_length=5, crop="random"
        ),
        [
            features.collate(RaggedOptions("pad", max_length=5, crop="random"))
            for features in GPUPrefetcher(PathLister(source, batch_size=8), store)
        ],
    ):
        [batch] = nodes
        assert batch["video"].values.tolist() == batch["audio"].values.tolist()
        assert len(set(batch["video"].values[:, 0].tolist())) > 1


def test_calls_of_the_store_take_samples(root: Path, store: GPUFeatureStore) -> None:
    lister = PathLister(columns(root), batch_size=4)
    assert store.warm(lister.paths) == 2 * FILES
    rows = list(lister.paths[:3])
    for asked in (lister.paths[:3], rows, {part: [r[part] for r in rows] for part in rows[0]}):
        assert [row["video"]["fps"] for row in store.get_batch(asked)] == [25, 26, 27]
    store.prefetch(lister.paths)
    store.release(lister.paths)
    assert len(store) == 0


@pytest.mark.parametrize("name", ["plain", "b[1]", "two words"])
def test_globs_that_name_one_directory(tmp_path: Path, store: GPUFeatureStore, name: str) -> None:
    """Escaped characters, double separators and files are no part of the names that match."""
    home = tmp_path / name
    for part in ("v", "a"):
        (home / part).mkdir(parents=True)
        for number in range(2):
            torch.save(torch.tensor(number), home / part / f"{number}.pt")
    escaped = glob.escape(str(home))
    for form in ("{}/{}/*.pt", "{}//{}/*.pt", "{}/{}/./[0-9].pt"):
        source = {part: form.format(escaped, part) for part in ("v", "a")}
        assert len(PathLister(source, batch_size=2).paths) == 2
    one = {part: f"{home}/{part}/0.pt" for part in ("v", "a")}
    assert list(PathLister(one, batch_size=2).paths) == [one]


def test_states_know_samples_wherever_they_are(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    first = PathLister({"video": "video", "audio": "audio"}, batch_size=3)
    first.reset()
    next(first)
    state = first.state_dict()
    second = PathLister({part: root / part for part in ("video", "audio")}, batch_size=3)
    second.reset(state)
    assert len(list(second)) == 3


def test_dicts_that_look_like_states(root: Path, store: GPUFeatureStore) -> None:
    """A source of the user's may have columns of any names."""
    known = columns(root)
    elements = [{"parts": known["video"][:2], "paths": known["audio"][:2]}]
    elements.append({"parts": ["missing1.pt"], "paths": ["missing2.pt"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetcher, "find_rank", lambda: (2, 0))
        node = GPUPrefetcher(elements, store, on_error="skip")
        node.reset()
        expected = list(next(node))
        state = json.loads(json.dumps(node.state_dict()))
        resumed = GPUPrefetcher(elements, store, on_error="skip")
        resumed.reset(state)
        assert_same(list(next(resumed)), expected)


def test_loaders_of_rows_leave_one_sample_out(root: Path, store: GPUFeatureStore) -> None:
    known = columns(root)
    Path(known["audio"][1]).write_bytes(b"broken")
    rows = [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
    loaded = GPUCachedPathDataLoader(
        DataLoader(rows, batch_size=4),  # type: ignore[arg-type]
        store=store,
        on_error="skip",
        ragged={"frames": "list"},
    )
    assert [n for batch in loaded for n in ids(batch)] == [n for n in range(FILES) if n != 1]


def test_parts_of_other_formats(root: Path, store: GPUFeatureStore) -> None:
    """Names match whatever their endings are, in subdirectories as well."""
    (root / "text" / "deep").mkdir(parents=True)
    (root / "video" / "deep").mkdir()
    for number in range(3):
        np.save(root / "text" / "deep" / f"{number}.npy", np.full(5, number))
        torch.save(torch.tensor(number), root / "video" / "deep" / f"{number}.pt")
    source = {"video": f"{root}/video/deep/*.pt", "text": f"{root}/text/**/*.npy"}
    with pytest.raises(ValueError, match="no file of that name"):
        PathLister(source, batch_size=2)  # one is deep/0, the other 0
    source = {"video": f"{root}/video/**/[0-9].pt", "text": f"{root}/text/**/*.npy"}
    [batch] = GPUCachedPathDataLoader(PathLister(source, batch_size=3), store=store)
    assert batch["video"].tolist() == batch["text"][:, 0].tolist() == [0, 1, 2]


def test_a_warm_batch_takes_a_few_operations(root: Path) -> None:
    """One gather for each leaf of each part, however many samples there are."""
    known = columns(root)
    for path in known["video"]:
        torch.save({"frames": torch.ones(2, 4), "fps": torch.tensor(3.0)}, path)
    counts = []
    for size in (2, 8):
        runtime = SimulatedRuntime(0, haste=0)
        with GPUFeatureStore(AcceleratorBackend(runtime)) as store:
            lister = PathLister(known, batch_size=size)
            batches = GPUCollator(GPUPrefetcher(lister, store, depth=1))
            list(batches)
            before = runtime.operations
            batches.reset()
            next(batches)
            counts.append(runtime.operations - before)
    assert counts[0] == counts[1] <= 8
