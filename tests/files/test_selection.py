"""keys= and dtype=: the store keeps what a load_fn that does the same would give it."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes import FeatureLoadError, GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.files import Selection, batch_reader
from gpucache_pipes.testing.features import assert_same, features

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
Keys = list[tuple[Any, ...]]


def by_hand(feature: Any, keys: Keys | None, dtype: Any) -> Any:
    """What a user's load_fn would do, one key and one tensor at a time."""

    def pick(item: Any, paths: Keys) -> Any:
        if () in paths:
            return item
        return type(item)(
            (key, pick(part, [p[1:] for p in paths if p[0] == key]))
            for key, part in item.items()
            if any(p[0] == key for p in paths)
        )

    def convert(item: Any, here: tuple[Any, ...], to: torch.dtype | None) -> Any:
        if isinstance(dtype, dict):
            to = dtype.get(here, to)
        if isinstance(item, torch.Tensor):
            if not isinstance(dtype, dict):
                return item.to(dtype) if dtype and item.is_floating_point() else item
            return item if to is None else item.to(to)
        if isinstance(item, dict):
            return type(item)((k, convert(part, (*here, k), to)) for k, part in item.items())
        if isinstance(item, (list, tuple)):
            parts = [convert(part, (*here, None), to) for part in item]
            if isinstance(item, list):
                return parts
            return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
        return item

    return convert(feature if keys is None else pick(feature, keys), (), None)


def paths_in(feature: Any) -> Keys:
    """The keys that lead to each part of nested dicts."""
    if not isinstance(feature, dict):
        return []
    return [(key, *rest) for key, part in feature.items() for rest in [(), *paths_in(part)]]


