"""The contracts of sources, formats and backends hold for ours, and can fail."""

import errno
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ACCELERATOR
from hypothesis import Phase, settings
from hypothesis import strategies as st

from gpucache_pipes.device import (
    AcceleratorBackend,
    Backend,
    Column,
    HostBackend,
    InOrderRuntime,
    Reservation,
    growing_arena,
    host,
    open_backend,
    resolve_device,
)
from gpucache_pipes.files import Layout, LoadedFeature, LocalFiles, OpenFeature, Source
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.npy import NpyReader
from gpucache_pipes.files.planned import Bytes, PlannedFeature, PlanReader
from gpucache_pipes.files.plans import Extent, ReadPlan
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.files.safetensors import SafetensorsReader
from gpucache_pipes.testing import (
    BackendContract,
    FormatContract,
    SimulatedRuntime,
    SourceContract,
    UnorderedAccessError,
    assert_same,
    features,
)
from gpucache_pipes.testing.features import tensors

CPU = torch.device("cpu")


def fails(
    test: Callable[..., None],
    *args: Any,
    error: type[Exception] | tuple[type[Exception], ...] = AssertionError,
) -> None:
    """Require that a test of a contract fails.

    Hypothesis draws as many examples as it takes, and does not shrink the one that fails.
    """
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(test, "hypothesis"):
            quick = settings(
                test._hypothesis_internal_use_settings,  # type: ignore[attr-defined]
                max_examples=1000,
                phases=[Phase.generate],
                database=None,
            )
            patch.setattr(test.__func__, "_hypothesis_internal_use_settings", quick)  # type: ignore[attr-defined]
        with pytest.raises(error):
            test(*args)


# Sources


class TestPtFiles(SourceContract):
    _ages = 0

    def open_source(self) -> Source:
        return LocalFiles()

    def make_source(self, directory: Path, features: Sequence[Any]) -> tuple[Source, list[str]]:
        paths = [str(directory / f"{number}.pt") for number in range(len(features))]
        for path, feature in zip(paths, features, strict=True):
            torch.save(feature, path)
            link = Path(f"{path}.link")
            link.unlink(missing_ok=True)
            link.symlink_to(path)
        return self.open_source(), paths

    def spellings(self, path: str) -> list[str]:
        directory, name = os.path.split(path)
        return [
            f"{directory}/./{name}",
            f"{directory}/../{os.path.basename(directory)}/{name}",
            os.path.relpath(path),
            f"{path}.link",
        ]

    def change(self, source: Source, path: str, feature: Any) -> None:
        torch.save(feature, path)

    def age(self, source: Source, path: str) -> None:
        self._ages += 1
        os.utime(path, ns=(0, self._ages))


class TestLoadFn(TestPtFiles):
    def open_source(self) -> Source:
        return LocalFiles(load_fn=torch.load)


class MemorySource:
    """Features in a dict, under paths such as "mem://a". Case and "#..." do not matter."""

    def __init__(self, features: dict[str, Any]) -> None:
        self.files = {key: (0, feature) for key, feature in features.items()}

    def absolute(self, path: str, cwd: str) -> str:
        return path if "://" in path else f"mem://{path}"

    def key(self, path: str) -> str:
        return path.partition("#")[0].lower()

    def are_keys(self, directory: str, names_end: str, files: int) -> bool:
        return "#" not in names_end and names_end == names_end.lower()

    def is_link(self, path: str) -> bool:
        return False

    def open(self, key: str, path: str) -> OpenFeature:
        if key not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such feature", path)
        return LoadedFeature(self.files[key][1])

    def version(self, key: str) -> bytes | None:
        return str(self.files[key][0]).encode() if key in self.files else None

    def is_current(self, path: str, version: bytes | None) -> bool:
        return version is not None and self.version(self.key(path)) == version

    def size(self, path: str) -> int:
        raise OSError(errno.ENOTSUP, "sizes are unknown", path)

    def sample_sizes(self, paths: Sequence[str]) -> list[int]:
        return []

    def change(self, path: str, feature: Any) -> None:
        key = self.key(path)
        self.files[key] = (self.files[key][0] + 1, feature)


