"""`.safetensors` and `.npy` files, compared with the libraries that define the formats.

A test is skipped if the library that it compares with is not installed.
"""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pt import read

from gpucache_pipes import FeatureLoadError, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.files import FileOpener
from gpucache_pipes.testing import assert_same
from gpucache_pipes.testing.features import tensors

open_file = FileOpener(True).open


def import_numpy() -> Any:
    """Return numpy, or skip the test."""
    return pytest.importorskip("numpy", reason="numpy is not installed")


def import_safetensors() -> Any:
    """Return safetensors.torch, which needs numpy, or skip the test."""
    import_numpy()
    return pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def save_npy(path: Path | str, array: Any) -> None:
    import_numpy().save(path, array)


def save_safetensors(
    path: Path | str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    import_safetensors().save_file(tensors, str(path), metadata=metadata)


@given(st.dictionaries(st.text(min_size=1, max_size=4), tensors(), max_size=4))
def test_safetensors(tmp_path: Path, feature: dict[str, torch.Tensor]) -> None:
    feature = {k: v.contiguous().clone() for k, v in feature.items() if v.dtype != torch.complex128}
    path = str(tmp_path / "x.safetensors")
    save_safetensors(path, feature, metadata={"made": "by a test"})
    got = read(open_file(path))
    assert sorted(got) == sorted(feature)
    for name, tensor in feature.items():
        assert_same(got[name], tensor)


@given(
    st.sampled_from(
        ["f8", "f4", "f2", "c16", "c8", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"]
    ),
    st.lists(st.integers(0, 5), max_size=3),
    st.booleans(),
)
def test_npy(tmp_path: Path, dtype: str, shape: list[int], fortran: bool) -> None:
    np = import_numpy()
    array = np.arange(int(np.prod(shape))).reshape(shape).astype("<" + dtype)
    array = np.asfortranarray(array) if fortran else array
    path = str(tmp_path / "x.npy")
    np.save(path, array)
    assert_same(read(open_file(path)), torch.from_numpy(np.load(path)))


def large(path: Path, suffix: str) -> tuple[str, Any]:
    tensor = torch.arange(100_000, dtype=torch.int32).view(100, 1000)
    name = str(path / f"large{suffix}")
    if suffix == ".npy":
        save_npy(name, import_numpy().asfortranarray(tensor.numpy()))
        return name, tensor
    save_safetensors(name, {"x": tensor})
    return name, {"x": tensor}


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_large_files_and_a_pipeline(tmp_path: Path, suffix: str) -> None:
    path, feature = large(tmp_path, suffix)
    assert_same(read(open_file(path), [7, 5000]), feature)
    with GPUFeatureStore("cpu") as store:
        [found] = PathLister(tmp_path, pattern=f"*{suffix}")
        for _ in range(2):
            assert_same(store.get(found), feature)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_truncated_and_flipped_files_give_an_error_or_a_value(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        save_npy(path, import_numpy().arange(3))
    else:
        save_safetensors(path, {"x": torch.arange(3)})
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="load_fn"):
            open_file(str(path))
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with contextlib.suppress(ValueError):
            read(open_file(str(path)))


@pytest.mark.parametrize("flip", [0x01, 0x10, 0x1C, 0xFF])
def test_a_flipped_safetensors_file_is_what_the_library_says(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"w0": torch.arange(4), "w1": torch.arange(3)}
    save_safetensors(path, tensors, metadata={"by": "me"})
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        try:
            got = read(open_file(str(path)))
        except ValueError:
            continue
        expected = import_safetensors().load_file(str(path))
        assert set(got) == set(expected)
        for name, tensor in got.items():
            assert_same(tensor, expected[name])
    path.write_bytes(data + b"more")
    with pytest.raises(ValueError, match="do not end where the file does"):
        open_file(str(path))


def header(description: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(description).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        header({"x": {"dtype": "F32", "shape": [1 << 60, 1 << 60], "data_offsets": [0, 4]}}),
        header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}),
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        header({"x": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header({"x": [1]}),
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 100) + b"[" * 100,
    ],
)
def test_malicious_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match="load_fn"):
        store.get(path)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np = import_numpy()
    path = tmp_path / "x.npy"
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=r"\|O"):
        store.get(path)


