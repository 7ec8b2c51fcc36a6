"""`pack`: the packed directory is used as the directory it was made of, name by name."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes import (
    FeatureLoadError,
    GPUCachedPathDataLoader,
    GPUFeatureStore,
    PathLister,
)
from gpucache_pipes.cli.main import main
from gpucache_pipes.files import LocalFiles, file_size
from gpucache_pipes.files.packed import native, packed_directory, packing
from gpucache_pipes.files.packed.packed_directory import MARKER
from gpucache_pipes.files.packed.packing import pack, verify
from gpucache_pipes.files.packed.segment import Segment
from gpucache_pipes.testing.features import Pair, assert_same, features

Files = Callable[..., list[str]]
LONG_AGO = 1_000_000_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Old files, some of them in subdirectories."""
    root = tmp_path / "source"
    for n in range(20):
        directory = root if n < 15 else root / f"sub{n % 2}" / "deep"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / (f".{n}.pt" if n == 3 else f"{n}.pt")
        torch.save({"x": torch.arange(2 + n % 3) + n, "name": f"n{n}", "y": torch.rand(2)}, path)
        os.utime(path, (LONG_AGO + n, LONG_AGO + n))
    return root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def load_all(paths: list[str]) -> list[Any]:
    with GPUFeatureStore("cpu") as store:
        return list(store.get_batch(paths))


@pytest.mark.parametrize(
    ("pattern", "recursive"), [("*.pt", False), ("*.pt", True), ("1*.pt", True), (".*", False)]
)
def test_names_order_and_features_are_those_of_the_source(
    source: Path, target: Path, pattern: str, recursive: bool
) -> None:
    pack(str(source), str(target), pattern=pattern, recursive=recursive)
    expected = PathLister(source, pattern=pattern, recursive=recursive).paths
    for again in (pattern, "*.pt" if pattern != ".*" else pattern):
        found = PathLister(target, pattern=again, recursive=recursive).paths
        assert [os.path.relpath(path, target) for path in found] == [
            os.path.relpath(path, source) for path in expected
        ]
    shutil.rmtree(source)
    some = load_all(found)
    for path, feature in zip(expected, some, strict=True):
        number = int(Path(path).stem.strip("."))
        assert feature["name"] == f"n{number}"
        assert feature["x"].tolist() == [number + k for k in range(2 + number % 3)]


@settings(max_examples=30)
@given(items=st.lists(features(), min_size=1, max_size=6), segment_bytes=st.integers(1, 300))
def test_a_packed_directory_holds_what_its_files_hold(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], segment_bytes: int
) -> None:
    root = tmp_path_factory.mktemp("pack")
    (root / "source").mkdir()
    for n, item in enumerate(items):
        torch.save(item, root / "source" / f"{n}.pt")
        os.utime(root / "source" / f"{n}.pt", (LONG_AGO, LONG_AGO))
    source, target = str(root / "source"), str(root / "target")
    pack(source, target, segment_bytes=segment_bytes)
    assert verify(source, target) == {}
    with GPUFeatureStore("cpu") as store:
        for n, item in enumerate(items):
            assert_same(store.get(f"{target}/{n}.pt"), item)


def test_paths_are_known_without_a_listing(source: Path, target: Path) -> None:
    pack(str(source), str(target), recursive=True)
    link = target.parent / "link"
    link.symlink_to(target)
    for path in (f"{target}/sub1/deep/15.pt", f"{link}/sub1/deep/15.pt", f"{target}/7.pt"):
        [feature] = load_all([path])
        assert feature["name"] == ("n7" if path.endswith("7.pt") else "n15")
        assert file_size(path) > 0
    with pytest.raises(
        FileNotFoundError, match=r"the packed directory .* has no such file: .*99\.pt"
    ):
        load_all([f"{target}/99.pt"])


