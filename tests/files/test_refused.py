"""Files that would harm the process in `torch.load` give an error that names the file."""

import collections
import gc
import io
import os
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sample
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import FeatureLoadError, GPUFeatureStore, GPUPrefetcher
from gpucache_pipes.files import planned
from gpucache_pipes.testing import assert_same

Files = Callable[..., list[str]]


@pytest.fixture
def store() -> Iterator[GPUFeatureStore]:
    with GPUFeatureStore("cpu", reader_threads=2) as store:
        yield store


def write(path: Path, feature: Any, **records: bytes) -> Path:
    """Write a file by torch.save, and replace some of its records."""
    buffer = io.BytesIO()
    torch.save(feature, buffer)
    method = zipfile.ZIP_DEFLATED if records.pop("deflated", b"") else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", method) as new:
        for record in old.infolist():
            name = record.filename.partition("/")[2]
            new.writestr(record.filename, records.get(name, old.read(record)))
    return path


def require_refused(store: GPUFeatureStore, bad: Path, good: str, says: str) -> None:
    """Assert that the batch that needs `bad` names it, and that on_error="skip" leaves it out."""
    with pytest.raises(FeatureLoadError, match=f"{bad.name}.*{says}"):
        store.get_batch([good, bad])
    node = GPUPrefetcher([[good, bad], [good]], store, on_error="skip")
    assert [[int(f["label"]) for f in batch] for batch in node] == [[0], [0]]
    assert bad not in store
    store.check()


def nested(depth: int) -> bytes:
    """Nested tuples as the key of a dict."""
    return b"\x80\x02}(" + b")" + b"\x85" * depth + b"K\x01u."


def shared(depth: int) -> bytes:
    """A pair of pairs of pairs, each holding one pair twice: 2**depth parts to hash."""
    pair = b"".join(b"q%ch%c\x86" % (n, n) for n in range(depth))
    return b"\x80\x02}(" + b")" + pair + b"K\x01u."


def as_arguments(depth: int) -> bytes:
    """Nested tuples in the argument of a class that makes keys of them."""
    key = b")" + b"\x85" * depth
    return b"\x80\x02ccollections\nOrderedDict\n](](" + key + b"K\x01ee\x85R."


def wide() -> bytes:
    """A tuple that holds one tuple many times, twice over: few bytes and millions of parts."""
    level = b"h\x00" * 200
    return b"\x80\x02})q\x000(" + b"(" + level + b"tq\x000" + b"(" + level + b"tK\x01u."


