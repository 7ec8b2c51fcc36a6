"""Reads files into pages, in reader threads or in the thread of the caller."""

import logging
import weakref
from collections.abc import Iterator, Sequence
from threading import TIMEOUT_MAX, current_thread
from typing import Any

from gpucache_pipes.device import Backend, ends_the_device, is_device_error
from gpucache_pipes.files import Source
from gpucache_pipes.store.load_tracker import LoadTracker
from gpucache_pipes.store.lock import require_stack
from gpucache_pipes.store.page_size import choose_page_bytes, pages_per_file
from gpucache_pipes.store.process_hooks import join_at_exit
from gpucache_pipes.store.read_task import OpenFile, ReadTask, Revoked
from gpucache_pipes.store.reader_gate import ReaderGate
from gpucache_pipes.store.reader_pool import ReaderPool
from gpucache_pipes.store.tracing import trace

_log = logging.getLogger("gpucache_pipes")

_FILES_PER_TASK = 32
"""Few enough that several readers share a batch, many enough that a task costs little."""

_FRAMES = 64
"""Nested calls that reading in the caller's thread takes, without those of a load_fn."""

_KNOWN_FILES = 100_000
"""Known files from which some are drawn to choose a page size."""


class Loader:
    """Opens files, reads them into the pages that `loads` assigns, and reports to it.

    It changes no entry itself. Files are opened and read without the lock of the store.

    Args:
        source: opens files.
        loads: the reader side of the shared cache.
        backend: takes the bytes.
        pool: the reader threads; None reads in the thread that calls `submit`.
        page_bytes: the size of a page; None chooses by the first files.
        upload_bytes: what goes to the device at once, at most, unless one file is larger: staging
            memory is in proportion to it.
        revalidate: note the version of each file that is read.
        read_timeout: seconds after which a reader that is still at one file is replaced.

    Attributes:
        gate: where readers can be held.
    """

    def __init__(
        self,
        source: Source,
        loads: LoadTracker,
        backend: Backend,
        pool: ReaderPool | None,
        *,
        page_bytes: int | None,
        upload_bytes: int,
        revalidate: bool,
        read_timeout: float | None,
    ) -> None:
        self._source = source
        self._loads = loads
        self._backend = backend
        self._pool = pool
        self._page_bytes = page_bytes
        self._upload_bytes = upload_bytes
        self._revalidate = revalidate
        self._read_timeout = read_timeout
        # Tasks under way. Adding and discarding an item of a set is atomic; the watcher iterates
        # over a copy.
        self._running: set[ReadTask] = set()
        self.gate = ReaderGate()
        loads.held_by = self.gate.held_by
        # The store was closed: end early.
        self._stopping = False
        if pool is not None and read_timeout is not None:
            pool.watch(read_timeout / 4, weakref.WeakMethod(self.replace_overdue_readers))

    def submit(self, numbers: list[int]) -> None:
        """Have these entries, which are LOADING, read, and empty the list.

        Takes no lock of the store. Whatever is raised, numbers that are still in the list
        afterwards are not being read.
        """
        if not numbers:
            return
        if self._pool is None:
            require_stack(_FRAMES)
            use, uses, inside = object(), self._loads.uses, self.gate.inside
            # All inside the `try`: a deferred signal is handled where the lock is released.
            try:
                self.gate.enter(use)
                self._loads.begin_use(use)
                self._load(numbers.copy(), numbers)
            finally:
                # By one operation, and not within a function: an interrupt may come at its entry.
                uses.pop(use, None)
                inside.pop(use, None)
                self.gate.leave(use)
                self._loads.run_postponed()
            return
        # Fewer files in a task when there are few, so that all readers have work.
        size = min(_FILES_PER_TASK, -(-len(numbers) // len(self._pool.threads)))
        tasks = [[numbers[at : at + size]] for at in range(0, len(numbers), size)]
        try:
            for boxed in tasks:
                self._pool.submit(self._load_in_thread, boxed)
            numbers.clear()
        except BaseException:
            # An interrupt. Each task belongs to the thread that takes it out of its list first: a
            # reader or this one.
            numbers[:] = [entry for boxed in tasks for entry in _take(boxed)]
            raise

    def drain(self) -> None:
        """Wait until the device has finished all uploads and gathers. While readers are held."""
        use, uses = object(), self._loads.uses
        # A use, so that a signal handler that closes the store meanwhile is made to wait.
        try:
            self._loads.begin_use(use)
            self._backend.drain()
        finally:
            uses.pop(use, None)
            self._loads.run_postponed()

    def stop(self) -> None:
        """End the reader threads after the file at hand; drop what has not begun. No lock."""
        self._stopping = True
        self.gate.open_for_ever()
        if self._pool is not None:
            self._pool.stop()

    def join(self, seconds: float) -> list[str]:
        """Wait for reader threads to end, at most this long; the names of those that still run."""
        return [] if self._pool is None else self._pool.join(seconds)

    # Reader threads

    def _load_in_thread(self, boxed: list[list[int]]) -> bool:
        """Read one task. Returns True if this thread has been replaced and must end."""
        reader = current_thread()
        self.gate.enter(reader)
        try:
            numbers = _take(boxed)
            if numbers:
                self._load(numbers, [])
        except Revoked:
            return True
        except BaseException:
            pass  # The batches that wait have been told, and the thread must go on.
        finally:
            self.gate.leave(reader)
        return False

    def _load(self, numbers: Sequence[int], caller: list[int]) -> None:
        """Open, place, read and report every entry. None is LOADING afterwards.

        `caller` is the list of a caller that fails what is still in it when this raises. It is
        emptied once the entries are safe here: they are always in one place or the other.
        """
        task = ReadTask(numbers)
        group: list[OpenFile] = []
        size = 0
        self._running.add(task)
        try:
            caller.clear()
            for number in numbers:
                if self._stopping:
                    raise RuntimeError("the store was closed")
                opened = self._open(number, task)
                if isinstance(opened, BaseException):
                    self._loads.complete(task.left, failed={number: opened})
                    continue
                group.append(opened)
                size += opened.feature.layout.span
                if size >= self._upload_bytes:
                    self._upload(group, task)
                    group, size = [], 0
            if group:
                self._upload(group, task)
        except Revoked:
            self._loads.end_abandoned(task)
            raise
        except BaseException as error:
            # An interrupt, the device or a bug: no batch may wait for these for ever.
            caller.clear()
            if ends_the_device(error):
                self._loads.end(error)
            self._loads.complete(task.left, failed=dict.fromkeys(task.left, error))
            raise
        finally:
            self._running.discard(task)
            task.close_opened()

    def _open(self, number: int, task: ReadTask) -> OpenFile | BaseException:
        version = feature = None
        key, path = self._loads.identity(number)
        task.begin(number)
        try:
            if self._revalidate:
                # Before opening: a file that changes in between is taken for older than it is.
                version = self._source.version(key)
            with trace("gpucache::read"):
                feature = self._source.open(key, path)
        except BaseException as error:
            if not self._concerns_the_file(error):
                raise
            return error
        finally:
            task.end(feature)
        # After `end`, which raises in a reader that was replaced: it must not touch anything.
        task.opened[number] = feature
        return OpenFile(number, feature, version)

    def _concerns_the_file(self, error: BaseException) -> bool:
        """Whether an exception fails one file, and the others are read all the same."""
        if is_device_error(error):
            return False
        # In a reader thread even a SystemExit comes from the file: no signal is handled there.
        return isinstance(error, Exception) or self._pool is not None

    def _upload(self, group: Sequence[OpenFile], task: ReadTask) -> None:
        try:
            placed, pages, failed = self._loads.place(task, group, *self._choose_page_bytes(group))
            with trace("gpucache::upload"):
                for begin, end in self._parts(pages):
                    upload = self._backend.upload(pages[begin:end])
                    for at, (number, feature, _) in enumerate(placed[begin:end]):
                        task.begin(number)
                        try:
                            feature.read_into(upload.buffers(at))
                        except BaseException as error:
                            if not self._concerns_the_file(error):
                                raise
                            failed[number] = error
                        finally:
                            task.end(feature)
                    upload.finish()
        finally:
            task.close_opened()
        ready = [opened for opened in placed if opened.number not in failed]
        self._loads.complete(task.left, ready, failed)

    def _parts(self, pages: list[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """What goes to the device at once: from which to which feature, given their pages."""
        most = self._upload_bytes // (self._backend.page_bytes or 1)
        begin = total = 0
        for end, held in enumerate(pages):
            if end > begin and total + len(held) > most:
                yield begin, end
                begin, total = end, 0
            total += len(held)
        if begin < len(pages):
            yield begin, len(pages)

    def _choose_page_bytes(self, group: Sequence[OpenFile]) -> tuple[int, float]:
        """The page size that suits these features and others like them; 0 for no choice.

        And how many pages a file takes in the mean.
        """
        limit = self._loads.page_limit()
        if limit == 0:
            return 0, 0.0
        features = [opened.feature for opened in group]
        fits = [f for f in features if limit is None or f.layout.nbytes <= limit]
        spans = [feature.layout.span for feature in fits]
        if not any(spans):
            return self._page_bytes or 0, 0.0
        sizes = self._source.sample_sizes(self._loads.known_paths(_KNOWN_FILES))
        overhead = max(0, min(feature.bytes_read - feature.layout.span for feature in fits))
        page_bytes = self._page_bytes or choose_page_bytes(spans, sizes, overhead)
        return page_bytes, pages_per_file(spans, sizes, overhead, page_bytes)

    # The watcher

    def replace_overdue_readers(self) -> None:
        """Replace readers that have been at one file for too long. In the watcher thread."""
        assert self._pool is not None and self._read_timeout is not None
        for task in list(self._running):
            if not task.is_overdue(self._read_timeout):
                continue
            # First, since it may fail: then the next look tries again.
            self._pool.start_another()
            taken = self._loads.take_over(task, self._read_timeout)
            if taken is None:  # the reader has finished the file after all
                self._pool.end_one()
                continue
            hanging, rest = taken
            self.gate.leave(task.thread)
            task.opened.pop(hanging, None)  # the reader may be reading from it
            try:
                task.close_opened()  # before the others are read, and their batches complete
            finally:
                if rest:
                    self._pool.submit(self._load_in_thread, [rest])
            self._pool.forget(task.thread)
            join_at_exit(task.thread)
            # Without the lock: the handlers of a log have locks of their own.
            _log.warning(
                "%r: not read within read_timeout=%g seconds; another thread goes on with the "
                "files after it", self._loads.identity(hanging)[1], self._read_timeout,
            )  # fmt: skip


def _take(boxed: list[list[Any]]) -> list[Any]:
    """The numbers of a task for the first caller, none for the others: `list.pop` is atomic."""
    try:
        return boxed.pop()
    except IndexError:
        return []


def require_timeout(read_timeout: float | None, asynchronous: bool) -> None:
    """Raise ValueError for a read_timeout that no loader can have."""
    if read_timeout is not None and not asynchronous:
        raise ValueError("read_timeout needs reader threads: asynchronous=True")
    if read_timeout is not None and not 0 < read_timeout < TIMEOUT_MAX:
        raise ValueError(
            f"read_timeout={read_timeout!r} must be a positive, finite number of seconds"
        )