class TestMemorySource(SourceContract):
    source: type[MemorySource] = MemorySource

    def make_source(self, directory: Path, features: Sequence[Any]) -> tuple[Source, list[str]]:
        files = {f"mem://{number}": feature for number, feature in enumerate(features)}
        return self.source(files), list(files)

    def spellings(self, path: str) -> list[str]:
        return [path.upper(), f"{path}#part", path.removeprefix("mem://")]

    def change(self, source: Source, path: str, feature: Any) -> None:
        assert isinstance(source, MemorySource)
        source.change(path, feature)


class OneVersion(MemorySource):
    def version(self, key: str) -> bytes | None:
        return b"1"


class KeysAsWritten(MemorySource):
    def key(self, path: str) -> str:
        return path


class KeyRaises(MemorySource):
    def key(self, path: str) -> str:
        os.fsencode(path)  # fails for half of a surrogate pair
        if "\0" in path:
            raise ValueError(path)
        return super().key(path)


class MissingIsNameless(MemorySource):
    def open(self, key: str, path: str) -> OpenFeature:
        if key not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such feature")
        return super().open(key, path)


class MissingIsEmpty(MemorySource):
    def open(self, key: str, path: str) -> OpenFeature:
        return LoadedFeature(self.files.get(key, (0, None))[1])


class LeavesOpen(MemorySource):
    def open(self, key: str, path: str) -> OpenFeature:
        opened.append(os.open(os.devnull, os.O_RDONLY))
        return super().open(key, path)


class ReadsOnce(MemorySource):
    def open(self, key: str, path: str) -> OpenFeature:
        feature = super().open(key, path)
        del self.files[key]
        return feature


class SampleOfAll(MemorySource):
    def sample_sizes(self, paths: Sequence[str]) -> list[int]:
        return [1 for _ in paths]


opened: list[int] = []


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        (OneVersion, "a_version_changes_with_the_file changes_at_once_after_each_other"),
        (OneVersion, "a_store_reads_changed_files_again"),
        (KeysAsWritten, "all_spellings_have_one_key"),
        (MissingIsNameless, "a_missing_file"),
        (MissingIsEmpty, "a_missing_file an_error_of_one_file_reaches_that_file_alone"),
        (LeavesOpen, "a_missing_file close_releases_what_open_took"),
        (SampleOfAll, "sizes"),
    ],
)
def test_the_contract_of_sources_can_fail(
    tmp_path: Path, source: type[MemorySource], tests: str
) -> None:
    contract = TestMemorySource()
    contract.source = source
    try:
        for test in tests.split():
            fails(getattr(contract, f"test_{test}"), tmp_path)
    finally:
        while opened:
            os.close(opened.pop())


@pytest.mark.parametrize(
    ("source", "test", "error"),
    [
        (KeyRaises, "odd_paths", ValueError),
        (ReadsOnce, "open_gives_the_feature", FileNotFoundError),
    ],
)
def test_the_contract_of_sources_can_fail_with_an_error_of_the_source(
    source: type[MemorySource], test: str, error: type[Exception]
) -> None:
    contract = TestMemorySource()
    contract.source = source
    fails(getattr(contract, f"test_{test}"), error=error)


# Formats