def called(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def made(module: str, name: str, argument: bytes, how: bytes = b"R") -> bytes:
    """A dict that holds the result of calling a global."""
    key = b"X\x01\x00\x00\x00x"
    return b"\x80\x02}" + key + called(module, name) + argument + b"\x85" + how + b"s."


def storage_named(key: bytes) -> bytes:
    kind, device = b"X\x07\x00\x00\x00storage", b"X\x03\x00\x00\x00cpu"
    name = called("torch", "FloatStorage")
    return b"\x80\x02(" + kind + name + key + device + b"K\x01tQ."


def colliding(count: int) -> bytes:
    """A dict whose keys are complex numbers with one hash."""
    numbers = [
        b"h\x00G" + struct.pack(">d", -1000003.0 * n) + b"G" + struct.pack(">d", n) + b"\x86RK\x01"
        for n in range(count)
    ]
    return b"\x80\x02" + called("builtins", "complex") + b"q\x000}(" + b"".join(numbers) + b"u."


@pytest.mark.parametrize("deflated", [b"", b"1"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (nested(200_000), "tuples"),
        (nested(5), "a key of a dict holds tuples"),
        (shared(60), "tuple"),
        (as_arguments(200_000), "tuples"),
        (nested(3)[:-2], "not a torch.save file, or a damaged one"),
        (b"\x80\x02}(\x8a\x09" + (1 << 70).to_bytes(9, "little") + b"K\x01u.", "beyond 64 bits"),
        (as_arguments(5), "may be large tuples"),
        (shared(4), "a key of a dict holds tuples"),
        (wide(), "a key of a dict holds tuples"),
        (nested(200_000).replace(b"\x80\x02}(", b"\x80\x02"), "tuples"),
        (made("torch", "Tensor", b"M\x00\x40"), "whatever is in memory"),
        (made("torch", "Tensor", b"M\x00\x40", b"\x81"), "whatever is in memory"),
        (made("torch", "FloatStorage", b"M\x00\x40"), "whatever is in memory"),
        (made("torch.nn.parameter", "Parameter", b"M\x00\x40"), "whatever is in memory"),
        (made("builtins", "bytearray", b"\x8a\x05\0\0\0\xc0\0"), "not in the file"),
        (storage_named(b")" + b"\x85" * 200_000), "tuples"),
        (storage_named(b")" + b"\x85" * 5), "named in an unusual way"),
        (storage_named(b"K\x01"), "named in an unusual way"),
        (colliding(3000), "keys of dicts are tuples"),
        (b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".", "nested containers|recursion"),
    ],
)
def test_keys_that_no_data_set_has(
    store: GPUFeatureStore,
    make_files: Files,
    tmp_path: Path,
    content: bytes,
    says: str,
    deflated: bytes,
) -> None:
    records = {"data.pkl": content, "deflated": deflated}
    bad = write(tmp_path / "bad.pt", torch.ones(1), **records)
    require_refused(store, bad, make_files(1)[0], says)


def test_deep_keys_of_the_old_format(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    torch.save({(1, 2): torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    key = b"K\x01K\x02\x86"
    assert data.count(key) == 1
    bad = tmp_path / "bad.pt"
    bad.write_bytes(data.replace(key, b")" + b"\x85" * 100_000))
    require_refused(store, bad, make_files(1)[0], "tuples")


MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
DEEP = b")" + b"\x85" * 100_000


def legacy(feature: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(feature, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def without_keys() -> bytes:
    data = legacy({"x": torch.arange(5000.0)})
    return data[: data.rindex(b"\x80\x02]")] + b"\x80\x02]."


@pytest.mark.parametrize(
    "content",
    [
        MAGIC + b"M\xe9\x03.}.}" + DEEP + b"K\x01s.].",  # pickles without a PROTO opcode
        b"\x80\x02" + MAGIC + b"\x80\x02M\xe9\x03.\x80\x02}.\x80\x02}.\x80\x02]" + DEEP + b"a.",
        b"\x80\x02" + MAGIC + b"\x80\x02M\xe9\x03.\x80\x02}.\x80\x02}.\x80\x02])a.",
        without_keys(),
        legacy({"x": torch.arange(5000.0)})[:-100],
        legacy({"x": torch.arange(5000.0)}).replace((5000).to_bytes(8, "little"), bytes(8)),
    ],
)
def test_the_old_format(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path, content: bytes
) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(content)
    require_refused(store, bad, make_files(1)[0], "")


def test_directories_that_readers_of_zip_files_see_differently(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path
) -> None:
    good = make_files(1)[0]
    capital = write(tmp_path / "capital.pt", torch.ones(1), **{"data.pkl": nested(200_000)})
    data = capital.read_bytes()
    capital.write_bytes(data.replace(b"data.pkl", b"DATA.PKL"))
    require_refused(store, capital, good, "")
    # A harmless directory directly before the end record, where some readers look, and another
    # one at the offset that the end record states.
    at = data.rindex(b"PK\5\6")
    size, offset = struct.unpack_from("<LL", data, at + 12)
    harmless = data[offset : offset + size].replace(b"data.pkl", b"data.pkx")
    two = tmp_path / "two.pt"
    two.write_bytes(data[:at] + harmless + data[at:])
    require_refused(store, two, good, "unusual")


keys = st.one_of(st.integers(-5, 5), st.text(max_size=2), st.none(), st.booleans(), st.floats(0, 1))


@given(
    st.dictionaries(st.one_of(keys, st.tuples(keys, keys), st.tuples(keys, st.tuples(keys))), keys),
    st.sampled_from([dict, collections.OrderedDict]),
    st.booleans(),
)
def test_keys_that_data_sets_may_have(
    tmp_path_factory: pytest.TempPathFactory, feature: dict[Any, Any], kind: Any, zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("k") / "x.pt"
    feature = kind(feature)
    torch.save(feature, path, _use_new_zipfile_serialization=zipped)
    with GPUFeatureStore("cpu") as store:
        assert_same(store.get(path), torch.load(path))


def test_many_keys_of_one_hash(store: GPUFeatureStore, make_files: Files, tmp_path: Path) -> None:
    """Comparing these keys took eight seconds."""
    feature = {number * sys.hash_info.modulus: number for number in range(20_000)}
    bad = tmp_path / "bad.pt"
    torch.save(feature, bad)
    begun = time.process_time()
    require_refused(store, bad, make_files(1)[0], "beyond 64 bits")
    assert time.process_time() - begun < 3  # processor time, which other processes do not affect


def test_a_record_that_is_marked_as_a_directory(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path
) -> None:
    """torch.load returns whatever is in memory."""
    good = make_files(1)[0]
    data = Path(good).read_bytes()
    with zipfile.ZipFile(good) as archive:
        at = archive.start_dir
        names = [record.filename for record in archive.infolist()]
    marked = 0
    for name in names:
        sizes = struct.unpack_from("<HHH", data, at + 28)
        if name.partition("/")[2].startswith("data/"):
            bad = tmp_path / f"bad{marked}.pt"
            flipped = bytearray(data)
            flipped[at + 38] ^= 0x10
            bad.write_bytes(flipped)
            require_refused(store, bad, good, "directory")
            with pytest.raises(FeatureLoadError), GPUFeatureStore("cpu", weights_only=False) as s:
                s.get(bad)
            marked += 1
        at += 46 + sum(sizes)
    assert marked == 2


@pytest.mark.parametrize("size", [0, 4, 28])
def test_a_record_that_is_shorter_than_its_storage(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path, size: int
) -> None:
    bad = write(tmp_path / "bad.pt", torch.arange(8.0), **{"data/0": bytes(size)})
    require_refused(store, bad, make_files(1)[0], "damaged|not a torch.save file")


def test_a_file_that_unpacks_to_much_more(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path
) -> None:
    bad = write(tmp_path / "bad.pt", torch.zeros(1 << 20), deflated=b"1")
    require_refused(store, bad, make_files(1)[0], "unpacks to")
    usual = write(tmp_path / "usual.pt", torch.randn(1 << 10), deflated=b"1")
    assert_same(store.get(usual), torch.load(usual))


@pytest.mark.parametrize("name", ["data/0", "data.pkl"])
def test_a_compressed_record_that_is_damaged(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path, name: str
) -> None:
    """torch.load returns the bytes before the damage, and then whatever is in memory."""
    bad = write(tmp_path / "bad.pt", torch.arange(1000), deflated=b"1")
    good, data = make_files(1)[0], bad.read_bytes()
    with zipfile.ZipFile(bad) as archive:
        [record] = [r for r in archive.infolist() if r.filename.endswith(name)]
    start = record.header_offset + 30 + len(record.filename)
    for at in range(start, start + record.compress_size, 1 + record.compress_size // 20):
        bad.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        os.utime(bad, (at, at))
        with pytest.raises(FeatureLoadError, match="damaged"):
            store.get(bad)
    require_refused(store, bad, good, "damaged")


def saved_tensor(shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """Return the pickle of torch.ones(1), with another shape."""
    buffer = io.BytesIO()
    torch.save(torch.ones(1), buffer)
    with zipfile.ZipFile(buffer) as archive:
        old = archive.read("archive/data.pkl")
    part = b"K\x00K\x01\x85q\x06K\x01\x85q\x07"
    assert part in old
    numbers = [pickle.dumps(numbers, 2)[2:-1] for numbers in (shape, strides)]
    return old.replace(part, b"K\x00" + b"".join(numbers))


@pytest.mark.parametrize(
    "shape", [(0, -5), (-5, 0), (-1,), (-2, -3), (1 << 32, 1 << 32, 0), (0, 1 << 62)]
)
def test_tensors_of_impossible_shape(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    content = saved_tensor(shape, (1,) * len(shape))
    bad = write(tmp_path / "bad.pt", torch.ones(1), **{"data.pkl": content})
    require_refused(store, bad, make_files(1)[0], "impossible shape|not a torch.save file")


def test_a_tensor_that_torch_load_refuses(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path
) -> None:
    """A tensor with a dtype of its own cannot require gradients."""
    buffer = io.BytesIO()
    torch.save(torch.ones(4).to(torch.float8_e4m3fn), buffer)
    with zipfile.ZipFile(buffer) as archive:
        old = archive.read("archive/data.pkl")
    at = old.index(b"\x89")
    content = old[:at] + b"\x88" + old[at + 1 :]
    bad = write(tmp_path / "bad.pt", torch.ones(4).to(torch.float8_e4m3fn), **{"data.pkl": content})
    with pytest.raises(RuntimeError):
        torch.load(bad)
    require_refused(store, bad, make_files(1)[0], "not a torch.save file|requires")


# A descriptor that nothing owns yet is closed together with the error, and Python warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("python_reader")
@pytest.mark.parametrize("where", ["follow", "__init__"])
def test_a_descriptor_is_closed_once(
    make_files: Files, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A failure after opening closes it once: its number may be another file's afterwards."""
    [path, other] = make_files(2)
    method = getattr(planned.PlannedFeature, where)

    def failing(self: Any, *arguments: Any) -> None:
        method(self, *arguments)
        raise MemoryError("injected")

    monkeypatch.setattr(planned.PlannedFeature, where, failing)
    with GPUFeatureStore("cpu", asynchronous=False) as store:
        before = os.open(other, os.O_RDONLY)
        os.close(before)  # the next number that the system assigns
        try:
            store.get(path)
        except MemoryError as error:
            kept = error  # keeps its traceback alive, and so the objects in it
            gc.collect()
            taken = os.open(other, os.O_RDONLY)
            assert where == "__init__" or taken == before, "left open"
            del error, kept
        gc.collect()
        assert os.fstat(taken).st_size, "closed twice"
        os.close(taken)
        monkeypatch.undo()
        assert_same(store.get(path), sample(0))
