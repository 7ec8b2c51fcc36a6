"""From files to pages: what reader threads do."""

import logging
import weakref
from collections.abc import Iterator, Sequence
from threading import get_ident
from typing import Any

from gpucache_pipes.cache import Cache, Entry
from gpucache_pipes.device import Backend
from gpucache_pipes.files import (
    Opener,
    OpenFeature,
    file_version,
    has_version,
    sample_file_sizes,
)
from gpucache_pipes.store.lock import StoreLock, require_stack
from gpucache_pipes.store.page_size import choose_page_bytes
from gpucache_pipes.store.process_hooks import await_at_exit
from gpucache_pipes.store.read_task import Revoked, Task
from gpucache_pipes.store.reader_pool import ReaderPool
from gpucache_pipes.store.tracing import trace

_log = logging.getLogger("gpucache_pipes")

_FILES_PER_TASK = 32
"""Few enough that several readers share a batch, many enough that a task costs little."""

_FRAMES = 64
"""Calls that reading in the thread of a caller nests, but for those of a load_fn."""

_LOOKED_AT = 100_000
"""Known files of which some are looked at to choose a size of pages."""


class Loader:
    """Reads LOADING entries, in the threads of `pool` or, without one, in the caller's.

    `lock` is the store's, with its condition. Methods that say so are called with it held;
    while files are opened and read it is not.
    """

    def __init__(
        self,
        cache: Cache,
        backend: Backend,
        open_file: Opener,
        as_spelled: bool,
        pool: ReaderPool | None,
        page_bytes: int | None,
        upload_bytes: int,
        revalidate: bool,
        read_timeout: float | None,
        lock: StoreLock,
    ) -> None:
        self._cache = cache
        self._backend = backend
        self._open_file = open_file
        # Whether paths are opened as they were first spelled, or with all links resolved.
        self._as_spelled = as_spelled
        self._pool = pool
        self._page_bytes = page_bytes
        # What goes up at once at most, unless one file is larger: staging is in proportion.
        self._upload_bytes = upload_bytes
        # Whether to note, for each file that is read, what it was then.
        self.revalidate = revalidate
        # Seconds that a reader may spend on one file, and what readers are at.
        self._read_timeout = read_timeout
        self._running: set[Task] = set()
        self._lock = lock
        # The store is closed: what takes long ends early.
        self._stopping = False
        # Counters; under the lock.
        self.files_read = 0
        self.bytes_read = 0
        self.failures = 0
        if pool is not None and read_timeout is not None:
            pool.watch(read_timeout / 4, weakref.WeakMethod(self.take_over_from_the_stuck))

    def submit(self, entries: list[Entry]) -> None:
        """Read `entries`, which are LOADING, and empty the list. Without the lock.

        Whatever happens, those that are left in the list are not being read.
        """
        if not entries:
            return
        if self._pool is None:
            require_stack(_FRAMES)
            use = object()
            # All of it: a signal that was deferred is handled where the lock is released.
            try:
                with self._lock:
                    self._require_running()
                    self._lock.uses[use] = get_ident()
                task = entries.copy()
                entries.clear()
                self._load(task)
            finally:
                self._lock.uses.pop(use, None)
                self._lock.run_postponed()
            return
        # Fewer files in a task when there are few, so that all readers have work.
        size = min(_FILES_PER_TASK, -(-len(entries) // len(self._pool.threads)))
        tasks = [[entries[at : at + size]] for at in range(0, len(entries), size)]
        try:
            for task_of_one in tasks:
                self._pool.submit(self._load_in_thread, task_of_one)
            entries.clear()
        except BaseException:
            # An interrupt. A task belongs to who takes it out of its list: a reader, or we.
            entries[:] = [entry for task_of_one in tasks for entry in _take(task_of_one)]
            raise

    def stop(self) -> None:
        """End readers after the file at hand, and give up what has not begun. Takes no lock."""
        self._stopping = True
        if self._pool is not None:
            self._pool.stop()

    def join(self, seconds: float) -> list[str]:
        """Wait for readers to end, at most so long; returns the names of those that read on."""
        return [] if self._pool is None else self._pool.join(seconds)

    def is_current(self, path: str, version: bytes | None) -> bool:
        """Whether the file is certainly still what it was in that version."""
        return has_version(path, version)

    def give_up(self, entries: Sequence[Entry], error: BaseException) -> None:
        """Tell all who wait for `entries`, which nobody reads, that they will not come."""
        self._end({}, failed=dict.fromkeys(entries, error))

    def _load_in_thread(self, task: list[list[Entry]]) -> bool:
        """True if the thread has been replaced, and is to end."""
        entries = _take(task)
        try:
            if entries:
                self._load(entries)
        except Revoked:
            return True
        except BaseException:
            pass  # Whoever waits has been told, and the thread must live on.
        return False

    def take_over_from_the_stuck(self) -> None:
        """Replace readers that have been at one file for too long. In a thread of its own."""
        assert self._pool is not None and self._read_timeout is not None
        for task in list(self._running):
            if not task.is_overdue(self._read_timeout):
                continue
            # First, as it may fail: then the next look tries again.
            self._pool.start_another()
            with self._lock:
                stuck = self._revoke(task, self._read_timeout)
            if stuck is None:  # it has got through at last
                self._pool.end_one()
                continue
            self._pool.forget(task.thread)
            await_at_exit(task.thread)
            # Without the lock: handlers of logs have locks of their own.
            _log.warning(
                "%r: not read within read_timeout=%g seconds; another thread goes on with what is "
                "behind it", stuck.path, self._read_timeout,
            )  # fmt: skip

    def _revoke(self, task: Task, seconds: float) -> Entry | None:
        """Under the lock: fail the file that its reader is at, and hand on the others."""
        stuck = task.revoke(seconds)
        if stuck is None:
            return None
        if stuck.pages:
            task.forsaken = stuck
        rest = [entry for entry in task.left if entry is not stuck]
        task.left.clear()
        task.opened.pop(stuck, None)  # the reader may be reading from it
        task.close_opened()
        self.failures += 1
        waiters = self._cache.forsake(stuck)
        for ticket in waiters:
            ticket.errors[stuck] = TimeoutError(f"not read within read_timeout={seconds:g} seconds")
        self._tell(waiters)
        for entry in rest:
            self._cache.start_again(entry)
        if rest:
            assert self._pool is not None
            self._pool.submit(self._load_in_thread, [rest])
        return stuck

    def _load(self, entries: Sequence[Entry]) -> None:
        """Open, place, read and finish every entry. None is LOADING afterwards."""
        # Those that are LOADING because of this task: others may load them again afterwards.
        task = Task(entries)
        left = task.left
        group: list[tuple[Entry, OpenFeature]] = []
        size = 0
        self._running.add(task)
        try:
            for entry in entries:
                self._require_running()
                feature = self._open(entry, task)
                if isinstance(feature, BaseException):
                    self._end(left, failed={entry: feature})
                    continue
                group.append((entry, feature))
                size += feature.layout.span
                if size >= self._upload_bytes:
                    self._upload(group, task)
                    group, size = [], 0
            if group:
                self._upload(group, task)
        except Revoked:
            with self._lock:
                if task.forsaken is not None:
                    self._cache.give_up(task.forsaken)
            raise
        except BaseException as error:
            # An interrupt, or a bug: nobody may wait for these for ever.
            self._end(left, failed=dict.fromkeys(left, error))
            raise
        finally:
            self._running.discard(task)
            task.close_opened()

    def _open(self, entry: Entry, task: Task) -> OpenFeature | BaseException:
        version = feature = None
        task.begin(entry)
        try:
            if self.revalidate:
                # First: if it changes now, what is read is taken for older than it is.
                version = file_version(entry.key)
            with trace("gpucache::read"):
                feature = self._open_file(entry.path if self._as_spelled else entry.key)
        except BaseException as error:
            if not self._is_of_the_file(error):
                raise
            return error
        finally:
            task.end(feature)
        # Only now: a reader that was too late touches nothing.
        entry.version = version
        task.opened[entry] = feature
        return feature

    def _is_of_the_file(self, error: BaseException) -> bool:
        """Whether it may be told to who needs the file, and the others go on."""
        # In a thread of ours not even a SystemExit is anybody else's: nobody interrupts it.
        return isinstance(error, Exception) or self._pool is not None

    def _require_running(self) -> None:
        if self._stopping:
            raise RuntimeError("the store was closed")

    def _upload(self, group: Sequence[tuple[Entry, OpenFeature]], task: Task) -> None:
        left = task.left
        try:
            placed, failed = self._place(group, left)
            with trace("gpucache::upload"):
                for part in self._parts(placed):
                    upload = self._backend.upload([entry.pages for entry, _ in part])
                    for number, (entry, feature) in enumerate(part):
                        task.begin(entry)
                        try:
                            feature.read_into(upload.buffers(number))
                        except BaseException as error:
                            if not self._is_of_the_file(error):
                                raise
                            failed[entry] = error
                        finally:
                            task.end(feature)
                    upload.finish()
        finally:
            task.close_opened()
        self._end(left, [item for item in placed if item[0] not in failed], failed)

    def _parts(self, placed: list[tuple[Entry, OpenFeature]]) -> Iterator[list[Any]]:
        """What to upload at once."""
        most = self._upload_bytes // (self._backend.page_bytes or 1)
        part: list[tuple[Entry, OpenFeature]] = []
        pages = 0
        for entry, feature in placed:
            if part and pages + len(entry.pages) > most:
                yield part
                part, pages = [], 0
            part.append((entry, feature))
            pages += len(entry.pages)
        if part:
            yield part

    def _place(
        self, group: Sequence[tuple[Entry, OpenFeature]], left: dict[Entry, None]
    ) -> tuple[list[tuple[Entry, OpenFeature]], dict[Entry, BaseException]]:
        """Give pages to all that need them; what nobody needs any more is given up."""
        placed: list[tuple[Entry, OpenFeature]] = []
        failed: dict[Entry, BaseException] = {}
        page_bytes = self._choose_page_bytes(group)
        with self._lock:
            self._require_running()
            self._fit_pages(page_bytes)
            for entry, feature in group:
                try:
                    layout = feature.layout
                    if self._cache.place(entry, layout.span, layout.nbytes):
                        placed.append((entry, feature))
                    else:
                        left.pop(entry, None)
                        self._tell(self._cache.give_up(entry))
                except Exception as error:
                    failed[entry] = error
        return placed, failed

    def _choose_page_bytes(self, group: Sequence[tuple[Entry, OpenFeature]]) -> int:
        """The size of a page that suits this group and its like; 0 if any or none does."""
        ledger = self._cache.ledger
        if ledger.held_pages:
            return 0
        limit = ledger.max_bytes
        fits = [f for _, f in group if limit is None or f.layout.nbytes <= limit]
        spans = [feature.layout.span for feature in fits]
        if self._page_bytes or not any(spans):
            return self._page_bytes or 0
        known = self._cache.entries.paths[:_LOOKED_AT]
        overhead = min(feature.bytes_read - feature.layout.span for feature in fits)
        return choose_page_bytes(spans, sample_file_sizes(known), max(0, overhead))

    def _fit_pages(self, page_bytes: int) -> None:
        """Under the lock: use pages of that size from now on, while there are no others."""
        ledger = self._cache.ledger
        if page_bytes and page_bytes != ledger.page_bytes and not ledger.held_pages:
            if ledger.page_bytes:
                self._backend.reset()
                self._cache.forget_pages()
            ledger.page_bytes = page_bytes
            self._backend.configure(page_bytes)

    def _end(
        self,
        left: dict[Entry, None],
        ready: Sequence[tuple[Entry, OpenFeature]] = (),
        failed: dict[Entry, BaseException] | None = None,
    ) -> None:
        """Tell everybody who waits what became of their entries."""
        failed = dict(failed or {})
        with self._lock:
            cache = self._cache
            for entry, feature in ready:
                try:
                    waiters = cache.finish(entry, feature.layout, feature.values)
                except Exception as error:  # of a policy
                    failed[entry] = error
                    continue
                left.pop(entry, None)
                self.files_read += 1
                self.bytes_read += feature.bytes_read
                self._tell(waiters)
            for entry, cause in failed.items():
                self.failures += 1
                left.pop(entry, None)
                waiters = cache.give_up(entry)
                for ticket in waiters:
                    ticket.errors[entry] = cause
                self._tell(waiters)
            if not cache.loading:
                self._lock.changed.notify_all()

    def _tell(self, waiters: Sequence[Any]) -> None:
        """Under the lock: an entry that they wait for is no longer LOADING."""
        for ticket in waiters:
            ticket.pending -= 1
            # Not before: a consumer that is woken for nothing takes the interpreter from readers.
            if not ticket.pending:
                self._lock.changed.notify_all()


def _take(task: list[list[Entry]]) -> list[Entry]:
    """The entries of a task for the one who takes them first, none for all others."""
    try:
        return task.pop()
    except IndexError:
        return []
