"""The contract that every backend keeps, as tests; inherit it to test a backend of your own."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes.device import Backend, Column
from gpucache_pipes.store import GPUFeatureStore
from gpucache_pipes.testing.contracts import error_of, in_threads, inherited
from gpucache_pipes.testing.features import assert_same, features

_PAGE_BYTES = st.sampled_from([16, 48, 272, 4112])
_CALLS = ["grow", "upload", "upload", "gather", "gather", "join", "write", "reset"]


class BackendContract:
    """Tests of what the store requires of a `device.Backend`. A subclass defines `make_backend`.

        class TestMyBackend(BackendContract):
            def make_backend(self):
                self.runtime = MyRuntime()
                return AcceleratorBackend(self.runtime)
            def consumer(self, backend):
                return self.runtime.on(self.runtime.new_stream())

    Where memory is small or slow, let a fixture of the subclass make the backend grow in small
    steps.
    """

    def make_backend(self) -> Backend:
        """Return a new backend."""
        raise NotImplementedError

    def make_small_backend(self, nbytes: int) -> Backend:
        """Return a new backend whose device has `nbytes` bytes for pages, and no more.

        Without an override, the test of a full device is skipped.
        """
        raise SkipTest("the subclass does not define `make_small_backend`")

    def consumer(self, backend: Backend) -> AbstractContextManager[Any]:
        """A context in which a thread gathers and looks at results, such as a stream of its own."""
        return nullcontext()

    # Pages

    @inherited(40)
    @given(st.data(), st.lists(st.sampled_from(_CALLS), min_size=4, max_size=25))
    def test_any_calls_in_any_order(self, data: st.DataObject, calls: list[str]) -> None:
        """Gathers and joins return the uploaded bytes, whatever was called before and after."""
        backend = self.make_backend()
        assert isinstance(backend, Backend), "a method of Backend is missing"
        assert backend.page_bytes == 0 and backend.reserved_bytes == 0, "a new backend has pages"
        model = _Pages(backend, data)
        with self.consumer(backend):
            model.begin()
            for call in calls:
                getattr(model, call)()
            model.check()
            for _ in range(2):
                backend.close()
                assert backend.reserved_bytes == 0, "close keeps memory"
            model.check_results()

    def test_a_device_without_memory(self) -> None:
        """Growing raises while there are no pages, and returns 0 afterwards."""
        backend = self.make_small_backend(2 * 4096)
        backend.configure(4096)
        error = error_of(lambda: backend.grow(3, None), MemoryError)
        assert error is not None, "growing without memory for the first pages raises nothing"
        assert "12288" in str(error), f"{error} does not say how much was requested"
        assert backend.reserved_bytes == 0
        assert backend.grow(1, 1) == 1
        with self.consumer(backend):
            _upload(backend, [[0]], [b"\x07" * 4096])
            assert backend.grow(2, None) == 0
            assert backend.reserved_bytes == 4096
            [rows] = backend.gather([0], [(0, 4096)])
            assert _bytes(rows) == b"\x07" * 4096
        backend.close()

    # Threads

    def test_threads(self) -> None:
        """Threads upload and gather pages of their own while the backend grows."""
        backend = self.make_backend()
        backend.configure(48)
        threads, pages_each, steps = 4, 6, 15
        pages = backend.grow(threads * pages_each, threads * pages_each)

        def work(thread: int) -> None:
            if thread == threads:
                for step in range(3):
                    backend.grow(pages << step, pages << step)
                return
            # Interleaved with those of the other threads.
            mine = [thread + threads * number for number in range(pages_each)]
            with self.consumer(backend):
                for step in range(steps):
                    content = [bytes([thread, step, number] * 16) for number in range(pages_each)]
                    placements = [mine[:1], mine[1:3], mine[3:]]
                    joined = [content[0], b"".join(content[1:3]), b"".join(content[3:])]
                    _upload(backend, placements, joined)
                    order = mine[step % pages_each :] + mine[: step % pages_each]
                    [rows] = backend.gather(order, [(0, 48)])
                    expected = b"".join(content[mine.index(page)] for page in order)
                    assert _bytes(rows) == expected, f"thread {thread}, step {step}"
                    assert _bytes(backend.join(np.array(mine), np.ones(pages_each, np.int64))) == (
                        b"".join(content)
                    )

        in_threads(work, threads + 1)
        backend.close()
        assert backend.reserved_bytes == 0, "close keeps memory"

    def test_the_stream_of_a_consumer_in_another_thread(self) -> None:
        """What a thread gathers inside `bind_stream`, the consumer can look at."""
        backend = self.make_backend()
        backend.configure(16)
        backend.grow(2, 2)
        results: list[torch.Tensor] = []
        with self.consumer(backend):
            bound = backend.bind_stream()

            def work(_: int) -> None:
                for step in range(5):
                    _upload(backend, [[1]], [bytes([step]) * 16])
                    with bound():
                        results.extend(backend.gather([1, 1], [(0, 16)]))

            in_threads(work, 1)
            for step, rows in enumerate(results):
                assert _bytes(rows) == bytes([step]) * 32
        backend.close()

    # With a store

    @inherited(20)
    @given(
        st.lists(features(max_leaves=3), min_size=2, max_size=5),
        st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=8),
        st.sampled_from([None, 16, 48]),
        st.integers(1, 3),
        st.integers(0, 2),
    )
    def test_a_store_under_a_small_budget(
        self,
        files: list[Any],
        requests: list[list[int]],
        page_bytes: int | None,
        items: int,
        reader_threads: int,
    ) -> None:
        """Each batch equals what is in the files, and closing the store frees everything."""
        backend = self.make_backend()
        by_path = {f"/f/{number}": feature for number, feature in enumerate(files)}
        with (
            self.consumer(backend),
            GPUFeatureStore(
                backend,
                load_fn=by_path.__getitem__,
                max_cache_items=items,
                policy="lru",
                page_bytes=page_bytes,
                asynchronous=reader_threads > 0,
                reader_threads=reader_threads or None,
            ) as store,
        ):
            held = []
            for numbers in requests:
                wanted = [number % len(files) for number in numbers]
                held.append((store.get_batch([f"/f/{n}" for n in wanted]), wanted))
            store.clear()
            held.append((store.get_batch(["/f/0"]), [0]))
            for batch, wanted in held:
                for feature, number in zip(batch, wanted, strict=True):
                    assert_same(feature, files[number])
            store.check()
        assert backend.reserved_bytes == 0, "closing the store keeps memory"


class _Pages:
    """A backend, and what its pages and the results of earlier gathers must hold."""

    def __init__(self, backend: Backend, data: st.DataObject) -> None:
        self._backend = backend
        self._data = data
        self._count = 0
        # How many of them there are on any device: draws must not depend on free memory.
        self._least = 0
        # By page: the bytes that were uploaded. They may end before the page does.
        self._content: dict[int, bytes] = {}
        self._held: list[tuple[torch.Tensor, bytes]] = []

    def _draw(self, strategy: st.SearchStrategy[Any]) -> Any:
        return self._data.draw(strategy)

    def begin(self) -> None:
        self._backend.configure(self._draw(_PAGE_BYTES))
        assert self._backend.reserved_bytes == 0, "pages before the first grow"
        self._count = self._least = 0
        self._content = {}
        self.grow()

    def reset(self) -> None:
        self._backend.reset()
        assert self._backend.reserved_bytes == 0, "reset keeps memory"
        assert self._backend.page_bytes == 0, "reset keeps the page size"
        self.check_results()
        self.begin()

    def grow(self) -> None:
        needed = self._draw(st.integers(1, 8))
        useful = self._draw(st.one_of(st.integers(1, 40), st.integers(-3, 0), st.none()))
        added = self._backend.grow(needed, useful)
        assert added == 0 or added >= needed, f"{added} pages added, {needed} needed"
        assert added or self._count, "no pages at all, and no MemoryError"
        self._count += added
        self._least += min(added, needed)
        assert self._backend.reserved_bytes == self._count * self._backend.page_bytes
        self.check()

    def upload(self) -> None:
        size = self._backend.page_bytes
        # Among few pages, so that pages are filled again.
        pages = self._draw(st.permutations(range(min(self._least, 12))))
        sizes = self._draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        placements: list[Sequence[int]] = []
        for number in sizes:
            if len(pages) >= number:
                placements.append(pages[:number])
                pages = pages[number:]
        if self._draw(st.booleans()):
            # Fresh pages of a feature are consecutive; the store passes a range.
            first = self._draw(st.integers(0, self._least - 1))
            placements = [range(first, min(first + 3, self._least))]
        contents = []
        for placement in placements:
            missing = self._draw(st.one_of(st.just(0), st.just(0), st.integers(1, size - 1)))
            random = self._draw(st.randoms(use_true_random=True))
            contents.append(random.randbytes(len(placement) * size - missing))
        _upload(self._backend, placements, contents)
        for placement, content in zip(placements, contents, strict=True):
            for number, page in enumerate(placement):
                self._content[page] = content[number * size : (number + 1) * size]

    def gather(self) -> None:
        if self._content:
            size = self._backend.page_bytes
            pages = self._draw(st.lists(self._known(), min_size=1, max_size=8))
            columns: list[Column] = [(0, size)]
            for _ in range(self._draw(st.integers(0, 2))):
                start = 16 * self._draw(st.integers(0, size // 16 - 1))
                columns.append((start, self._draw(st.integers(1, size - start))))
            self._held += self._gathered(pages, columns)

    def write(self) -> None:
        """Write to a result, which belongs to the caller: no page changes."""
        if self._content:
            for rows, _ in self._gathered(sorted(self._content), [(0, self._backend.page_bytes)]):
                rows.zero_()
            self.check()

    def join(self) -> None:
        size = self._backend.page_bytes
        full = sorted(page for page, content in self._content.items() if len(content) == size)
        if full:
            runs = [
                range(first, last + 1) for first in full for last in full
                if full.index(last) - full.index(first) == last - first >= 0
            ]  # fmt: skip
            wanted = self._draw(st.lists(st.sampled_from(runs), min_size=1, max_size=4))
            joined = self._backend.join(
                np.array([run.start for run in wanted]), np.array([len(run) for run in wanted])
            )
            pages = [page for run in wanted for page in run]
            assert joined.dtype == torch.uint8 and joined.shape == (len(pages) * size,)
            self._held.append((joined, b"".join(self._content[page] for page in pages)))

    def check(self) -> None:
        """Require that all pages hold what was uploaded last."""
        size = self._backend.page_bytes
        if self._content:
            self._gathered(sorted(self._content), [(0, size)])
            memory = self._backend.memory()
            if memory is not None:
                for page, content in self._content.items():
                    found = _bytes(memory[page * size : page * size + len(content)])
                    assert found == content, f"page {page} of the memory"

    def check_results(self) -> None:
        """Require that earlier results are what they were."""
        for result, content in self._held:
            assert _bytes(result) == content, "a result has changed after the gather"

    def _known(self) -> st.SearchStrategy[int]:
        return st.sampled_from(sorted(self._content))

    def _gathered(
        self, pages: Sequence[int], columns: Sequence[Column]
    ) -> list[tuple[torch.Tensor, bytes]]:
        """Gather and compare; the results, and the bytes that they hold."""
        results = self._backend.gather(pages, columns)
        assert len(results) == len(columns)
        checked = []
        for rows, (start, nbytes) in zip(results, columns, strict=True):
            assert rows.device == self._backend.device and rows.is_contiguous()
            assert rows.shape == (len(pages), nbytes // rows.itemsize), f"shape {rows.shape}"
            found = _bytes(rows)
            for number, page in enumerate(pages):
                expected = self._content[page][start : start + nbytes]
                row = found[number * nbytes : number * nbytes + len(expected)]
                assert row == expected, f"row {number} is not bytes {start} on of page {page}"
            checked.append((rows, found))
        return checked


def _upload(
    backend: Backend, placements: Sequence[Sequence[int]], contents: Sequence[bytes]
) -> None:
    """Fill pages as a reader thread does."""
    upload = backend.upload(placements)
    for number, content in enumerate(contents):
        left = memoryview(content)
        for buffer in upload.buffers(number):
            count = min(len(buffer), len(left))
            buffer[:count] = left[:count]
            left = left[count:]
        assert not left, f"the buffers of placement {number} are too small"
    upload.finish()


def _bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a result, on the host."""
    return bytes(tensor.view(torch.uint8).cpu().flatten().tolist())