IMPOSSIBLE = "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1180591620717411303424)}"


@pytest.mark.parametrize("text", [IMPOSSIBLE, "-" * 9000 + "1"])
def test_malicious_npy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode())
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match="load_fn"):
        store.get(path)


def npy_with(header: str, version: bytes = b"\1\0", data: bytes = b"") -> bytes:
    text = header.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        npy_with("{'descr': '<f4', 'fortran_order': 'False', 'shape': (1,)}", data=bytes(4)),
        npy_with("{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}", data=bytes(4)),
        npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}", data=bytes(4)),
        npy_with("{'descr': '<f4', 'shape': (1,)}", data=bytes(4)),
        npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"\1\1", bytes(4)),
        npy_with("['descr', 'fortran_order', 'shape']", data=bytes(4)),
        npy_with("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}\x0b", data=bytes(4)),
    ],
)
def test_npy_files_that_numpy_refuses(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        import_numpy().load(path)
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=r"x\.npy"):
        store.get(path)


def safetensors_with(header: bytes, data: bytes = bytes(4)) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ONE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    "content",
    [
        safetensors_with(f'{{"x": {ONE}}}'.encode("utf-16")),
        safetensors_with(f'{{"x": {ONE}}}'.encode("utf-32-le")),
        safetensors_with(b"\xef\xbb\xbf" + f'{{"x": {ONE}}}'.encode()),
        safetensors_with(f'{{"__metadata__": {{"a": 1}}, "x": {ONE}}}'.encode()),
        safetensors_with(f'{{"__metadata__": [], "x": {ONE}}}'.encode()),
        safetensors_with(f'{{"__metadata__": "a", "x": {ONE}}}'.encode()),
        safetensors_with(f'{{"\\ud800": {ONE}}}'.encode()),
        safetensors_with(f'{{"__metadata__": {{"a": "\\udc00"}}, "x": {ONE}}}'.encode()),
        safetensors_with(f'{{"x": {ONE}, "y": NaN}}'.encode()),
    ],
)
def test_safetensors_files_that_the_library_refuses(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    library = import_safetensors()
    with pytest.raises(pytest.importorskip("safetensors").SafetensorError):
        library.load_file(path)
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=r"x\.safetensors"):
        store.get(path)


def test_metadata_and_names_of_all_languages(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    feature = {"\u00e4\U0001f600": torch.ones(1)}
    save_safetensors(path, feature, metadata={"\u540d": "\u4e2d"})
    with GPUFeatureStore("cpu") as store:
        assert_same(store.get(path), feature)
    escaped = f'{{"\\ud83d\\ude00": {ONE}, "__metadata__": null}}'
    path.write_bytes(safetensors_with(escaped.encode()))
    assert list(import_safetensors().load_file(path)) == ["\U0001f600"]
    with GPUFeatureStore("cpu") as store:
        assert list(store.get(path)) == ["\U0001f600"]


EMPTY = [(1 << 32, 1 << 32, 0), (0, 1 << 62), (1 << 40, 1 << 20, 0, 3)]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("shape", EMPTY)
def test_empty_tensors_of_impossible_shape(
    tmp_path: Path, suffix: str, shape: tuple[int, ...]
) -> None:
    """The batch that needs the file raises; with on_error="skip" the file is left out."""
    bad, good = tmp_path / f"bad{suffix}", tmp_path / f"good{suffix}"
    if suffix == ".npy":
        save_npy(good, import_numpy().ones(1, "f4"))
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"
        bad.write_bytes(npy_with(header))
    else:
        save_safetensors(good, {"x": torch.ones(1)})
        sides = list(shape)
        text = f'{{"x": {{"dtype": "F32", "shape": {sides}, "data_offsets": [0, 0]}}}}'
        bad.write_bytes(safetensors_with(text.encode(), b""))
    with GPUFeatureStore("cpu") as store:
        with pytest.raises(FeatureLoadError, match=f"bad{suffix}.*impossible shape"):
            store.get_batch([good, bad])
        node = GPUPrefetcher([[good, bad]], store, on_error="skip")
        assert [len(batch) for batch in node] == [1]
        assert len(store) == 1
