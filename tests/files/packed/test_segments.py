"""Packed segments: what is written is read, damage is noticed, and safetensors can open them."""

import json
import os
import random
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gpucache_pipes.files import LoadedFeature, OpenFeature, Progress, read_many
from gpucache_pipes.files.layout import build
from gpucache_pipes.files.packed import native, readahead
from gpucache_pipes.files.packed.codec import (
    LayoutKind,
    UnpackableError,
    decode_kind,
    decode_value,
    encode_kind,
    encode_value,
    encode_values,
)
from gpucache_pipes.files.packed.index import STALE, Index
from gpucache_pipes.files.packed.packed_features import PackedFeatures
from gpucache_pipes.files.packed.records import Named, copy_records
from gpucache_pipes.files.packed.segment import DamagedSegmentError, Segment, name_hashes
from gpucache_pipes.files.packed.segment_files import SegmentFiles
from gpucache_pipes.files.packed.segment_writer import Records, SegmentWriter
from gpucache_pipes.testing.features import Pair, assert_same, features, values


def feature_bytes(feature: OpenFeature) -> bytearray:
    data = bytearray(feature.layout.span)
    feature.read_into([memoryview(data)])
    return data


def feature_of(feature: OpenFeature) -> Any:
    """What an OpenFeature holds, as it was saved."""
    data = feature_bytes(feature)
    leaves = [
        torch.frombuffer(data, dtype=torch.uint8)[leaf.offset : leaf.offset + leaf.nbytes]
        .clone()
        .view(leaf.dtype)
        .view(leaf.shape)
        if leaf.nbytes
        else torch.empty(leaf.shape, dtype=leaf.dtype)
        for leaf in feature.layout.leaves
    ]
    return build(feature.layout.tree, leaves.__getitem__, feature.values.__getitem__)


def records_of(items: Sequence[Any], first: int = 0) -> Records:
    """Records of features, by the names 0, 1, ..."""
    opened = [LoadedFeature(item) for item in items]
    names = [str(first + n) for n in range(len(items))]
    held = [feature_bytes(feature) for feature in opened]
    named = Named(names, name_hashes(names), np.arange(2 * len(names)).reshape(-1, 2))
    return copy_records(
        named, [feature.layout for feature in opened],
        [encode_values(feature.values) for feature in opened],
        None, [-1] * len(items), lambda n: [memoryview(held[n])],
    )  # fmt: skip


def write(path: Path, *groups: Records) -> Segment:
    writer = SegmentWriter(f"{path}.part", 1 << 20)
    try:
        for records in groups:
            writer.append(records)
        writer.finish(str(path))
    finally:
        writer.abandon()
    return Segment(str(path), with_names=True)


def read_all(segment: Segment, **options: Any) -> list[Any]:
    """All features of a segment, None for those that cannot be read."""
    index = Index([segment])
    found = PackedFeatures(SegmentFiles(), **options).open_many(
        index, np.arange(len(segment)), lambda n: b"%d" % n, lambda n: LoadedFeature(None),
        Progress(), range(len(segment)),
    )  # fmt: skip
    return [None if feature is None else feature_of(feature) for feature in found]


