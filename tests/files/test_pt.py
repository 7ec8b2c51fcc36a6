"""The fast `.pt` reader returns what torch.load returns, bit for bit, or is Unsupported."""

import contextlib
import io
import os
import pickle
import shutil
import struct
import threading
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes.files import FileOpener, Layout
from gpucache_pipes.files import layout as layouts
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import MAX_WHOLE_BYTES
from gpucache_pipes.files.pt.fallback import by_torch_load
from gpucache_pipes.files.pt.pickle import read_pickle
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.testing import assert_same, features
from gpucache_pipes.testing.contracts import in_threads, read_feature


def read(opened: Any, cuts: list[int] | None = None) -> Any:
    """Return the feature, read into buffers that are cut at these offsets."""
    feature = read_feature(opened, cuts or [])
    opened.close()
    return feature


@given(features(), st.lists(st.integers(1, 300), max_size=3))
def test_equals_torch_load(tmp_path: Path, feature: Any, cuts: list[int]) -> None:
    path = str(tmp_path / "x.pt")
    torch.save(feature, path)
    os.utime(path, (1, 1))  # read plans of files that were just written are not remembered
    reader = PtReader()
    for _ in range(2):  # the second time, the read plan is remembered
        assert_same(read(reader.open(path), cuts), torch.load(path))


def save(path: Path, feature: Any) -> str:
    torch.save(feature, path)
    return str(path)


def fast(path: str) -> Any:
    return read(PtReader().open(path))


DTYPES = [
    dtype
    for dtype in sorted(
        set(filter(lambda d: isinstance(d, torch.dtype), vars(torch).values())), key=str
    )
    if not str(dtype).startswith(("torch.q", "torch.bits"))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:BComplex32")
def test_every_dtype_that_torch_saves(tmp_path: Path, dtype: torch.dtype) -> None:
    try:
        raw = torch.arange(64, dtype=torch.uint8).view(dtype)
        path = save(tmp_path / "x.pt", {"t": raw, "dtype": dtype})
        expected = torch.load(path)
    except (RuntimeError, TypeError, AttributeError, KeyError, pickle.UnpicklingError) as error:
        pytest.skip(f"torch does not save it: {error}")
    assert_same(fast(path), expected)


def test_views_strides_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(10_000, dtype=torch.float32).view(100, 100)
    feature = {
        "view": base[3],
        "column": base[:, 7],
        "transposed": base[:5, :6].t(),
        "steps": base[::9, ::4],
        "expanded": base[0, :3].expand(4, 3),
        "again": base,
        "scalar": base[5, 5],
        "empty": base[:0],
        "one": base[1:2, 3:4],
        "parameter": torch.nn.Parameter(base[0].clone()),
        "conj": torch.tensor([1 + 2j, 3j]),
        "size": torch.Size([2, 3]),
        "bytes": b"\x00\xff",
        "nan": float("inf"),
    }
    path = save(tmp_path / "x.pt", feature)
    expected = torch.load(path)
    expected["parameter"] = expected["parameter"].detach()
    assert_same(fast(path), expected)


def test_only_the_bytes_of_a_leaf_are_read(tmp_path: Path) -> None:
    base = torch.arange(1 << 20, dtype=torch.float32)
    path = save(tmp_path / "x.pt", {"a": base[1000:1100]})
    opened = PtReader().open(path)
    assert opened.bytes_read == 400
    assert_same(read(opened), {"a": base[1000:1100]})


@pytest.mark.parametrize("name", ["x", "äöü", "a b", "data", "x" * 120, "a.b.c", "1"])
@pytest.mark.parametrize("large", [False, True])
def test_every_kind_of_file_name(tmp_path: Path, name: str, large: bool) -> None:
    count = MAX_WHOLE_BYTES if large else 10
    feature = {"x": torch.arange(count), "y": [torch.ones(3), "s"]}
    assert_same(fast(save(tmp_path / f"{name}.pt", feature)), feature)
    buffer = io.BytesIO()
    torch.save(feature, buffer)
    (tmp_path / "buffer.pt").write_bytes(buffer.getvalue())
    assert_same(fast(str(tmp_path / "buffer.pt")), feature)


@pytest.mark.parametrize("alignment", [64, 4096])
@pytest.mark.parametrize("crc", [False, True])
def test_ways_to_save(tmp_path: Path, alignment: int, crc: bool) -> None:
    from torch.utils.serialization import config

    feature = {"x": torch.arange(1000), "y": torch.ones(3)}
    with config.patch({"save.storage_alignment": alignment}):
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(crc)
        try:
            path = save(tmp_path / "x.pt", feature)
        finally:
            torch.serialization.set_crc32_options(before)
    assert_same(fast(path), feature)


def test_files_of_one_data_set_share_their_read_plan(tmp_path: Path) -> None:
    reader = PtReader()
    for n in range(20):
        feature = {"x": torch.full((10,), n), "y": n % 2}
        assert_same(read(reader.open(save(tmp_path / f"{n:03d}.pt", feature))), feature)
    [[template]] = reader._templates.values()
    assert len(template._plans) == 2


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    reader = PtReader()
    for n in range(3):
        feature = {"x": torch.arange(n + 1)}
        path = save(tmp_path / "x.pt", feature)
        os.utime(path, ns=(n, n))
        assert_same(read(reader.open(path)), feature)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"x": torch.arange(MAX_WHOLE_BYTES)})
    opened = PtReader().open(path)
    os.truncate(path, 1000)
    with pytest.raises(OSError, match=r"x\.pt.*ends early"):
        read(opened)
    opened.close()