@pytest.fixture(params=["native", "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(batch_reader, "_native", None)
    elif batch_reader._native is None:
        pytest.skip("there is no native reader")


def leaves() -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from("abc"), features(max_leaves=3), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("native", [True, False])
def test_equals_a_load_fn_that_does_the_same(
    tmp_path_factory: pytest.TempPathFactory, native: bool, data: st.DataObject
) -> None:
    """Also for files that are known, and for those that torch.load reads."""
    feature = data.draw(leaves())
    if data.draw(st.booleans()):
        feature = {"d": OrderedDict(feature), "e": torch.arange(3)}
    where = paths_in(feature)
    some = st.lists(st.sampled_from(where), min_size=1, max_size=3, unique=True)
    keys = data.draw(st.none() | some)
    kept = by_hand(feature, keys, None)
    real = [p for p in where if not _has_complex(_part(feature, p))]
    named = st.dictionaries(st.sampled_from(real), st.sampled_from(FLOATS), max_size=2)
    dtype: Any = data.draw(st.none() | st.sampled_from(FLOATS) | (named if real else st.none()))
    if isinstance(dtype, dict) and any(not _holds(kept, path) for path in dtype):
        dtype = None
    if isinstance(dtype, dict):  # of names that overlap the later one counts; here each alone
        dtype = dict(list(dtype.items())[:1])
    directory = tmp_path_factory.mktemp("files")
    paths = [str(directory / f"{number}.pt") for number in range(6)]
    for path in paths:
        torch.save(feature, path)
    expected = by_hand(torch.load(paths[0]), keys, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(batch_reader, "_native", None)
        options: dict[str, Any] = {"keys": keys, "dtype": dtype}
        with GPUFeatureStore("cpu", **options) as store:
            for _ in range(2):
                for found in store.get_batch(paths):
                    assert_same(found, expected)
                store.clear()
        with GPUFeatureStore("cpu", load_fn=torch.load, **options) as store:
            assert_same(store.get(paths[0]), expected)


def _part(feature: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        feature = feature[key]
    return feature


def _holds(feature: Any, path: tuple[Any, ...]) -> bool:
    return path in paths_in(feature)


def _has_complex(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        return item.is_complex()
    parts = item.values() if isinstance(item, dict) else item
    return isinstance(item, (dict, list, tuple)) and any(map(_has_complex, parts))


def write(directory: Path, count: int, make: Callable[[int], Any]) -> list[str]:
    paths = [str(directory / f"{number}.pt") for number in range(count)]
    for number, path in enumerate(paths):
        torch.save(make(number), path)
    return paths


@pytest.mark.parametrize("shape", [(1000, 1), (3, 70_000), (5, 4)])
@pytest.mark.parametrize("strided", [False, True])
def test_many_files_in_one_go(tmp_path: Path, shape: tuple[int, ...], strided: bool) -> None:
    def make(number: int) -> Any:
        x = torch.randn(*reversed(shape)).T if strided else torch.randn(shape)
        return {"x": x * 10**number, "label": torch.tensor(number)}

    paths = write(tmp_path, 12, make)
    with GPUFeatureStore("cpu", dtype=torch.float16, page_bytes=2048) as store:
        store.get_batch(paths[:4])
        store.release(paths[1:3])
        got = store.get_batch(paths[::-1] + paths[:2])
    for feature, path in zip(got, paths[::-1] + paths[:2], strict=True):
        assert_same(feature, by_hand(torch.load(path), None, torch.float16))


@pytest.mark.usefixtures("reader")
def test_twice_as_many_features_fit(tmp_path: Path) -> None:
    paths = write(tmp_path, 64, lambda n: {"x": torch.full((1024,), float(n)), "n": n})
    items = []
    for dtype in (None, torch.bfloat16):
        with GPUFeatureStore("cpu", max_cache_bytes=16 * 4096, dtype=dtype) as store:
            store.get_batch(paths)
            items.append(store.stats().items)
    assert items == [16, 32]


def test_only_the_bytes_of_what_is_kept_are_read(tmp_path: Path) -> None:
    """Of files that are not small."""
    [path] = write(tmp_path, 1, lambda n: {"x": torch.randn(1 << 20), "y": torch.randn(10)})
    with GPUFeatureStore("cpu", keys="y") as store:
        assert list(store.get(path)) == ["y"]
        assert store.stats().bytes_read == 40


def test_rounding() -> None:
    """To the nearest value, to the even one of two; what is too large becomes inf."""
    selection = Selection.of(None, torch.float16)
    assert selection is not None
    values = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, -1e9, torch.nan, 1e-9])
    found = selection.feature(values)
    expected = torch.from_numpy(np.array([1, 1 + 2**-9, 65504, np.inf, -np.inf, np.nan, 0], "f2"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("reader")
def test_a_file_that_lacks_a_key(tmp_path: Path) -> None:
    paths = write(tmp_path, 8, lambda n: {"x": torch.ones(2), **({} if n == 3 else {"y": 1})})
    torch.save(torch.ones(2), paths[5])
    with GPUFeatureStore("cpu", keys=["y"]) as store:
        with pytest.raises(FeatureLoadError, match=r"3\.pt'.*keys of the feature are \['x'\]"):
            store.get(paths[3])
        with pytest.raises(FeatureLoadError, match=r"5\.pt'.*the feature is a single value"):
            store.get(paths[5])
        node = GPUCollator(
            GPUPrefetcher(PathLister(paths, batch_size=4), store, on_error="skip"), collate_fn=list
        )
        assert [len(batch) for batch in node] == [3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": ("a", "b")}, r"write \['a', 'b'\] for several, \[\('a', 'b'\)\] for one"),
        ({"keys": []}, "keeps nothing"),
        ({"keys": 1.5}, "a key or a list of keys"),
        ({"keys": [["a"]]}, "neither a key nor"),
        ({"dtype": torch.int8}, "name the leaves"),
        ({"dtype": "bf16"}, "must be a dtype"),
        ({"dtype": {"x": "no such"}}, "must be a dtype"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPUFeatureStore("cpu", **options)


def test_a_complex_leaf_stays_complex(tmp_path: Path) -> None:
    [path] = write(tmp_path, 1, lambda n: {"x": torch.ones(2, dtype=torch.complex64)})
    with (
        GPUFeatureStore("cpu", dtype={"x": torch.float32}) as store,
        pytest.raises(FeatureLoadError, match=r"feature\['x'\] is torch.complex64"),
    ):
        store.get(path)


def test_other_formats(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.npy") for number in range(8)]
    for number, path in enumerate(paths):
        np.save(path, np.asfortranarray(np.full((3, 4), number + 1e-4)))
    with GPUFeatureStore("cpu", dtype=torch.float32) as store:
        for number, feature in enumerate(store.get_batch(paths)):
            assert_same(feature, torch.full((3, 4), number + 1e-4, dtype=torch.float64).float())