@pytest.fixture(params=["native", "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without what a compiler makes."""
    if request.param == "python":
        monkeypatch.setattr(native, "native", None)
        monkeypatch.setattr(native, "_packed", None)
    elif native.native is None or native._packed is None:
        pytest.skip("the native modules were not built")
    return str(request.param)


@given(items=st.lists(features(), max_size=6), cut=st.integers(0, 6))
def test_what_is_written_is_read(tmp_path: Path, items: list[Any], cut: int, reader: str) -> None:
    groups = [records_of(items[:cut]), records_of(items[cut:], len(items[:cut]))]
    segment = write(tmp_path / "a.safetensors", *groups)
    assert segment.names() == [str(n) for n in range(len(items))]
    for item, found in zip(items, read_all(segment), strict=True):
        assert_same(item, found)


@given(items=st.lists(features(), min_size=1, max_size=6))
def test_safetensors_opens_a_segment(tmp_path: Path, items: list[Any]) -> None:
    segment = write(tmp_path / "a.safetensors", records_of(items))
    with safe_open(segment.path, "np") as file:
        data = file.get_tensor("data").reshape(-1).view(np.uint8)
        starts = file.get_tensor("starts").tolist()
        for row, start in enumerate(starts):
            record = segment.record(row)
            assert zlib.crc32(data[start : start + record.nbytes].tobytes()) == record.checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_like_tensors_are_one_tensor_for_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    items = [{"x": torch.arange(16).view(2, 8).to(dtype) + n} for n in range(5)]
    segment = write(tmp_path / "a.safetensors", records_of(items))
    with safe_open(segment.path, "pt") as file:
        assert torch.equal(file.get_tensor("data"), torch.stack([item["x"] for item in items]))


@given(items=st.lists(features(), min_size=1, max_size=4), data=st.data())
def test_a_flipped_byte_is_noticed(tmp_path: Path, items: list[Any], data: st.DataObject) -> None:
    segment = write(tmp_path / "a.safetensors", records_of(items))
    held = bytearray(Path(segment.path).read_bytes())
    at = data.draw(st.integers(0, len(held) - 1))
    if data.draw(st.booleans()):  # among the records, the header being mostly spaces
        at = data.draw(st.integers(4096, len(held) - 1))
    held[at] ^= 1 << data.draw(st.integers(0, 7))
    Path(segment.path).write_bytes(held)
    try:
        damaged = Segment(segment.path)
    except DamagedSegmentError:
        return
    for item, found in zip(items, read_all(damaged), strict=True):
        if found is not None or item is None:
            assert_same(item, found)


def test_any_truncated_segment_is_noticed(tmp_path: Path) -> None:
    segment = write(tmp_path / "a.safetensors", records_of([{"x": torch.arange(9)}, {"y": 3}]))
    held = Path(segment.path).read_bytes()
    rng = random.Random(0)
    for size in [0, 1, 7, 8, 4095, 4096, *rng.sample(range(len(held)), 60)]:
        Path(segment.path).write_bytes(held[:size])
        with pytest.raises(DamagedSegmentError):
            Segment(segment.path)
    Path(segment.path).write_bytes(held + b"\0")
    with pytest.raises(DamagedSegmentError):
        Segment(segment.path)


def test_a_damaged_record_is_left_out_and_not_asked_for_again(tmp_path: Path, reader: str) -> None:
    items = [torch.full((600,), n) for n in range(4)]
    segment = write(tmp_path / "a.safetensors", records_of(items))
    with Path(segment.path).open("r+b") as file:
        file.seek(segment.record(2).start + 5)
        file.write(b"!")
    index = Index([segment])
    found = PackedFeatures(SegmentFiles()).open_many(
        index, np.arange(4), lambda n: None, lambda n: LoadedFeature(None), Progress(), range(4)
    )
    assert [feature is None for feature in found] == [False, False, True, False]
    assert index.states.tolist() == [0, 0, STALE, 0]


def test_a_large_record_that_is_damaged_is_opened_elsewhere(tmp_path: Path) -> None:
    item = torch.arange(300_000)
    segment = write(tmp_path / "a.safetensors", records_of([item, {"x": item, "y": 1}]))
    opened = PackedFeatures(SegmentFiles())
    index = Index([segment])
    for row, feature in enumerate([item, {"x": item, "y": 1}]):
        with Path(segment.path).open("r+b") as file:
            file.seek(segment.record(row).start + 500_000)
            file.write(b"!!")
        one = opened.open(index, row, lambda: None, lambda f=feature: LoadedFeature(f))
        assert_same(feature_of(one), feature)
        assert index.states[row] == STALE


def test_records_beyond_scratch_memory_are_left_for_the_next_call(
    tmp_path: Path, reader: str
) -> None:
    items = [torch.full((900_000 // 8,), n) for n in range(7)]  # 6.3 MB
    segment = write(tmp_path / "a.safetensors", records_of(items))
    index, opened = Index([segment]), PackedFeatures(SegmentFiles())
    at = 0
    sizes = []
    while at < 7:
        rest = np.arange(at, 7)
        found = opened.open_many(
            index, rest, lambda n: None, lambda n: LoadedFeature(None), Progress(), range(7 - at)
        )
        for n, feature in enumerate(found):
            assert feature is not None
            assert_same(feature_of(feature), items[at + n])
        sizes.append(len(found))
        at += len(found)
    assert sizes == [4, 3]


def test_read_many_reads_records(tmp_path: Path, reader: str) -> None:
    items = [{"x": torch.arange(n, n + 40), "n": n} for n in range(9)]
    segment = write(tmp_path / "a.safetensors", records_of(items))
    found = PackedFeatures(SegmentFiles()).open_many(
        Index([segment]), np.arange(8, -1, -1), lambda n: b"v%d" % n,
        lambda n: LoadedFeature(None), Progress(), range(9),
    )  # fmt: skip
    memory = np.zeros(9 * 320, np.uint8)
    offsets = np.arange(9) * 320
    left = read_many([f for f in found if f is not None], memory.data, offsets)
    assert left == ([] if reader == "native" else list(range(9)))
    for n, feature in enumerate(found):
        assert feature is not None and feature.version == b"v%d" % n
        if n not in left:
            held = memory[n * 320 :][:320].tobytes()
            assert held == items[8 - n]["x"].numpy().tobytes()
        assert feature.values == (8 - n,)


def test_the_newest_of_several_records_is_found(tmp_path: Path) -> None:
    old = write(tmp_path / "a.safetensors", records_of([torch.tensor([n]) for n in range(3)]))
    new = write(
        tmp_path / "b.safetensors", records_of([torch.tensor([n + 9]) for n in range(2)], 1)
    )
    index = Index([old, new])
    position = index.find(name_hashes(["0", "1", "2", "3"]))
    segments, rows = index.locate(position[:3])
    assert (segments, rows, position[3]) == ([0, 1, 1], [0, 0, 1], -1)
    index.states[position[1]] = STALE
    third = write(tmp_path / "c.safetensors", records_of([torch.tensor([7])], 5))
    after = Index([old, new, third], index)
    assert after.states[after.find(name_hashes(["1"]))].tolist() == [STALE]
    assert Index().find(name_hashes(["1"])).tolist() == [-1]


# What a segment can hold


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(values(), inner, max_size=3)
    return st.lists(inner, max_size=3) | st.tuples(inner, inner) | mappings


NUMBERS = st.complex_numbers() | st.integers() | st.floats()


@given(st.recursive(values() | NUMBERS, nested, max_leaves=5))
def test_values_come_back_as_they_were(value: Any) -> None:
    assert_same(decode_value(encode_value(value)), value)


@given(features())
def test_kinds_come_back_as_they_were(feature: Any) -> None:
    layout = LoadedFeature(feature).layout
    kind = LayoutKind.of(layout)
    assert decode_kind(encode_kind(kind)) == kind
    sizes = [size for leaf in layout.leaves for size in leaf.shape]
    assert kind.layout(sizes) is layout


class Odd(dict[str, int]):
    pass


@pytest.mark.parametrize(
    "value",
    [np.float64(1.0), {1, 2}, Odd(a=1), torch.float32, range(3), (1, [frozenset()]), object],
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(UnpackableError, match="packed features are made of"):
        encode_value(value)


def test_named_tuples_are_refused() -> None:
    layout = LoadedFeature({"a": Pair(torch.ones(1), 2)}).layout
    with pytest.raises(UnpackableError, match="Pair"):
        encode_kind(LayoutKind.of(layout))


@pytest.mark.parametrize(
    "encoded",
    [
        None, 3, [], [0, ["float32"], []], [0, [], []], [0, ["load"], [1]], [0, ["float32"], [-1]],
        [["set", []], [], []], [["dict", [0, 0], ["a", "a"]], ["int8", "int8"], [0, 0]],
        [["dict", [0], [{"odd": 1}]], ["int8"], [0]], [["list"], [], []], [[], [], []],
    ],
)  # fmt: skip
def test_kinds_that_were_not_encoded_are_errors(encoded: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode_kind(encoded)


def test_an_ordered_dict_stays_one(tmp_path: Path) -> None:
    item = OrderedDict([(2, torch.ones(2)), ("1", [()])])
    [found] = read_all(write(tmp_path / "a.safetensors", records_of([item])))
    assert_same(found, item)


def test_gaps_between_leaves_are_zeros(tmp_path: Path) -> None:
    """What was in memory before does not get into a file."""
    feature = LoadedFeature([torch.ones(3, dtype=torch.uint8), torch.ones(5, dtype=torch.uint8)])
    memory = np.full(64, 77, np.uint8)
    memory[16:19] = memory[32:37] = 1
    named = Named(["a"], name_hashes(["a"]), np.zeros((1, 2), np.int64))
    records = copy_records(named, [feature.layout], [b""], memory.data, [16], lambda n: [])
    assert records.data.tolist() == [1] * 3 + [0] * 13 + [1] * 5 + [0] * 11


def resigned(segment: Segment, change: Any) -> bytes:
    """The file of a segment with other tables, and the checksum of these."""
    held = bytearray(Path(segment.path).read_bytes())
    about = json.loads(held[8:4096])
    tables = bytearray(held[4096 + about["data"]["data_offsets"][1] :])
    change(about, tables)
    about["__metadata__"].setdefault("checksum", str(zlib.crc32(tables)))
    text = json.dumps(about).encode()
    held[8:4096] = text.ljust(4088)
    return bytes(held[: 4096 + about["data"]["data_offsets"][1]]) + bytes(tables)


@settings(max_examples=150)
@given(data=st.data())
def test_hostile_segments_are_damaged_ones(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the tables say, with a checksum that is right: an error, or records to read."""
    items = [
        {"x": torch.arange(5), "n": 3},
        [torch.ones(2, 2), "a"],
        {"x": torch.arange(9), "n": 4},
    ]
    segment = write(tmp_path / "a.safetensors", records_of(items))

    def change(about: dict[str, Any], tables: bytearray) -> None:
        del about["__metadata__"]["checksum"]
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(tables) - 1))
            tables[at] = data.draw(st.integers(0, 255))

    Path(segment.path).write_bytes(resigned(segment, change))
    try:
        damaged = Segment(segment.path, with_names=True)
        damaged.names()
        for row in range(len(damaged)):
            damaged.record(row)
        read_all(damaged)
    except (DamagedSegmentError, UnicodeDecodeError):
        pass


@pytest.mark.parametrize(
    "kinds",
    [
        [[0, ["_dynamo"], [1]]], [[0, ["qint32"], [1]]], [3], "x", [[0, ["float32"], [1e99]]],
        [[["dict", [0], [{"complex": [10**400, 0]}]], ["float32"], [1]]], [[[[]], [], []]],
    ],
)  # fmt: skip
def test_kinds_cannot_name_what_they_like(tmp_path: Path, kinds: Any) -> None:
    segment = write(tmp_path / "a.safetensors", records_of([torch.ones(3)]))
    text = json.dumps(kinds).encode()

    def change(about: dict[str, Any], tables: bytearray) -> None:
        start = about["data"]["data_offsets"][1]
        begin, end = about["kinds"]["data_offsets"]
        tables[begin - start : end - start] = text
        more = len(text) - (end - begin)
        for name in ("kinds", "values", "names"):
            first, last = about[name]["data_offsets"]
            about[name]["data_offsets"] = [first + more * (name != "kinds"), last + more]
        del about["__metadata__"]["checksum"]

    Path(segment.path).write_bytes(resigned(segment, change))
    with pytest.raises(DamagedSegmentError):
        Segment(segment.path)


def test_a_fifo_is_no_segment(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(DamagedSegmentError, match="regular file"):
        Segment(str(tmp_path / "a"))


def test_progress_of_a_call_within_a_call() -> None:
    progress = Progress()
    progress.enter([2, 5, 7])
    assert progress.current == 2
    progress.restart([0, 2])
    progress.begin(1, 5)
    assert progress.current == 7
    progress.enter([4])
    assert progress.current == 4 and 0 <= progress.since < 60


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_read_ahead_reads_each_segment_once_and_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = write(tmp_path / "a.safetensors", records_of([torch.ones(700_000)]))
    monkeypatch.setattr(readahead, "_is_cached", lambda fd, size: False)
    read: list[int] = []
    real = os.preadv
    monkeypatch.setattr(readahead.os, "preadv", lambda *a: read.append(n := real(*a)) or n)
    ahead = readahead.ReadAhead()
    descriptors = len(os.listdir("/proc/self/fd"))
    with Path(segment.path).open("rb") as file:
        for _ in range(3):
            ahead.add(segment, file.fileno())
        wait_until(lambda: not ahead._is_running)
    assert sum(read) == segment.file_bytes
    assert len(os.listdir("/proc/self/fd")) == descriptors
    ahead.close()
    ahead._seen.clear()
    with Path(segment.path).open("rb") as file:
        ahead.add(segment, file.fileno())
    assert not ahead._is_running and sum(read) == segment.file_bytes


def test_read_ahead_leaves_what_is_cached_and_what_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = write(tmp_path / "a.safetensors", records_of([torch.ones(700)]))
    ahead = readahead.ReadAhead()
    with Path(segment.path).open("rb") as file:
        ahead.add(segment, file.fileno())  # it was just written
        assert not ahead._seen
        monkeypatch.setattr(readahead, "_is_cached", lambda fd, size: False)
        monkeypatch.setattr(readahead, "_available_bytes", lambda: 4 * segment.file_bytes - 4)
        ahead.add(segment, file.fileno())
        assert ahead._seen and not ahead._waiting and not ahead._is_running
    monkeypatch.undo()
    assert readahead._available_bytes() > 1 << 20 or not Path("/proc/meminfo").exists()