class TestNpy(FormatContract):
    @pytest.fixture(autouse=True)
    def _need_numpy(self) -> None:
        self.numpy: Any = pytest.importorskip("numpy", reason="numpy is not installed")

    def make_reader(self) -> PlanReader:
        return NpyReader()

    def features(self) -> st.SearchStrategy[Any]:
        np = self.numpy
        kinds = ["f8", "f4", "f2", "c16", "c8", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1"]

        def make(kind: str, shape: list[int], fortran: bool) -> Any:
            array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(f"<{kind}")
            return np.asfortranarray(array) if fortran else array

        shapes = st.lists(st.integers(0, 5), max_size=3)
        return st.builds(make, st.sampled_from([*kinds, "b1"]), shapes, st.booleans())

    def small(self) -> Any:
        return self.numpy.asfortranarray(self.numpy.arange(6, dtype="<i2").reshape(2, 3))

    def write(self, feature: Any, path: str) -> None:
        with Path(path).open("wb") as file:  # np.save adds ".npy" to a name
            self.numpy.save(file, feature)

    def reference(self, path: str) -> Any:
        return torch.from_numpy(self.numpy.load(path))


class TestSafetensors(FormatContract):
    @pytest.fixture(autouse=True)
    def _need_safetensors(self) -> None:
        pytest.importorskip("numpy", reason="numpy is not installed")
        self.library: Any = pytest.importorskip(
            "safetensors.torch", reason="safetensors is not installed"
        )

    def make_reader(self) -> PlanReader:
        return SafetensorsReader()

    def features(self) -> st.SearchStrategy[Any]:
        names = st.text(min_size=1, max_size=4)
        leaves = tensors().filter(lambda tensor: tensor.dtype != torch.complex128)
        return st.dictionaries(names, leaves.map(lambda t: t.contiguous().clone()), max_size=4)

    def small(self) -> Any:
        return {"w0": torch.arange(4, dtype=torch.int16), "w1": torch.ones(2, 1)}

    def write(self, feature: Any, path: str) -> None:
        self.library.save_file(feature, path, metadata={"by": "me"})

    def reference(self, path: str) -> Any:
        return self.library.load_file(path)

    def assert_equal(self, feature: Any, expected: Any) -> None:
        # The library orders the tensors otherwise than the header does.
        assert_same(dict(sorted(feature.items())), dict(sorted(expected.items())))


class TestPt(FormatContract):
    def make_reader(self) -> PlanReader:
        return PtReader()

    def features(self) -> st.SearchStrategy[Any]:
        return features()

    def small(self) -> Any:
        return self._one(6, 3, "x")

    def alike(self) -> list[Any]:
        return [self._one(9, 200, "z"), self._one(4, 7, "y")]

    def _one(self, size: int, number: int, text: str) -> Any:
        x = torch.arange(size, dtype=torch.int16)
        return {"a": x, "n": number, "s": [text, b"y"]}

    def write(self, feature: Any, path: str) -> None:
        torch.save(feature, path)

    def reference(self, path: str) -> Any:
        return torch.load(path, weights_only=True)


class Numbers(PlanReader):
    """A toy format: the number of float32 values, and the values."""

    def plan(self, file: Bytes) -> ReadPlan:
        [count] = struct.unpack("<I", file.read(0, 4))
        if file.size != 4 + 4 * count:
            raise Unsupported("another size than the file says")
        return self.make_plan(count)

    def make_plan(self, count: int) -> ReadPlan:
        layout = Layout.of(0, [(torch.float32, (count,))])
        return ReadPlan(layout, (), (Extent(4, 0, 4 * count),) if count else (), ())


class TestNumbers(FormatContract):
    reader: type[PlanReader] = Numbers

    def make_reader(self) -> PlanReader:
        return self.reader()

    def features(self) -> st.SearchStrategy[Any]:
        return st.lists(st.floats(width=32, allow_nan=False), max_size=9)

    def small(self) -> Any:
        return [1, 2, 3]

    def write(self, feature: Any, path: str) -> None:
        Path(path).write_bytes(struct.pack(f"<I{len(feature)}f", len(feature), *feature))

    def reference(self, path: str) -> Any:
        data = Path(path).read_bytes()
        [count] = struct.unpack_from("<I", data)
        if len(data) != 4 + 4 * count:
            raise ValueError("another size than the file says")
        return torch.tensor(struct.unpack_from(f"<{count}f", data, 4), dtype=torch.float32)


class Swapped(Numbers):
    """Swaps two bytes of each feature."""

    def make_plan(self, count: int) -> ReadPlan:
        plan = super().make_plan(count)
        rest = (Extent(8, 4, 4 * count - 4),) if count > 1 else ()
        swapped = (Extent(4, 0, 2), Extent(7, 2, 1), Extent(6, 3, 1), *rest)
        return plan._replace(extents=swapped) if count else plan


class SwappedInPlans(Numbers):
    """Swaps two bytes, but only of files whose plan is remembered."""

    def remember(self, version: bytes, plan: ReadPlan) -> None:
        super().remember(version, Swapped().make_plan(plan.layout.leaves[0].shape[0]))


class Trusting(Numbers):
    """Does not compare the size of the file with what it says."""

    def plan(self, file: Bytes) -> ReadPlan:
        return self.make_plan(min((file.size - 4) // 4, struct.unpack("<I", file.read(0, 4))[0]))


class Careless(Numbers):
    """Raises struct.error for a file that is cut short."""

    def plan(self, file: Bytes) -> ReadPlan:
        if file.size < 4:
            struct.unpack("<I", b"")
        return super().plan(file)


class PlansByPath(Numbers):
    """Remembers plans by path."""

    def __init__(self) -> None:
        super().__init__()
        self.by_path: dict[str, ReadPlan] = {}

    def open(self, path: str) -> OpenFeature:
        feature = super().open(path)
        assert isinstance(feature, PlannedFeature)
        feature.follow(self.by_path.setdefault(path, feature.plan), b"")
        return feature


class LeftOpen(Numbers):
    """Leaves a descriptor open where it refuses a file."""

    def plan(self, file: Bytes) -> ReadPlan:
        try:
            return super().plan(file)
        except Unsupported:
            opened.append(os.open(os.devnull, os.O_RDONLY))
            raise


@pytest.mark.parametrize(
    ("reader", "tests"),
    [
        (Swapped, "equals_the_reference a_changed_file_is_not_read_by_its_old_plan"),
        (SwappedInPlans, "equals_the_reference"),
        (Trusting, "truncated_anywhere every_byte_flipped damaged_in_several_places"),
        (Careless, "truncated_anywhere"),
        (LeftOpen, "descriptors_are_closed"),
    ],
)
def test_the_contract_of_formats_can_fail(
    tmp_path: Path, reader: type[PlanReader], tests: str
) -> None:
    contract = TestNumbers()
    contract.reader = reader
    try:
        for name in tests.split():
            test = getattr(contract, f"test_{name}")
            fails(test, *([] if hasattr(test, "hypothesis") else [tmp_path]))
    finally:
        while opened:
            os.close(opened.pop())


def test_the_contract_of_formats_finds_old_plans() -> None:
    contract = TestNumbers()
    contract.reader = PlansByPath
    # A plan for a longer file ends behind the end of a shorter one.
    fails(contract.test_a_changed_file_is_not_read_by_its_old_plan, error=(AssertionError, OSError))


# Backends


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arenas of few pages, so that growing moves them."""
    monkeypatch.setattr(growing_arena, "FIRST_BYTES", 512)
    monkeypatch.setattr(growing_arena, "LEAST_BYTES", 512)
    monkeypatch.setattr(host, "_FIRST_PAGES", 512)


class Limited(InOrderRuntime):
    """A device with this many bytes, which it never gets back."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(CPU)
        self._left = nbytes

    def reserve(self, nbytes: int) -> Reservation:
        if nbytes > self._left:
            raise torch.OutOfMemoryError
        self._left -= nbytes
        return super().reserve(nbytes)


class TestHostBackend(BackendContract):
    backend: type[HostBackend] = HostBackend

    @pytest.fixture(autouse=True)
    def _patch(self, small_segments: None, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def make_backend(self) -> Backend:
        return self.backend()

    def make_small_backend(self, nbytes: int) -> Backend:
        self._monkeypatch.setattr(host, "available_host_bytes", lambda: nbytes)
        self._monkeypatch.setattr(host, "_SHARE", 1)
        return self.backend()


class TestStagedBackend(BackendContract):
    @pytest.fixture(autouse=True)
    def _patch(self, small_segments: None) -> None:
        pass

    def make_backend(self) -> Backend:
        return AcceleratorBackend(InOrderRuntime(CPU))

    def make_small_backend(self, nbytes: int) -> Backend:
        return AcceleratorBackend(Limited(nbytes))


@pytest.mark.usefixtures("small_segments")
class TestSimulatedBackend(BackendContract):
    """Each consumer works on a stream of its own."""

    backend: type[AcceleratorBackend] = AcceleratorBackend
    haste = 0.3

    def make_backend(self) -> Backend:
        self.runtime = SimulatedRuntime(haste=self.haste)
        return self.backend(self.runtime)

    def consumer(self, backend: Backend) -> AbstractContextManager[Any]:
        return self.runtime.on(self.runtime.new_stream())


class TestLazyBackend(TestSimulatedBackend):
    """Operations run only when the host waits."""

    haste = 0


@pytest.mark.gpu
class TestAcceleratorBackend(BackendContract):
    def make_backend(self) -> Backend:
        assert ACCELERATOR is not None
        return open_backend(resolve_device(ACCELERATOR))

    def consumer(self, backend: Backend) -> AbstractContextManager[Any]:
        stream: AbstractContextManager[Any] = torch.Stream(backend.device)
        return stream


class Shifted(HostBackend):
    """Rows of a gather are shifted by one."""

    def gather(self, pages: Any, columns: Sequence[Column]) -> list[torch.Tensor]:
        return [rows.roll(1, 0) for rows in super().gather(pages, columns)]


class Reversed(HostBackend):
    """Features are joined in the opposite order."""

    def join(self, first: Any, counts: Any) -> torch.Tensor:
        return super().join(first[::-1], counts[::-1])


class Views(HostBackend):
    """A gather of consecutive pages is a view of them."""

    def gather(self, pages: Any, columns: Sequence[Column]) -> list[torch.Tensor]:
        results = super().gather(pages, columns)
        memory, [first, *_] = self.memory(), pages
        if memory is not None and list(pages) == list(range(first, first + len(pages))):
            rows = memory.view(-1, self.page_bytes)[first : first + len(pages)]
            return [
                rows if column == (0, self.page_bytes) else other
                for column, other in zip(columns, results, strict=True)
            ]
        return results


class Keeps(HostBackend):
    """Memory is kept after a reset."""

    def reset(self) -> None:
        self.page_bytes = 0

    reserved_bytes = property(lambda self: 4096)  # type: ignore[assignment]


class LosesPages(HostBackend):
    """Growing clears the pages."""

    def grow(self, needed: int, useful: int | None, known: int | None = None) -> int:
        before = self.reserved_bytes
        pages = super().grow(needed, useful, known)
        memory = self.memory()
        assert memory is not None
        memory[:before] = 0
        return pages


class GrowsTooLittle(HostBackend):
    def grow(self, needed: int, useful: int | None, known: int | None = None) -> int:
        return super().grow(1, 1)


class OneStaging(HostBackend):
    """All threads fill the same staging buffer."""

    staging = bytearray(1 << 12)

    def upload(self, placements: Sequence[Sequence[int]]) -> Any:
        return _Shared(self, super().upload(placements), placements)


class _Shared:
    def __init__(self, backend: OneStaging, upload: Any, placements: Any) -> None:
        self._upload, self._placements = upload, placements
        self._staging = memoryview(backend.staging)
        self._size = backend.page_bytes
        self._starts = [sum(map(len, placements[:n])) for n in range(len(placements))]

    def buffers(self, number: int) -> list[memoryview]:
        start = self._starts[number] * self._size
        return [self._staging[start : start + len(self._placements[number]) * self._size]]

    def finish(self) -> None:
        time.sleep(0.001)  # other threads run
        for number in range(len(self._placements)):
            [source] = self.buffers(number)
            for target in self._upload.buffers(number):
                target[:] = source[: len(target)]
                source = source[len(target) :]


@pytest.mark.parametrize(
    ("backend", "tests"),
    [
        (Shifted, "any_calls_in_any_order threads"),
        (Reversed, "any_calls_in_any_order threads"),
        (Views, "any_calls_in_any_order"),
        (Keeps, "any_calls_in_any_order a_store_under_a_small_budget"),
        (LosesPages, "any_calls_in_any_order"),
        (GrowsTooLittle, "any_calls_in_any_order"),
        (OneStaging, "threads"),
    ],
)
@pytest.mark.usefixtures("small_segments")
def test_the_contract_of_backends_can_fail(backend: type[HostBackend], tests: str) -> None:
    contract = TestHostBackend()
    contract.backend = backend
    for test in tests.split():
        fails(getattr(contract, f"test_{test}"))


class Unordered(AcceleratorBackend):
    """No stream waits for another."""

    def __init__(self, runtime: Any) -> None:
        super().__init__(runtime)
        for log in (self._uploads, self._gathers):
            log.hold_back = lambda stream, pages: None  # type: ignore[method-assign]


@pytest.mark.usefixtures("small_segments")
def test_the_contract_of_backends_finds_accesses_that_nothing_orders() -> None:
    contract = TestSimulatedBackend()
    contract.backend = Unordered
    fails(contract.test_any_calls_in_any_order, error=UnorderedAccessError)
    fails(contract.test_threads, error=UnorderedAccessError)
