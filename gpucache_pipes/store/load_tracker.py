"""What becomes of LOADING entries: the steps of the loader."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import get_ident
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpucache_pipes.cache import LOADING, NoPagesError, Numbers, distinct
from gpucache_pipes.device import Backend, DeviceMemoryError
from gpucache_pipes.files import Layout
from gpucache_pipes.store.announcement import Announcement
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.read_task import FileGroup, ReadTask
from gpucache_pipes.store.stats import Counters

GroupT = TypeVar("GroupT", bound=FileGroup)
_NONE_FAILED: Mapping[int, BaseException] = {}

if TYPE_CHECKING:
    from gpucache_pipes.store.shared_cache import SharedCache


class LoadTracker:
    """Assigns pages to entries that are read, ends their LOADING, and tells the batches that wait.

    A part of SharedCache: every public method is one whole step under its lock. The loader calls
    them with what it has opened and read.

    Attributes:
        uses: those of the lock: see StoreLock.
        waiting: by number, the batches of which files are being loaded.
        held_by: the thread that holds the readers, if one does.
    """

    def __init__(self, owner: "SharedCache", backend: Backend, counters: Counters) -> None:
        self.held_by: Callable[[], int | None] = lambda: None
        self._lock = owner.lock
        self.uses = owner.lock.uses
        self.waiting: dict[int, PendingBatch] = {}
        self._cache = owner.cache
        self._owner = owner
        self._backend = backend
        self._counters = counters

    def are_cached(self, numbers: Numbers) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which entries are cached, or being read into the cache; and which were evicted before.

        Takes no lock.
        """
        return self._cache.are_cached(numbers), self._cache.entries.evicted[numbers]

    def may_evict(self, numbers: Iterable[int]) -> bool:
        """Whether something may be evicted for these entries, which are being loaded. No lock."""
        return self._cache.evict_nothing.isdisjoint(numbers)

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

    def identity(self, number: int) -> tuple[str, str]:
        """Key and path of a file. Takes no lock: tables of files are only added to."""
        return self._cache.entries.key(number), self._cache.entries.paths[number]

    def identities(self, numbers: Sequence[int]) -> tuple[list[str], list[str]]:
        """Keys and paths of files. Takes no lock."""
        entries = self._cache.entries
        return entries.keys(numbers), [entries.paths[number] for number in numbers]

    def page_limit(self) -> int | None:
        """0 while pages are held and their size cannot change, else the budget in bytes.

        None is no budget. Takes no lock: `place` looks again.
        """
        return 0 if self._cache.ledger.held_pages else self._cache.ledger.max_bytes

    def place(
        self, task: ReadTask, group: GroupT, page_bytes: int, pages_per_file: float
    ) -> tuple[GroupT, list[Sequence[int]], dict[int, BaseException]]:
        """Assign pages to all that need them.

        Args:
            task: what the files belong to.
            group: what is to be read into them.
            page_bytes: the size of a page to use if no page is held; 0 leaves it.
            pages_per_file: the mean, if it is known.

        Returns:
            The files that have pages now, the pages of each, and the errors of those that failed,
            by number. What is in none of these is not needed: it is ABSENT again, and out of the
            task.

        Raises:
            RuntimeError: the store was closed.
        """
        cache = self._cache
        tried: list[Announcement] = []
        while True:
            with self._lock:
                self.require_running()
                self._set_page_bytes(page_bytes)
                if pages_per_file:
                    cache.arena.pages_per_file = pages_per_file
                cache.close_lost_batches()
                cache.layouts.tidy()  # here, where no number is in between
                numbers, layouts, failed = self._layouts_of(group)
                plans = [unbuilt for unbuilt in cache.log.unbuilt() if unbuilt not in tried]
                if not plans or cache.allocator.fits(layouts):
                    return self._allocate(task, group, numbers, layouts, failed)
            # The policy will choose victims. What it must know is found out without the lock.
            tried += plans
            for announcement in plans:
                announcement.build()

    def _layouts_of(self, group: FileGroup) -> tuple[Numbers, Numbers, dict[int, BaseException]]:
        """Entries, numbers of their layouts, and the errors of those that are too large."""
        layouts, which = group.layouts()
        numbers = np.array(group.numbers, np.intp)
        known = np.empty(len(layouts), np.intp)
        failed: dict[int, BaseException] = {}
        for at, layout in enumerate(layouts):
            known[at] = self._number(layout, group.numbers[0])
            if known[at] < 0:
                for number in numbers[which == at].tolist():
                    self._number(layout, number, failed)
        found = known[which]
        return numbers[found >= 0], found[found >= 0], failed

    def _number(
        self, layout: Layout, number: int, failed: dict[int, BaseException] | None = None
    ) -> int:
        """The number of a layout; -1 if it is too large, and the error for that entry."""
        try:
            return self._cache.allocator.layout_number(number, layout, layout.span, layout.nbytes)
        except MemoryError as error:
            if failed is not None:
                failed[number] = error
            return -1

    def _allocate(
        self,
        task: ReadTask,
        group: GroupT,
        numbers: Numbers,
        layouts: Numbers,
        failed: dict[int, BaseException],
    ) -> tuple[GroupT, list[Sequence[int]], dict[int, BaseException]]:
        cache = self._cache
        for number, error in cache.allocator.allocate(numbers, layouts).items():
            failed[number] = error
            if isinstance(error, NoPagesError) and self._backend.device.type != "cpu":
                failed[number] = DeviceMemoryError(str(error))
        without = numbers[cache.entries.state[numbers] == LOADING].tolist()
        if unneeded := [number for number in without if number not in failed]:
            for number in unneeded:
                task.left.pop(number, None)
            cache.fail_loading(np.array(unneeded, np.intp))
            self._tell()
        placed = group.without(failed.keys() | without) if without or failed else group
        return placed, cache.page_lists(placed.numbers), failed

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
        left: dict[int, None],
        ready: FileGroup | None = None,
        failed: Mapping[int, BaseException] = _NONE_FAILED,
        natively: int = 0,
        *,
        read: bool = True,
    ) -> None:
        """End the loading of the entries that have been read, and of those that failed.

        Takes them out of `left`, the entries of a task. With `read` they count as files read.
        """
        cache, counters = self._cache, self._counters
        with self._lock:
            try:
                if ready is not None:
                    cache.finish_loading(
                        np.array(ready.numbers, np.intp),
                        ready.values(),
                        ready.versions if any(ready.versions) else None,
                    )
                    for number in ready.numbers:
                        left.pop(number, None)
                    if read:
                        counters.files_read += len(ready.numbers)
                        counters.files_read_natively += natively
                        counters.bytes_read += ready.bytes_read()
                for number, cause in failed.items():
                    counters.failures += 1
                    left.pop(number, None)
                    self._fail(number, cause)
                if failed:
                    cache.fail_loading(np.array(list(failed), np.intp))
            finally:
                self._tell()

    def fail(self, numbers: Iterable[int], error: BaseException) -> None:
        """End the loading of entries that no reader reads."""
        self.complete({}, failed=dict.fromkeys(numbers, error))

    def restart(self, numbers: Sequence[int]) -> None:
        """These entries, which have pages, are read anew: they have none any more."""
        if numbers:
            with self._lock:
                self._cache.restart_loading(np.array(numbers, np.intp))

    def take_over(self, task: ReadTask, seconds: float) -> tuple[int, list[int]] | None:
        """Take a task from a reader that hangs: the entry that it is at, and the others.

        The entry fails with a TimeoutError. The others stay LOADING, without pages. None if the
        reader is not overdue.
        """
        cache = self._cache
        with self._lock:
            hanging = task.revoke(seconds)
            if hanging is None:
                return None
            rest = [number for number in task.left if number != hanging]
            task.left.clear()
            self._counters.failures += 1
            self._fail(hanging, TimeoutError(f"not read within read_timeout={seconds:g} seconds"))
            if cache.abandon_loading(hanging):
                task.abandoned = hanging
            self._tell()
            cache.restart_loading(np.array(rest, np.intp))
        return hanging, rest

    def end_abandoned(self, task: ReadTask) -> None:
        """The reader of a task that was taken over has returned: free the pages it wrote to."""
        with self._lock:
            if task.abandoned is not None:
                self._cache.fail_loading(np.array([task.abandoned], np.intp))
            self._tell()

    def _fail(self, number: int, cause: BaseException) -> None:
        """Note the error for the batches that wait for this entry, if it is still being loaded."""
        if self._cache.is_loading(np.array([number], np.intp))[0]:
            path = self._cache.entries.paths[number]
            for batch in self.waiting.values():
                batch.fail(number, path, cause)

    def wait_for(self, number: int, batch: PendingBatch) -> None:
        """Files of a new batch are being loaded. With the lock held."""
        numbers = distinct(batch.numbers)
        batch.missing = numbers[self._cache.is_loading(numbers)]
        self.waiting[number] = batch

    def _tell(self) -> None:
        """Note what has arrived of the batches that wait; wake the consumers of complete ones.

        A consumer that is woken in vain takes the interpreter from reader threads.
        """
        complete = False
        for number, batch in list(self.waiting.items()):
            batch.missing = batch.missing[self._cache.is_loading(batch.missing)]
            if not len(batch.missing):
                del self.waiting[number]
                complete = True
        if complete or not self._cache.loading:
            self._lock.changed.notify_all()
