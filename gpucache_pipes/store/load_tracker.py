"""What becomes of LOADING entries: the steps of the loader."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import get_ident
from typing import Protocol

from gpucache_pipes.cache import Cache, Entry, NoPagesError
from gpucache_pipes.device import Backend, DeviceMemoryError
from gpucache_pipes.store.lock import StoreLock
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.read_task import OpenEntry, ReadTask
from gpucache_pipes.store.refusal import Refusal
from gpucache_pipes.store.stats import Counters

_NONE_FAILED: Mapping[Entry, BaseException] = {}


class Owner(Protocol):
    """The SharedCache that a LoadTracker is a part of."""

    lock: StoreLock
    cache: Cache
    refusal: Refusal

    def end(self, error: BaseException) -> None:
        """See SharedCache."""


class LoadTracker:
    """Assigns pages to entries that are read, ends their LOADING, and tells the batches that wait.

    A part of SharedCache: every public method is one whole step under its lock. The loader calls
    them with what it has opened and read.

    Attributes:
        uses: those of the lock: see StoreLock.
        held_by: the thread that holds the readers, if one does.
    """

    def __init__(self, owner: Owner, backend: Backend, counters: Counters) -> None:
        self.held_by: Callable[[], int | None] = lambda: None
        self._lock = owner.lock
        self.uses = owner.lock.uses
        self._cache = owner.cache
        self._owner = owner
        self._backend = backend
        self._counters = counters

    def require_running(self) -> None:
        """Raise RuntimeError if the store was closed. Takes no lock."""
        if self._owner.refusal.reason is not None:
            raise RuntimeError("the store was closed")

    def end(self, error: BaseException) -> None:
        """The device has failed for good: every call raises `error` from now on."""
        self._owner.end(error)

    def require_running_readers(self) -> None:
        """Raise RuntimeError if the calling thread holds the readers that it would wait for."""
        if self.held_by() == get_ident():
            raise RuntimeError(
                "files of this batch are still to be read, and quiesce() holds the readers: get "
                "batches before it or after it"
            )

    def begin_use(self, use: object) -> None:
        """The calling thread reads files itself: no memory is freed while `use` is in `uses`."""
        with self._lock:
            self.require_running()
            self.uses[use] = get_ident()

    def run_postponed(self) -> None:
        """Make the calls that were postponed until this thread has ended its use."""
        self._lock.run_postponed()

    def known_paths(self, most: int) -> list[str]:
        """Paths of up to `most` known files. Takes no lock: the list is only added to."""
        return self._cache.entries.paths[:most]

    def page_limit(self) -> int | None:
        """0 while pages are held and their size cannot change, else the budget in bytes.

        None is no budget. Takes no lock: `place` looks again.
        """
        return 0 if self._cache.ledger.held_pages else self._cache.ledger.max_bytes

    def place(
        self, task: ReadTask, group: Sequence[OpenEntry], page_bytes: int, pages_per_file: float
    ) -> tuple[list[OpenEntry], dict[Entry, BaseException]]:
        """Assign pages to all that need them; returns those, and the errors of those that failed.

        What is in neither is not needed: it is ABSENT again, and out of the task. `page_bytes` is
        the size of a page to use if no page is held; 0 leaves it. `pages_per_file` is the mean, if
        it is known. Raises RuntimeError if the store was closed.
        """
        placed: list[OpenEntry] = []
        failed: dict[Entry, BaseException] = {}
        with self._lock:
            self.require_running()
            self._set_page_bytes(page_bytes)
            if pages_per_file:
                self._cache.arena.pages_per_file = pages_per_file
            for opened in group:
                entry, layout = opened.entry, opened.feature.layout
                try:
                    if self._cache.allocate(entry, layout.span, layout.nbytes):
                        placed.append(opened)
                    else:
                        task.left.pop(entry, None)
                        self._tell(dict.fromkeys(self._cache.fail_loading(entry), 1))
                except Exception as error:
                    failed[entry] = error
                    if isinstance(error, NoPagesError) and self._backend.device.type != "cpu":
                        failed[entry] = DeviceMemoryError(str(error))
        return placed, failed

    def _set_page_bytes(self, page_bytes: int) -> None:
        ledger = self._cache.ledger
        if page_bytes and page_bytes != ledger.page_bytes and not ledger.held_pages:
            if ledger.page_bytes:
                self.free_arena()
            ledger.page_bytes = page_bytes
            self._backend.configure(page_bytes)

    def free_arena(self) -> None:
        """Free all pages. With the lock held, and only while no entry holds a page."""
        self._cache.forget_pages()
        self._backend.reset()

    def complete(
        self,
        left: dict[Entry, None],
        ready: Sequence[OpenEntry] = (),
        failed: Mapping[Entry, BaseException] = _NONE_FAILED,
    ) -> None:
        """End LOADING of the entries that have been read, and of those that failed.

        Takes them out of `left`, the entries of a task.
        """
        errors = dict(failed)
        arrived: dict[PendingBatch, int] = defaultdict(int)
        with self._lock:
            try:
                for entry, feature, version in ready:
                    try:
                        waiters = self._cache.finish_loading(
                            entry, feature.layout, feature.values, version
                        )
                    except Exception as error:  # raised by a policy
                        errors[entry] = error
                        continue
                    left.pop(entry, None)
                    self._counters.files_read += 1
                    self._counters.bytes_read += feature.bytes_read
                    for batch in waiters:
                        arrived[batch] += 1
                for entry, cause in errors.items():
                    self._counters.failures += 1
                    left.pop(entry, None)
                    self._fail(entry, self._cache.fail_loading(entry), cause, arrived)
            finally:
                # Whatever a policy raises: what is READY has no waiters any more.
                self._tell(arrived)

    def fail(self, entries: Iterable[Entry], error: BaseException) -> None:
        """End LOADING of entries that no reader reads."""
        self.complete({}, failed=dict.fromkeys(entries, error))

    def take_over(self, task: ReadTask, seconds: float) -> tuple[Entry, list[Entry]] | None:
        """Take a task from a reader that hangs: the entry that it is at, and the others.

        The entry fails with a TimeoutError. The others stay LOADING, without pages. None if the
        reader is not overdue.
        """
        with self._lock:
            hanging = task.revoke(seconds)
            if hanging is None:
                return None
            if hanging.pages:
                task.abandoned = hanging
            rest = [entry for entry in task.left if entry is not hanging]
            task.left.clear()
            self._counters.failures += 1
            cause = TimeoutError(f"not read within read_timeout={seconds:g} seconds")
            arrived: dict[PendingBatch, int] = defaultdict(int)
            self._fail(hanging, self._cache.abandon_loading(hanging), cause, arrived)
            self._tell(arrived)
            for entry in rest:
                self._cache.restart_loading(entry)
        return hanging, rest

    def end_abandoned(self, task: ReadTask) -> None:
        """The reader of a task that was taken over has returned: free the pages it wrote to."""
        with self._lock:
            if task.abandoned is not None:
                self._cache.fail_loading(task.abandoned)
            self._tell({})

    def _fail(
        self,
        entry: Entry,
        waiters: Sequence[PendingBatch],
        cause: BaseException,
        arrived: dict[PendingBatch, int],
    ) -> None:
        for batch in waiters:
            batch.fail(entry, cause)
            arrived[batch] += 1

    def _tell(self, arrived: Mapping[PendingBatch, int]) -> None:
        """Tell batches how many of their entries have arrived; wake consumers that wait.

        Only where a batch is complete or nothing is LOADING: a consumer that is woken in vain takes
        the interpreter from reader threads.
        """
        complete = [batch for batch, count in arrived.items() if batch.arrived(count)]
        if complete or not self._cache.loading:
            self._lock.changed.notify_all()