def test_options_of_a_store_apply(source: Path, target: Path) -> None:
    pack(str(source), str(target))
    with GPUFeatureStore("cpu", keys=["x"], dtype={"x": torch.float64}) as store:
        feature = store.get(target / "4.pt")
        assert_same(feature, {"x": torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)})
        with pytest.raises(FileNotFoundError):
            store.get(target / "99.pt")
    with (
        GPUFeatureStore("cpu", keys=["z"]) as store,
        pytest.raises(FeatureLoadError, match=r"keys= names feature\['z'\]"),
    ):
        store.get(target / "4.pt")
    with GPUFeatureStore("cpu", disk_cache=target.parent / "cache") as store:
        load = store.get(target / "4.pt")
    with GPUFeatureStore("cpu", disk_cache=target.parent / "cache") as store:
        assert_same(store.get(target / "4.pt"), load)
        assert store.stats().disk_hits == 1


def test_keys_and_dtype_of_pack(source: Path, target: Path) -> None:
    pack(str(source), str(target), keys=["y"], dtype=torch.float16)
    feature = load_all([f"{target}/4.pt"])[0]
    assert list(feature) == ["y"] and feature["y"].dtype == torch.float16
    with pytest.raises(ValueError, match="was packed with keys="):
        pack(str(source), str(target))


def test_a_loader_trains_on_it(source: Path, target: Path) -> None:
    pack(str(source), str(target))
    lister = PathLister(target, batch_size=4, shuffle=True, seed=1)
    with GPUCachedPathDataLoader(lister, device="cpu", keys=["y"]) as loader:
        for _ in range(2):
            assert sum(len(batch["y"]) for batch in loader) == 14


# Going on, and going wrong


