"""Labels of a PathLister come with the features, whatever happens to these."""

import copy
import gc
import json
import os
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate
from torchdata.nodes import Batcher, Loader, Mapper, Prefetcher, Unbatcher

from gpucache_pipes import (
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    PathLister,
)
from gpucache_pipes.nodes import prefetcher
from gpucache_pipes.nodes.labels import Labels
from gpucache_pipes.testing import assert_same

FILES = 11


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Files whose features say which they are."""
    made = []
    for number in range(FILES):
        made.append(str(tmp_path / f"clip_{number:02d}.pt"))
        torch.save({"x": torch.full((number % 3 + 1, 2), float(number))}, made[-1])
    return made


@pytest.fixture
def store() -> Any:
    with GPUFeatureStore("cpu") as made:
        yield made


def ids(features: Any) -> list[int]:
    """Which files the features of a batch are of."""
    x = features["x"]
    rows = x.unpad() if hasattr(x, "unpad") else x
    return [int(row.flatten()[0]) for row in rows]


def pipeline(store: GPUFeatureStore, *args: Any, **options: Any) -> GPUCollator:
    return GPUCollator(GPUPrefetcher(PathLister(*args, **options), store), ragged="list")


# What comes out

KINDS: dict[str, Callable[[], Any]] = {
    "a list": lambda: [3 * n for n in range(FILES)],
    "floats": lambda: [n / 2 for n in range(FILES)],
    "flags": lambda: [n % 2 == 0 for n in range(FILES)],
    "strings": lambda: [f"label {n}" for n in range(FILES)],
    "an array": lambda: np.arange(FILES, dtype=np.float32) * 3,
    "strings of numpy": lambda: np.array([f"label {n}" for n in range(FILES)]),
    "rows": lambda: np.arange(2 * FILES).reshape(FILES, 2),
    "tuples": lambda: [(n, f"label {n}", n / 4) for n in range(FILES)],
    "dicts": lambda: [{"y": n, "speaker": f"s{n}"} for n in range(FILES)],
    "tensors": lambda: [torch.full((2,), n) for n in range(FILES)],
    "a tensor": lambda: torch.arange(FILES) * 3,
    "numbers of numpy": lambda: list(np.arange(FILES, dtype=np.int16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_collated_as_default_collate_does(
    paths: list[str], store: GPUFeatureStore, kind: str
) -> None:
    labels = KINDS[kind]()
    for batch, found in pipeline(store, paths, labels=labels, batch_size=4, shuffle=True):
        mine = [labels[number] for number in ids(batch)]
        expected: Any = list(map(str, mine)) if "strings" in kind else default_collate(mine)
        if kind == "tuples":
            expected[1] = list(expected[1])
        assert_same(found, expected)


def test_columns_come_as_a_dict(paths: list[str], store: GPUFeatureStore) -> None:
    columns = {"y": list(range(FILES)), "name": [f"n{n}" for n in range(FILES)]}
    for batch, labels in pipeline(store, paths, labels=columns, batch_size=4):
        assert labels["y"].tolist() == ids(batch)
        assert labels["name"] == [f"n{n}" for n in ids(batch)]


def test_tables_of_pandas(paths: list[str], store: GPUFeatureStore) -> None:
    pd = pytest.importorskip("pandas")
    names = [f"clip_{n:02d}" for n in range(FILES)]
    table = pd.DataFrame({"y": range(FILES), "who": [f"w{n}" for n in range(FILES)]}, index=names)
    directory = os.path.dirname(paths[0])
    for source, given_labels in (
        (directory, table.sample(frac=1, random_state=0)),
        (paths, table.reset_index(drop=True)),
    ):
        for batch, labels in pipeline(store, source, labels=given_labels, batch_size=4):
            assert labels["y"].tolist() == ids(batch)
            assert labels["who"] == [f"w{n}" for n in ids(batch)]
    for batch, labels in pipeline(store, directory, labels=table["y"][::-1], batch_size=4):
        assert labels.tolist() == ids(batch)
    with pytest.raises(ValueError, match="go by name"):
        PathLister(directory, labels=table.reset_index(drop=True))


@pytest.mark.parametrize("way", ["path", "name", "stem", "function"])
def test_labels_by_name(tmp_path: Path, store: GPUFeatureStore, paths: list[str], way: str) -> None:
    """Files that have labels and are not there do no harm."""
    names: dict[str, Callable[[str], str]] = {
        "path": str,
        "name": os.path.basename,
        "stem": lambda path: Path(path).stem,
    }
    labels: Any = {"other": -1, "other.pt": -2}
    if way == "function":
        labels = lambda path: int(Path(path).stem[-2:])  # noqa: E731
    else:
        labels |= {names[way](path): number for number, path in enumerate(paths)}
    for source in (str(tmp_path), paths, f"{tmp_path}/*.pt"):
        for batch, found in pipeline(store, source, labels=labels, batch_size=4, shuffle=True):
            assert found.tolist() == ids(batch)


def test_names_below_the_directory(tmp_path: Path, store: GPUFeatureStore) -> None:
    for number, name in enumerate(("a/x", "b/x", "b/y")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"x": torch.full((1, 2), float(number))}, tmp_path / f"{name}.pt")
    options: dict[str, Any] = {"recursive": True, "batch_size": 2}
    for names in (("a/x.pt", "b/x.pt", "b/y.pt"), ("a/x", "b/x", "b/y")):
        labels = {name: number for number, name in enumerate(names)}
        for batch, found in pipeline(store, tmp_path, labels=labels, **options):
            assert found.tolist() == ids(batch)
    with pytest.raises(ValueError, match="one name"):
        PathLister(tmp_path, labels={"x.pt": 0, "y.pt": 1}, **options)


def test_a_file_that_is_added_shifts_no_label(tmp_path: Path, paths: list[str]) -> None:
    labels = {os.path.basename(path): number for number, path in enumerate(paths)}
    torch.save(torch.ones(1), tmp_path / "a first one.pt")
    with pytest.raises(ValueError, match=r"1 of 12 files have no label.*a first one\.pt"):
        PathLister(tmp_path, labels=labels)
    with pytest.raises(ValueError, match="go by name"):
        PathLister(tmp_path, labels=list(range(12)))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([1, 2], ValueError, "2 labels for 11 files"),
        ("abc", TypeError, "labels='abc'"),
        (7, TypeError, "labels=7"),
        ({"clip_00": 1}, ValueError, "10 of 11 files have no label.*'clip_01'"),
        ([{"a": 1}] * 10 + [{"b": 1}], ValueError, "same keys"),
        ([(1, 2)] * 10 + [(1,)], ValueError, "same length"),
    ],
)
def test_wrong_labels(paths: list[str], labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PathLister(paths, labels=labels)


def test_a_stream_has_no_labels() -> None:
    with pytest.raises(ValueError, match="known list"):
        PathLister(iter(["a.pt"]), labels=[1])


# Whatever happens to the features

labelled = {"y": list(range(FILES)), "s": [f"s{n}" for n in range(FILES)]}


@given(
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["batches", "singles", "loader"]),
    st.sets(st.integers(0, FILES - 1), max_size=5),
    st.sampled_from(["skip", "replace"]),
    st.integers(0, 3),
)
def test_each_feature_comes_with_its_label(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    shuffle: bool,
    bucket: bool,
    kind: str,
    damaged: set[int],
    on_error: str,
    stop: int,
) -> None:
    """Over two epochs, the second of which is left and resumed."""
    directory = tmp_path_factory.mktemp("files")
    paths = []
    for number in range(FILES):
        paths.append(str(directory / f"{number}.pt"))
        torch.save({"x": torch.full((number % 3 + 1, 2), float(number))}, paths[-1])
        if number in damaged:
            os.truncate(paths[-1], 100)
    number_of = {path: number for number, path in enumerate(paths)}
    substitute = lambda path, error: {"x": torch.full((1, 2), 100.0 + number_of[path])}  # noqa: E731
    tolerant: dict[str, Any] = {"on_error": "skip" if on_error == "skip" else substitute}
    present = [n for n in range(FILES) if n not in damaged or on_error == "replace"]

    def make(store: GPUFeatureStore) -> Any:
        lister = PathLister(
            paths,
            labels=labelled,
            shuffle=shuffle,
            batch_size=None if kind == "singles" else size,
            bucket_by="file_size" if bucket and kind != "singles" else None,
        )
        if kind == "loader":
            return GPUCachedPathDataLoader(lister, store=store, ragged="list", **tolerant)
        batch_size = size if kind == "singles" else None
        features = GPUPrefetcher(lister, store, **tolerant)
        return Loader(GPUCollator(features, ragged="list", batch_size=batch_size))

    def check(batch: Any) -> list[int]:
        features, labels = batch
        found = [number % 100 for number in ids(features)]
        assert labels["y"].tolist() == found
        assert labels["s"] == [f"s{n}" for n in found]
        assert all((n >= 100) == (n % 100 in damaged) for n in ids(features))
        return found

    with GPUFeatureStore("cpu") as store:
        loader = make(store)
        seen = [n for batch in loader for n in check(batch)]
        assert sorted(seen) == present
        iteration = iter(loader)
        seen = []
        for _, batch in zip(range(stop), iteration, strict=False):
            seen += check(batch)
        state = pickle.loads(pickle.dumps(copy.deepcopy(loader.state_dict())))
        other = make(store)
        other.load_state_dict(state)
        seen += [n for batch in other for n in check(batch)]
        # A state from the end of an epoch goes on with the next one.
        assert sorted(seen) in (present, sorted(present * 2))


def test_single_features(paths: list[str], store: GPUFeatureStore) -> None:
    seen = []
    for feature, label in GPUPrefetcher(PathLister(paths, labels=labelled, shuffle=True), store):
        number = int(feature["x"][0, 0])
        assert label["y"].item() == number and label["s"] == f"s{number}"
        label["y"].fill_(-1)  # it is the consumer's
        seen.append(number)
    assert sorted(seen) == list(range(FILES))
    for batch, labels in pipeline(store, paths, labels=labelled, batch_size=FILES):
        assert labels["y"].tolist() == ids(batch) == list(range(FILES))


def test_shards_and_samplers(paths: list[str], store: GPUFeatureStore) -> None:
    seen: Counter[int] = Counter()
    for index in range(3):
        shard = {"num_shards": 3, "shard_index": index}
        for batch, labels in pipeline(store, paths, labels=labelled, batch_size=2, **shard):
            assert labels["y"].tolist() == ids(batch)
            seen.update(ids(batch))
    assert set(seen) == set(range(FILES))
    for batch, labels in pipeline(store, paths, labels=labelled, sampler=[[3, -1], [0]]):
        assert labels["y"].tolist() == ids(batch)


def test_stacked_and_padded(paths: list[str], store: GPUFeatureStore) -> None:
    lister = PathLister(paths, labels=labelled, batch_size=4)
    for batch, labels in GPUCollator(GPUPrefetcher(lister, store), ragged="pad"):
        assert batch["x"].values[:, 0, 0].tolist() == labels["y"].tolist()
    alike = PathLister(paths[::3], labels=list(range(0, FILES, 3)), batch_size=2)
    for batch, labels in GPUCollator(GPUPrefetcher(alike, store)):
        assert batch["x"][:, 0, 0].tolist() == labels.tolist()


def test_own_functions(paths: list[str], store: GPUFeatureStore) -> None:
    lister = PathLister(paths, labels=labelled, batch_size=4)
    collated = GPUCollator(GPUPrefetcher(lister, store), collate_fn=len)
    assert [(count, len(labels["y"])) for count, labels in collated] == [(4, 4), (4, 4), (3, 3)]
    with GPUCachedPathDataLoader(
        PathLister(paths, labels=labelled, batch_size=4),
        store=store,
        ragged="list",
        build_batch_fn=lambda batch, original, files: (batch, list(original) == list(files)),
    ) as loader:
        for (batch, labels), same in loader:
            assert same and labels["y"].tolist() == ids(batch)


def test_relative_paths_after_a_change_of_directory(
    paths: list[str], store: GPUFeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lister = PathLister([os.path.basename(path) for path in paths], labels=labelled, batch_size=4)
    (tmp_path / "elsewhere").mkdir()
    for batch, labels in GPUCollator(GPUPrefetcher(lister, store), ragged="list"):
        assert labels["y"].tolist() == ids(batch)
        monkeypatch.chdir(tmp_path / "elsewhere")


def test_labels_pickle() -> None:
    labels = Labels.of(labelled, [f"{n}.pt" for n in range(FILES)], "", True)
    again = pickle.loads(pickle.dumps(labels))
    assert len(again) == FILES
    rows = again.rows(np.array([3, 1]), torch.device("cpu"))
    assert rows["y"].tolist() == [3, 1] and rows["s"] == ["s3", "s1"]


# What labels could be confused with, and where they could be lost


def test_a_dict_by_name_is_no_dict_of_columns(paths: list[str]) -> None:
    """Although each of its values has as many entries as there are files."""
    device = torch.device("cpu")
    files = paths[:2]
    by_name = {"clip_00": [1, 2], "clip_01": [3, 4]}
    for labels in (by_name, {name: {"a": 1, "b": 2} for name in by_name}):
        found = Labels.of(labels, files, "", True).rows(np.array([1]), device)
        expected = torch.tensor([[3, 4]]) if labels is by_name else None
        if expected is not None:
            assert torch.equal(found, expected)
        else:
            assert {name: column.tolist() for name, column in found.items()} == {"a": [1], "b": [2]}
    with pytest.raises(ValueError, match="column 'y' of labels= has 3 entries for 2 files"):
        Labels.of({"y": [1, 2, 3]}, files, "", True)


def test_the_most_specific_name_is_meant() -> None:
    def first(labels: Any, *files: str) -> list[int]:
        found = Labels.of(labels, files, "d/", False)
        rows: torch.Tensor = found.rows(np.arange(len(files)), torch.device("cpu"))
        return rows.tolist()

    assert first({"b": 0, "sub/b": 1}, "d/sub/b.pt") == [1]
    assert first({"b.pt": 0, "sub/b": 1}, "d/sub/b.pt") == [1]
    assert first({"sub/a": 1, "a": 2}, "d/sub/a.pt", "d/a.pt") == [1, 2]
    assert first({"d/a": 5}, "d/a.pt") == [5]
    assert first({"a": 3, "b": 4}, "d/a.pt", "d/a.pt", "d/b.pt") == [3, 3, 4]
    with pytest.raises(ValueError, match="one name without its ending"):
        first({"a": 1}, "d/x/a.pt", "d/y/a.pt")
    with pytest.raises(ValueError, match="but names such as 'z'"):
        first({"z": 1}, "d/a.pt")


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ({1, 2}, TypeError, "neither a sequence"),
        ({0: 1, 1: 2}, TypeError, "the key 0, which is no name"),
        ({"a": 1, Path("a"): 2}, ValueError, "'a' twice"),
        ([], ValueError, "0 labels for 2 files"),
    ],
)
def test_labels_that_contradict(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PathLister(["a.pt", "b.pt"], labels=labels)


def test_an_index_of_numbers_that_are_names() -> None:
    pd = pytest.importorskip("pandas")
    files = [f"{n}.pt" for n in range(4)]
    shuffled = pd.Series([30, 20, 10, 0], index=[3, 2, 1, 0])
    with pytest.raises(ValueError, match=r"set_index\(labels\.index\.astype\(str\)\)"):
        PathLister(files, labels=shuffled)
    PathLister(files, labels=shuffled.reset_index(drop=True))
    PathLister(["x.pt", "y.pt", "z.pt", "w.pt"], labels=shuffled)  # no names of these
    twice = pd.Series([1, 2, 3], index=["a", "b", "a"])
    with pytest.raises(ValueError, match="'a' twice"):
        PathLister(["a.pt", "b.pt"], labels=twice)


def test_dtypes_that_torch_does_not_gather(paths: list[str], store: GPUFeatureStore) -> None:
    for dtype in ("uint16", "uint32", "uint64", ">i4", "datetime64[s]", "longdouble"):
        labels = np.arange(FILES).astype(dtype)
        for batch, found in pipeline(store, paths, labels=labels, batch_size=4):
            values = [int(label.astype(int)) if isinstance(label, np.datetime64) else int(label)
                      for label in found]  # fmt: skip
            assert values == ids(batch)


def test_objects_are_the_consumers_own(paths: list[str], store: GPUFeatureStore) -> None:
    boxes = [torch.full((n + 1,), n) for n in range(FILES)]
    given = torch.arange(FILES)
    lister = PathLister(paths, labels={"boxes": boxes, "y": given}, batch_size=4)
    given.zero_()
    for _ in range(2):
        for batch, labels in GPUCollator(GPUPrefetcher(lister, store), ragged="list"):
            assert labels["y"].tolist() == [int(box[0]) for box in labels["boxes"]] == ids(batch)
            labels["boxes"][0].fill_(-1)
            labels["y"].fill_(-1)


def test_named_tuples_stay(paths: list[str], store: GPUFeatureStore) -> None:
    labels = [Pair(n, f"n{n}") for n in range(FILES)]
    [(batch, found)] = pipeline(store, paths, labels=labels, batch_size=FILES)
    assert isinstance(found, Pair)
    assert found.y.tolist() == ids(batch) and found.name == [f"n{n}" for n in range(FILES)]


class Pair(NamedTuple):
    y: Any
    name: Any


def test_a_label_may_be_none(paths: list[str], store: GPUFeatureStore) -> None:
    lister = PathLister(paths, labels=[None] * FILES)
    assert [label for _, label in GPUPrefetcher(lister, store)] == [None] * FILES


def test_nodes_in_between(paths: list[str], store: GPUFeatureStore) -> None:
    """Batches that were made into lists, cut up and put together again; damaged files left out."""
    os.truncate(paths[4], 50)
    options: dict[str, Any] = {"labels": labelled, "shuffle": True}
    sources: list[Any] = [
        Mapper(PathLister(paths, batch_size=3, **options), list),
        Batcher(PathLister(paths, **options), 3, drop_last=False),
        Batcher(Unbatcher(PathLister(paths, batch_size=2, **options)), 5, drop_last=False),
        Prefetcher(PathLister(paths, batch_size=3, **options), 2),
    ]
    for source in sources:
        seen = []
        features = GPUPrefetcher(source, store, on_error="skip")
        for batch, labels in GPUCollator(features, ragged="list"):
            assert labels["y"].tolist() == ids(batch)
            seen += ids(batch)
        assert sorted(seen) == [n for n in range(FILES) if n != 4]


def test_labels_that_a_node_has_lost(paths: list[str], store: GPUFeatureStore) -> None:
    lister = PathLister(paths, labels=labelled, batch_size=4)
    node = GPUPrefetcher(Mapper(lister, lambda batch: list(map(str, batch))), store)
    node.reset()
    for _ in range(2):  # each element is consumed
        with pytest.raises(TypeError, match="pass the paths on as they are"):
            next(node)
    next(GPUPrefetcher(lister, store, path_fn=lambda batch: list(map(str, batch))))
    mixed = [*PathLister(paths[:2], labels=[0, 1]), *paths[2:4]]
    with pytest.raises(TypeError, match="make one PathLister of all files"):
        next(GPUPrefetcher([mixed], store))


@pytest.mark.parametrize("kind", ["batches", "singles"])
def test_stand_ins_have_their_labels(
    paths: list[str], store: GPUFeatureStore, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With several ranks, where an element of which nothing is left is replaced by another."""
    monkeypatch.setattr(prefetcher, "find_rank", lambda: (2, 0))
    for number in (0, 1, 5, 9, 10):
        os.truncate(paths[number], 50)
    size = None if kind == "singles" else 2

    def make() -> Any:
        lister = PathLister(paths, labels=labelled, batch_size=size, num_shards=1, shard_index=0)
        features = GPUPrefetcher(lister, store, on_error="skip")
        return GPUCollator(features, ragged="list", batch_size=3 if size is None else None)

    def check(batch: Any) -> list[int]:
        assert batch[1]["y"].tolist() == ids(batch[0])
        return ids(batch[0])

    whole = make()
    expected = [check(batch) for batch in whole]
    for stop in range(1, len(expected)):
        node = make()
        node.reset()
        first = [check(next(node)) for _ in range(stop)]
        state = json.loads(json.dumps(node.state_dict()))
        node = make()
        node.reset(state)
        assert first + [check(batch) for batch in _rest(node)] == expected


def _rest(node: Any) -> Any:
    while True:
        try:
            yield next(node)
        except StopIteration:
            return


def test_the_store_does_not_keep_labels(paths: list[str], store: GPUFeatureStore) -> None:
    lister = PathLister(paths, labels=labelled)
    labels = weakref.ref(lister._files.labels)
    node = GPUPrefetcher(lister, store)
    list(node)
    del lister, node
    gc.collect()
    assert labels() is None