def test_a_file_that_changes_faster_than_the_clock(tmp_path: Path) -> None:
    reader = PtReader()
    path = tmp_path / "x.pt"
    path.touch()
    for n in range(20):
        buffer = io.BytesIO()
        torch.save({"n": n % 10, "x": torch.tensor([n])}, buffer)
        path.write_bytes(buffer.getvalue())  # same inode and size, and probably the same time
        assert_same(read(reader.open(str(path))), {"n": n % 10, "x": torch.tensor([n])})


def legacy(path: Path, feature: Any) -> str:
    torch.save(feature, path, _use_new_zipfile_serialization=False)
    return str(path)


def rezipped(path: Path, feature: Any, method: int, byteorder: bytes = b"little") -> str:
    plain = save(path.with_suffix(".plain"), feature)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", method) as new:
        for item in old.infolist():
            other = item.filename.endswith("/byteorder")
            new.writestr(item.filename, byteorder if other else old.read(item))
    return str(path)


class WithAttribute(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "make",
    [
        legacy,
        lambda path, feature: rezipped(path, feature, zipfile.ZIP_DEFLATED),
        lambda path, feature: rezipped(path, feature, zipfile.ZIP_STORED),
        lambda path, feature: rezipped(path, feature, zipfile.ZIP_STORED, b"big"),
        lambda path, feature: save(path, {**feature, "s": {1, 2}}),
        lambda path, feature: save(path, OrderedDict(feature)),
        lambda path, feature: save(path, torch.nn.Linear(2, 2).state_dict()),
    ],
)
def test_files_left_to_torch_load_give_the_same_feature(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "x.pt", {"a": torch.arange(5), "b": [1, "x"]})
    by_torch = read(by_torch_load(path, True))
    assert_same(read(FileOpener(True).open(path)), by_torch)


def test_zip64(tmp_path: Path) -> None:
    """A sparse file of 5 GiB has sizes and offsets that need eight bytes."""
    path = str(tmp_path / "x.pt")
    big = torch.empty(5 << 30, dtype=torch.uint8)
    feature = {"a": big[7:27], "b": big[(4 << 30) + 1 :][:30:3], "c": big[-9:], "d": torch.ones(3)}
    with torch.serialization.skip_data():
        torch.save(feature, path)
    with zipfile.ZipFile(path) as records:
        headers = [records.getinfo(f"x/data/{n}").header_offset for n in (0, 1)]
    assert headers[1] > 1 << 32
    with Path(path).open("r+b") as file:
        starts = []
        for header in headers:
            file.seek(header + 26)
            starts.append(header + 30 + sum(struct.unpack("<HH", file.read(4))))
        for storage, offset, count in ((0, 7, 20), (0, (4 << 30) + 1, 30), (0, (5 << 30) - 9, 9),
                                       (1, 0, 12)):  # fmt: skip
            file.seek(starts[storage] + offset)
            file.write(bytes(range(1, count + 1)))
    assert_same(fast(path), torch.load(path, mmap=True))


def sample_file(tmp_path: Path) -> tuple[str, bytes, Any]:
    feature = {"a": torch.arange(6, dtype=torch.int16), "n": 3, "s": ["x", b"y"]}
    path = save(tmp_path / "s.pt", feature)
    return path, Path(path).read_bytes(), feature