def test_pack_goes_on_where_it_was_interrupted(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_CHUNK_FILES", 3)
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(str(source), str(target), recursive=True, progress=interrupt)
    with pytest.raises(ValueError, match="is not packed completely"):
        PathLister(target)
    with pytest.raises(FeatureLoadError, match="is not packed completely"):
        load_all([f"{target}/4.pt"])
    report = pack(str(source), str(target), recursive=True)
    assert (report.files, report.read) == (19, 10)
    assert verify(str(source), str(target)) == {}
    assert pack(str(source), str(target), recursive=True).read == 0


def test_what_changed_is_packed_again(source: Path, target: Path) -> None:
    pack(str(source), str(target), segment_bytes=300)
    torch.save({"x": torch.ones(1)}, source / "7.pt")
    os.utime(source / "7.pt", (LONG_AGO, LONG_AGO))
    (source / "8.pt").unlink()
    torch.save({"x": torch.ones(2)}, source / "77.pt")
    os.utime(source / "77.pt", (LONG_AGO, LONG_AGO))
    report = pack(str(source), str(target), segment_bytes=300)
    assert 2 <= report.read < report.files == 14
    assert verify(str(source), str(target)) == {}
    names = [Path(path).name for path in PathLister(target).paths]
    assert "8.pt" not in names and "77.pt" in names
    assert_same(load_all([f"{target}/7.pt"])[0], {"x": torch.ones(1)})


def test_files_that_cannot_be_packed_are_named(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "5.pt").write_bytes(b"nothing")
    torch.save(Pair(torch.ones(1), 2), source / "6.pt")
    assert main(["pack", str(source), str(target), "--unsafe"]) == 1
    printed = capsys.readouterr().out
    assert "5.pt" in printed and "it holds a Pair" in printed
    assert "2 files could not be packed" in printed
    (source / "5.pt").unlink()
    (source / "6.pt").unlink()
    assert main(["pack", str(source), str(target), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "12 features in" in printed and "verified: all 12 features" in printed


def test_the_command_reports(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(source), str(target), "--recursive", "--json", "--verify"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["files"], report["read"], report["segments"], report["verified"]) == (
        19,
        19,
        1,
        19,
    )
    assert len(os.listdir(target)) == 2
    assert main(["pack", str(source), str(target), "--recursive"]) == 0
    assert "(19 of them from before)" in capsys.readouterr().out
    assert main(["inspect", str(target), "--recursive"]) == 0
    assert "19 files" in capsys.readouterr().out.replace("19 features", "19 files")
    assert main(["inspect", f"{target}/4.pt"]) == 0
    assert "\n  ['x']" in capsys.readouterr().out
    assert main(["plan", str(target), "--gpu-memory", "1KiB"]) == 0


def test_verify_finds_damage_and_differences(source: Path, target: Path) -> None:
    pack(str(source), str(target))
    segment = Segment(str(target / "packed00000.safetensors"), with_names=True)
    row = segment.names().index("9.pt")
    with Path(segment.path).open("r+b") as file:
        file.seek(segment.record(row).start)
        file.write(b"!")
    torch.save({"x": 3}, source / "10.pt")
    os.utime(source / "10.pt", (LONG_AGO, LONG_AGO))
    (source / "11.pt").unlink()
    wrong = verify(str(source), str(target))
    assert set(wrong) == {"9.pt", "10.pt", "11.pt"}
    assert wrong["9.pt"] == "its record is damaged"
    assert set(verify(None, str(target))) == {"9.pt"}
    with (
        GPUFeatureStore("cpu") as store,
        pytest.raises(FeatureLoadError, match="packed record is damaged"),
    ):
        store.get(target / "9.pt")
    Path(segment.path).write_bytes(b"")
    (target / MARKER).touch()
    with pytest.raises(ValueError, match=r"packed00000\.safetensors' is damaged"):
        PathLister(target)


def test_what_others_wrote_is_left_alone(source: Path, target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex'"):
        pack(str(source), str(target))
    assert os.listdir(target) == ["thesis.tex"]
    with pytest.raises(FileNotFoundError):
        pack(str(target / "nothing"), str(target.parent / "other"))
    assert not (target.parent / "other").exists()


def test_a_kill_leaves_what_was_complete(source: Path, target: Path) -> None:
    script = (
        "import sys, os, signal; from gpucache_pipes.files.packed import packing as p; "
        "p._CHUNK_FILES = 2; "
        "p.pack(sys.argv[1], sys.argv[2], segment_bytes=1, "
        "progress=lambda done, total: done > 6 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(source), str(target)], check=False)
    assert killed.returncode == -9
    report = pack(str(source), str(target))
    assert 0 < report.read < report.files == 14
    assert verify(str(source), str(target)) == {}
    assert not [name for name in os.listdir(target) if name.endswith(".part")]


def test_one_process_at_a_time(source: Path, target: Path) -> None:
    target.mkdir()
    with packing._lock(str(target)), pytest.raises(BlockingIOError, match="another process"):
        pack(str(source), str(target))


def test_revalidate_sees_a_directory_that_was_packed_again(source: Path, target: Path) -> None:
    pack(str(source), str(target))
    path = str(target / "7.pt")
    with GPUFeatureStore("cpu", revalidate=True) as store:
        assert store.get(path)["name"] == "n7"
        assert store.get(path)["name"] == "n7" and store.stats().files_read == 1
        torch.save({"name": "new"}, source / "7.pt")
        os.utime(source / "7.pt", (LONG_AGO, LONG_AGO))
        pack(str(source), str(target))
        assert PathLister(target).paths  # looks at the marker
        assert store.get(path)["name"] == "new"
    assert LocalFiles().version(str(target / "99.pt")) is None


def test_a_packed_directory_can_be_packed(source: Path, target: Path) -> None:
    pack(str(source), str(target))
    again = str(target.parent / "again")
    pack(str(target), again, keys=["x"])
    assert_same(load_all([f"{again}/4.pt"])[0], {"x": torch.tensor([4, 5, 6])})
    assert pack(str(target), again, keys=["x"]).read == 0


def test_no_file_of_the_user_is_removed(source: Path, target: Path) -> None:
    target.mkdir()
    for name in ("movie.mp4.part", "packed00001.safetensors", "packed00001-mine.safetensors"):
        (target / name).write_text("mine")
        with pytest.raises(ValueError, match="give a directory that is empty or not there"):
            pack(str(source), str(target))
        assert (target / name).read_text() == "mine"
        (target / name).unlink()
    pack(str(source), str(target))
    for name in ("movie.mp4.part", "packed-notes.part", "packed00001-mine.safetensors"):
        (target / name).write_text("mine")
    pack(str(source), str(target))
    assert len([path for path in target.iterdir() if path.read_bytes() == b"mine"]) == 3


def test_source_and_target_are_apart(source: Path, target: Path) -> None:
    pack(str(source), str(target))
    for one, other in ((target, target), (source, source / "in"), (source / "sub1", source)):
        with pytest.raises(ValueError, match="are one in the other"):
            pack(str(one), str(other), recursive=True)
    assert verify(str(source), str(target)) == {}
    for wrong in (f"{source}/*.pt", f"{source}/7.pt"):
        with pytest.raises((ValueError, FileNotFoundError)):
            pack(wrong, str(target.parent / "other"))


def test_a_directory_that_is_replaced_is_noticed(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_directory, "_LOOK_SECONDS", 0.0)
    pack(str(source), str(target))
    path = str(target / "7.pt")
    assert load_all([path])[0]["name"] == "n7"
    torch.save({"name": "new"}, source / "7.pt")
    os.utime(source / "7.pt", (LONG_AGO, LONG_AGO))
    pack(str(source), str(target))
    assert load_all([path])[0]["name"] == "new"
    shutil.rmtree(target)
    target.mkdir()
    torch.save({"name": "plain"}, path)
    assert load_all([path])[0]["name"] == "plain"


def test_verify_compares_with_keys_and_dtype(source: Path, target: Path) -> None:
    options: dict[str, Any] = {"keys": ["y"], "dtype": torch.float16}
    pack(str(source), str(target), **options)
    assert verify(str(source), str(target), **options) == {}
    feature = torch.load(source / "7.pt")
    torch.save({**feature, "y": feature["y"] + 1}, source / "7.pt")
    assert set(verify(str(source), str(target), **options)) == {"7.pt"}


@pytest.mark.parametrize("native_reader", [True, False])
def test_paths_of_several_directories_in_one_request(
    tmp_path: Path, native_reader: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal and other lengths, packed and not, with the same names in all of them."""
    if not native_reader:
        monkeypatch.setattr(native, "native", None)
        monkeypatch.setattr(native, "_packed", None)
    held: dict[str, int] = {}
    for number, name in enumerate(("one", "two", "six", "longer", "o", "oneone")):
        source = tmp_path / f"source{number}"
        source.mkdir()
        for n in range(6):
            torch.save(torch.tensor(100 * number + n), source / f"{n}.pt")
            os.utime(source / f"{n}.pt", (LONG_AGO, LONG_AGO))
        if number in (0, 1, 3, 5):
            pack(str(source), str(tmp_path / name))
        else:
            source.rename(tmp_path / name)
        held.update({str(tmp_path / name / f"{n}.pt"): 100 * number + n for n in range(6)})
    for seed in range(4):
        paths = random.Random(seed).sample(sorted(held), len(held))
        for asynchronous in (True, False):
            with GPUFeatureStore("cpu", asynchronous=asynchronous) as store:
                ahead = [store.request(paths[at : at + 5]) for at in range(0, len(paths), 5)]
                found = [int(feature) for batch in ahead for feature in batch.result()]
                assert found == [held[path] for path in paths]


def test_a_new_store_sees_what_was_packed_in_the_meantime(source: Path, target: Path) -> None:
    pack(str(source), str(target))
    assert load_all([f"{target}/7.pt"])[0]["name"] == "n7"
    other = target.parent / "other"
    torch.save({"name": "new"}, source / "7.pt")
    os.utime(source / "7.pt", (LONG_AGO, LONG_AGO))
    pack(str(source), str(other))
    shutil.rmtree(target)
    other.rename(target)
    assert load_all([f"{target}/7.pt"])[0]["name"] == "new"
