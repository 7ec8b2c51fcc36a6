"""Files that would bring `torch.load`, or the process, down: an error that names the file."""

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
    """A file of torch.save, of which some records are replaced."""
    buffer = io.BytesIO()
    torch.save(feature, buffer)
    method = zipfile.ZIP_DEFLATED if records.pop("deflated", b"") else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", method) as new:
        for record in old.infolist():
            name = record.filename.partition("/")[2]
            new.writestr(record.filename, records.get(name, old.read(record)))
    return path


def require_refused(store: GPUFeatureStore, bad: Path, good: str, says: str) -> None:
    """An error at the batch that needs it, which names it; and it can be left out."""
    with pytest.raises(FeatureLoadError, match=f"{bad.name}.*{says}"):
        store.get_batch([good, bad])
    node = GPUPrefetcher([[good, bad], [good]], store, on_error="skip")
    assert [[int(f["label"]) for f in batch] for batch in node] == [[0], [0]]
    assert bad not in store
    store.check()


def nested(depth: int) -> bytes:
    """A tuple in a tuple in a tuple, as the key of a dict."""
    return b"\x80\x02}(" + b")" + b"\x85" * depth + b"K\x01u."


def shared(depth: int) -> bytes:
    """A pair of pairs of pairs, each twice the same: 2**depth of them to look at."""
    pair = b"".join(b"q%ch%c\x86" % (n, n) for n in range(depth))
    return b"\x80\x02}(" + b")" + pair + b"K\x01u."


def as_arguments(depth: int) -> bytes:
    """The same as an argument of a class that makes keys of it."""
    key = b")" + b"\x85" * depth
    return b"\x80\x02ccollections\nOrderedDict\n](](" + key + b"K\x01ee\x85R."


@pytest.mark.parametrize("deflated", [b"", b"1"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (nested(200_000), "a key that is a tuple"),
        (nested(5), "a key that is a tuple"),
        (shared(60), "a key that is a tuple"),
        (as_arguments(200_000), "keys that may be tuples"),
        (nested(3)[:-2], "damaged pickle"),
        (b"\x80\x02}(\x8a\x09" + (1 << 70).to_bytes(9, "little") + b"K\x01u.", "beyond 64 bits"),
        (b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".", "in one another|recursion"),
    ],
    ids=["deep", "five", "shared", "arguments", "cut", "large", "lists"],
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
    require_refused(store, bad, make_files(1)[0], "a key that is a tuple")


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
    """They took eight seconds."""
    feature = {number * sys.hash_info.modulus: number for number in range(20_000)}
    bad = tmp_path / "bad.pt"
    torch.save(feature, bad)
    begun = time.process_time()
    require_refused(store, bad, make_files(1)[0], "beyond 64 bits")
    assert time.process_time() - begun < 3  # of the processor: other processes do not matter


def test_a_record_that_is_marked_as_a_directory(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path
) -> None:
    """torch.load gives whatever its memory holds."""
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
    require_refused(store, bad, make_files(1)[0], "damaged|not a file")


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
    """torch.load gives what it has unpacked until then, and for the rest what its memory holds."""
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
    """The pickle of torch.ones(1), of another shape."""
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
    require_refused(store, bad, make_files(1)[0], "impossible shape|not a file")


def test_a_tensor_that_torch_load_refuses(
    store: GPUFeatureStore, make_files: Files, tmp_path: Path
) -> None:
    """One with a dtype of its own cannot require gradients."""
    buffer = io.BytesIO()
    torch.save(torch.ones(4).to(torch.float8_e4m3fn), buffer)
    with zipfile.ZipFile(buffer) as archive:
        old = archive.read("archive/data.pkl")
    at = old.index(b"\x89")
    content = old[:at] + b"\x88" + old[at + 1 :]
    bad = write(tmp_path / "bad.pt", torch.ones(4).to(torch.float8_e4m3fn), **{"data.pkl": content})
    with pytest.raises(RuntimeError):
        torch.load(bad)
    require_refused(store, bad, make_files(1)[0], "not a file of torch.save|requires")


# Where nothing has it yet, a descriptor is closed with the error, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("where", ["follow", "__init__"])
def test_a_descriptor_is_closed_once(
    make_files: Files, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whatever fails behind opening: by the second time its number may be another file's."""
    [path, other] = make_files(2)
    method = getattr(planned.PlannedFeature, where)

    def failing(self: Any, *arguments: Any) -> None:
        method(self, *arguments)
        raise MemoryError("injected")

    monkeypatch.setattr(planned.PlannedFeature, where, failing)
    with GPUFeatureStore("cpu", asynchronous=False) as store:
        before = os.open(other, os.O_RDONLY)
        os.close(before)  # the number that is next
        try:
            store.get(path)
        except MemoryError as error:
            kept = error  # with its traceback, and so with what is in it
            gc.collect()
            taken = os.open(other, os.O_RDONLY)
            assert where == "__init__" or taken == before, "left open"
            del error, kept
        gc.collect()
        assert os.fstat(taken).st_size, "closed twice"
        os.close(taken)
        monkeypatch.undo()
        assert_same(store.get(path), sample(0))