def outcome(load: Any, path: str) -> Any:
    """Return ("value", the feature) or ("error", the type of the error)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ("value", load(path))
        except Exception as error:
            return ("error", type(error))


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def agree(path: str) -> None:
    """Assert that the reader returns what torch.load returns, or raises."""
    kind, value = outcome(fast, path)
    if kind == "value":
        expected = outcome(lambda p: read(by_torch_load(p, True)), path)
        assert expected[0] == "value", expected
        assert_same(value, expected[1])
    else:
        assert value in (Unsupported, OSError, ValueError)
        # Files that the reader itself refuses: torch.load does, too, from 2.10 on. Before, it takes
        # a storage that is not as large as its record.
        if value is ValueError and TORCH >= (2, 10):
            assert outcome(lambda p: torch.load(p, weights_only=True), path)[0] == "error"


def test_truncated_anywhere(tmp_path: Path) -> None:
    path, data, _ = sample_file(tmp_path)
    for end in range(len(data)):
        Path(path).write_bytes(data[:end])
        with pytest.raises(Unsupported):
            PtReader().open(path)


def test_every_byte_flipped(tmp_path: Path) -> None:
    path, data, _ = sample_file(tmp_path)
    for at in range(len(data)):
        for mask in (0xFF, 0x01):
            Path(path).write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
            agree(path)


@settings(max_examples=200)
@given(st.data())
def test_a_known_directory_does_not_hide_damage(tmp_path: Path, data: st.DataObject) -> None:
    """Every file is compared with the template whose read plan it uses."""
    path, raw, feature = sample_file(tmp_path)
    reader = PtReader()
    assert_same(read(reader.open(path)), feature)
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    other = tmp_path / "t.pt"
    other.write_bytes(damaged)
    warm = outcome(lambda p: read(reader.open(p)), str(other))
    cold = outcome(fast, str(other))
    assert warm[0] == cold[0]
    if warm[0] == "value":
        assert_same(warm[1], cold[1])


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    "attack",
    [
        pickled(b"cos\nsystem\nX\x04\x00\x00\x00true\x85R"),
        pickled(b"cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R"),
        pickled(b"cposix\nsystem\n(X\x04\x00\x00\x00truetR"),
        pickled(b"(X\x04\x00\x00\x00trueios\nsystem\n"),  # INST
        pickled(b"(cos\nsystem\nX\x04\x00\x00\x00trueo"),  # OBJ
        pickled(b"cos\nsystem\n)\x81"),  # NEWOBJ
        pickled(b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93"),  # STACK_GLOBAL
        pickled(b"ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb"),  # BUILD
        pickled(b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb"),
        pickled(b"\x82\x01"),  # EXT1
        pickled(b"\x83\x01\x00"),  # EXT2
        pickled(b"\x84\x01\x00\x00\x00"),  # EXT4
        pickled(b"N" + b"r" + struct.pack("<I", 1 << 30)[:3]),  # cut short
        pickled(b"\x8b" + struct.pack("<i", 1 << 30)),  # LONG4 of a gigabyte
        pickled(b"X" + struct.pack("<I", 1 << 31)),  # a string of two gigabytes
        pickled(b"P0\n"),  # PERSID
        pickled(b"I1\n"),
        pickled(b"ctorch\nFloatStorage\n"),  # a name as the value
        pickled(b"cos\nsystem\n"),
        pickled(b"}cos\nsystem\nK\x01s"),  # a name as a key
        pickled(b"(((" + b"t" * 2),
        pickled(b"tttt"),
        pickled(b"(NN"),
        pickled(b"NN"),
        b"\x80\x04N.",
        b"\x80\x02N",
        b"",
    ],
)
def test_malicious_pickles_neither_run_nor_pass(attack: bytes) -> None:
    try:
        value, _ = read_pickle(attack)
    except Unsupported:
        return
    from gpucache_pipes.files.pt.names import AllowedGlobal

    # A global is an inert description. It is refused where the feature is made.
    assert isinstance(value, AllowedGlobal) or value == {} or value is None


def archive(tmp_path: Path, pickle_bytes: bytes) -> str:
    """Write a file as torch.save does, with this pickle."""
    path = str(tmp_path / "attack.pt")
    writer = torch._C.PyTorchFileWriter(path)
    writer.write_record("data.pkl", pickle_bytes, len(pickle_bytes))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()
    return path


def test_names_and_bombs_stop_at_the_feature(tmp_path: Path) -> None:
    bombs = [
        pickled(b"ctorch\nFloatStorage\n"),
        # 2**60 parts by naming one list twice, sixty times over
        pickled(
            b"]" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
        ),
    ]
    for bomb in bombs:
        with pytest.raises(Unsupported):
            PtReader().open(archive(tmp_path, bomb))


def test_paths_that_are_not_regular_files(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        PtReader().open(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        PtReader().open(str(tmp_path / "nothing"))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        PtReader().open(str(tmp_path / "fifo"))


# Python closes features that are dropped without close(), and warns in development mode.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good = save(tmp_path / "x.pt", {"x": torch.ones(3)})
    bad = str(tmp_path / "bad.pt")
    shutil.copy(good, bad)
    os.truncate(bad, 500)
    reader = PtReader()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read(reader.open(good))
        reader.open(good)
        with pytest.raises(Unsupported):
            reader.open(bad)
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_record_as_two_storages(tmp_path: Path) -> None:
    """torch.load uses the dtype of the first storage for both."""
    path = save(tmp_path / "x.pt", [torch.ones(1), torch.ones(1, dtype=torch.int32)])
    data = Path(path).read_bytes()
    second = data.replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
    assert second != data
    Path(path).write_bytes(second)
    with pytest.raises(Unsupported, match="two storages"):
        PtReader().open(path)


def test_files_that_torch_load_reads_differently(tmp_path: Path) -> None:
    reader = PtReader()
    plain = save(tmp_path / "plain.pt", torch.tensor([9, 9]))
    reader.open(plain).close()
    zipped = Path(plain).read_bytes()
    old = legacy(tmp_path / "old.pt", torch.tensor([1, 1]))
    Path(old).write_bytes(Path(old).read_bytes() + zipped)
    assert_same(read(FileOpener(True).open(old)), torch.load(old))
    nameless = tmp_path / "x.pt"
    nameless.write_bytes(zipped.replace(b"plain/version", b"plain/verzion"))
    with pytest.raises(Unsupported):
        reader.open(str(nameless))


def test_a_small_pickle_cannot_make_many_bytes(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 10_000) + b"x" * 10_000
    latin = b"X\x06\x00\x00\x00latin1"
    call = b"c_codecs\nencode\nh\x00h\x01\x86R"
    bomb = pickled(b"]q\x02", b"(", text + b"q\x00", latin + b"q\x01", *(call,) * 2000, b"e")
    with pytest.raises(Unsupported, match="make more bytes"):
        read_pickle(bomb)


MANY = 20_000
GREEDY = {
    "dicts": b"](" + b"}" * MANY + b"e",
    "lists": b"](" + b"]" * MANY + b"e",
    "marks": b"(" * MANY,
    "tuples": b"(" + b")" * MANY + b"t",
    "tuples in tuples": b")" + b"\x85" * MANY,
    "one list, many times": b"](]q\x00(" + b"N" * 99 + b"e" + b"h\x00" * MANY + b"e",
    "ints": b"](" + b"J1234" * MANY + b"e",
    "memo": b"N" + b"".join(b"r" + struct.pack("<I", n) for n in range(MANY)),
    "keys": b"}(" + b"".join(b"J" + struct.pack("<I", n) + b"}" for n in range(MANY)) + b"u",
    "names": b"](" + b"ca\nb\n" * MANY + b"e",
    "calls": b"](" + b"ccollections\nOrderedDict\n)R" * MANY + b"e",
}


@pytest.mark.parametrize("greed", GREEDY)
def test_memory_is_in_proportion_to_the_file(tmp_path: Path, greed: str) -> None:
    path = archive(tmp_path, pickled(GREEDY[greed]))
    reader = PtReader()
    tracemalloc.start()
    try:
        with contextlib.suppress(Unsupported):
            reader.open(path).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * os.path.getsize(path)


def test_one_key_in_many_dicts(tmp_path: Path) -> None:
    key = b"X" + struct.pack("<I", 8000) + b"x" * 8000 + b"q\x00"
    latin = b"X\x06\x00\x00\x00latin1q\x01"
    body = (
        key + latin + b"c_codecs\nencode\nh\x00h\x01\x86Rq\x02" + b"](" + b"}h\x02Ns" * 4000 + b"e"
    )
    path = archive(tmp_path, pickled(b"](", body, b"e"))
    tracemalloc.start()
    try:
        with contextlib.suppress(Unsupported):
            PtReader().open(path).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * os.path.getsize(path)


def test_a_shape_that_no_memory_could_hold(tmp_path: Path) -> None:
    shape = tuple([1 << 40] * 300)
    feature = torch.ones(1)
    path = save(tmp_path / "x.pt", feature)
    data = zipfile.ZipFile(path).read("x/data.pkl")
    sides = b"(" + b"\x8a\x06\x00\x00\x00\x00\x00\x01" * len(shape) + b"t"
    strides = b"(" + b"K\x00" * len(shape) + b"t"
    vast = data.replace(b"K\x01\x85q\x06K\x01\x85q\x07", sides + b"q\x06" + strides + b"q\x07")
    assert len(vast) > len(data)
    with pytest.raises(Unsupported, match="no memory could hold"):
        read_pickle(vast)


HOOKS = b"ccollections\nOrderedDict\nq\x08)Rq\x09"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (HOOKS, b"cos\nsystem\nq\x08q\x09"),
        (HOOKS, HOOKS + b"K\x01K\x02s"),
        (b"tq\x05Q", b"lq\x05Q"),
    ],
)
def test_pickles_that_torch_load_refuses(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = save(tmp_path / "x.pt", torch.ones(1))
    data = zipfile.ZipFile(path).read("x/data.pkl")
    assert old in data
    with pytest.raises(Unsupported):
        read_pickle(data.replace(old, new))


def test_an_unused_storage_must_have_a_record(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"x": torch.ones(1)})
    tensor = zipfile.ZipFile(path).read("x/data.pkl")[3:-1]
    other = tensor.replace(b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x007q")
    assert other != tensor
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename == "x/data.pkl":
                content = (
                    b"\x80\x02}(K\x01" + b"}" + other[2:] + b"K\x01" + b"}" + tensor[2:] + b"u."
                )
            new.writestr(item.filename, content)
    with pytest.raises(Unsupported):
        PtReader().open(str(tmp_path / "y.pt"))


def test_files_that_name_a_part_more_than_once(tmp_path: Path) -> None:
    zeros = (0, 0)
    feature = {"x": torch.ones(3), "pad": [zeros] * 5000}
    assert_same(read(FileOpener(True).open(save(tmp_path / "x.pt", feature))), feature)


def test_too_many_parts_in_a_file_left_to_torch_load(tmp_path: Path) -> None:
    part: Any = {1}
    for _ in range(25):
        part = [part, part]
    path = save(tmp_path / "x.pt", part)
    with pytest.raises(ValueError, match=r"a feature of more than \d+ parts"):
        FileOpener(False).open(path)


@pytest.mark.parametrize(
    "feature",
    [
        lambda n: [*({} for _ in range(200)), n + 1000],
        lambda n: list(range(n, n + 500)),
        lambda n: {f"name {n} {m}": torch.ones(2) for m in range(50)},
        lambda n: {n * 1000 + m: "x" * 10 for m in range(500)},
    ],
)
def test_plans_cost_what_they_say(tmp_path: Path, feature: Any) -> None:
    paths = []
    for n in range(20):
        paths.append(save(tmp_path / f"{n:03}.pt", feature(n)))
        os.utime(paths[-1], (1, 1))
    reader = PtReader()
    reader.open(paths[0]).close()
    before = reader._cost
    tracemalloc.start()
    try:
        for path in paths[1:]:
            reader.open(path).close()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= 1.5 * (reader._cost - before)


def test_long_values_are_not_remembered(tmp_path: Path) -> None:
    reader = PtReader()
    for n in range(5):
        path = save(tmp_path / f"{n}.pt", {"text": str(n) * 100_000, "x": torch.ones(1)})
        os.utime(path, (1, 1))
        reader.open(path).close()
    assert not reader._plans
    templates = [template for found in reader._templates.values() for template in found]
    assert not any(template._plans for template in templates)


class SlowDict(WeakValueDictionary[Any, Any]):
    """Of two threads that call `setdefault` at once, both look the key up before either sets it."""

    def __init__(self) -> None:
        super().__init__()
        self.both_have_looked = threading.Barrier(2)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        found = self.get(key)
        # The barrier breaks if the other thread waits until this one has set the key.
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both_have_looked.wait(0.2)
        if found is None:
            self[key] = found = default
        return found


def test_threads_that_make_one_layout_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_known", SlowDict())
    made: list[Layout] = []
    in_threads(lambda _: made.append(Layout.of(0, [(torch.float32, (3, 1, 4))])), 2)
    assert made[0] is made[1]
