"""From files to pages: what reader threads do."""

import contextlib
import threading
from collections.abc import Sequence

from gpucache_pipes.cache import Cache, Entry, State
from gpucache_pipes.device import Backend
from gpucache_pipes.files import Opener, OpenFeature, ReaderPool
from gpucache_pipes.pages import choose_page_bytes
from gpucache_pipes.tracing import trace

_FILES_PER_TASK = 32
"""Few enough that several readers share a batch, many enough that a task costs little."""

_BYTES_PER_UPLOAD = 32 << 20
"""What is read before it is sent up; staging memory is in proportion."""


class Loader:
    """Reads LOADING entries, in the threads of `pool` or, without one, in the caller's.

    `changed` is the condition of the store's lock. Methods that say so are called with it held;
    while files are opened and read it is not.
    """

    def __init__(
        self,
        cache: Cache,
        backend: Backend,
        open_file: Opener,
        pool: ReaderPool | None,
        page_bytes: int | None,
        changed: threading.Condition,
    ) -> None:
        self._cache = cache
        self._backend = backend
        self._open_file = open_file
        self._pool = pool
        self._page_bytes = page_bytes
        self._changed = changed
        # Counters; under the lock.
        self.files_read = 0
        self.bytes_read = 0
        self.failures = 0

    def submit(self, entries: Sequence[Entry]) -> None:
        """Read `entries`, which are LOADING. Without the lock."""
        if self._pool is None:
            if entries:
                self._load(entries)
            return
        # Fewer files in a task when there are few, so that all readers have work.
        size = min(_FILES_PER_TASK, -(-len(entries) // len(self._pool.threads)) or 1)
        for start in range(0, len(entries), size):
            self._pool.submit(self._load_in_thread, entries[start : start + size])

    def _load_in_thread(self, entries: Sequence[Entry]) -> None:
        # Whoever waits has been told of any error, and the thread must live on.
        with contextlib.suppress(BaseException):
            self._load(entries)

    def _load(self, entries: Sequence[Entry]) -> None:
        """Open, place, read and finish every entry. None is LOADING afterwards."""
        try:
            group: list[tuple[Entry, OpenFeature]] = []
            size = 0
            for entry in entries:
                if self._pool is not None and self._pool.stopping:
                    raise RuntimeError("the store was closed")
                try:
                    with trace("gpucache::read"):
                        feature = self._open_file(entry.key)
                except Exception as error:
                    self._end(failed={entry: error})
                    continue
                group.append((entry, feature))
                size += feature.layout.span
                if size >= _BYTES_PER_UPLOAD:
                    self._upload(group)
                    group, size = [], 0
            if group:
                self._upload(group)
        except BaseException as error:
            # An interrupt, or a bug: nobody may wait for these for ever.
            with self._changed:
                left = {e: error for e in entries if e.state is State.LOADING}
            self._end(failed=left)
            raise

    def _upload(self, group: Sequence[tuple[Entry, OpenFeature]]) -> None:
        try:
            placed, failed = self._place(group)
            with trace("gpucache::upload"):
                upload = self._backend.upload([entry.pages for entry, _ in placed])
                for number, (entry, feature) in enumerate(placed):
                    try:
                        feature.read_into(upload.buffers(number))
                    except Exception as error:
                        failed[entry] = error
                upload.finish()
        finally:
            for _, feature in group:
                feature.close()
        self._end([item for item in placed if item[0] not in failed], failed)

    def _place(
        self, group: Sequence[tuple[Entry, OpenFeature]]
    ) -> tuple[list[tuple[Entry, OpenFeature]], dict[Entry, BaseException]]:
        """Give pages to all that need them; what nobody needs any more is given up."""
        placed: list[tuple[Entry, OpenFeature]] = []
        failed: dict[Entry, BaseException] = {}
        with self._changed:
            pinned = self._cache.pinned()
            self._fit_pages([feature.layout.span for _, feature in group])
            for entry, feature in group:
                try:
                    layout = feature.layout
                    if self._cache.place(entry, layout.span, layout.nbytes, pinned):
                        placed.append((entry, feature))
                    else:
                        self._cache.give_up(entry)
                except Exception as error:
                    failed[entry] = error
        return placed, failed

    def _fit_pages(self, spans: Sequence[int]) -> None:
        ledger = self._cache.ledger
        if not ledger.page_bytes and any(spans):
            ledger.page_bytes = self._page_bytes or choose_page_bytes(spans)
            self._backend.configure(ledger.page_bytes)

    def _end(
        self,
        ready: Sequence[tuple[Entry, OpenFeature]] = (),
        failed: dict[Entry, BaseException] | None = None,
    ) -> None:
        """Tell everybody who waits what became of their entries."""
        with self._changed:
            cache = self._cache
            pinned = cache.pinned()
            for entry, feature in ready:
                self.files_read += 1
                self.bytes_read += feature.bytes_read
                for ticket in cache.finish(entry, feature.layout, feature.values, pinned):
                    ticket.pending -= 1
            for entry, error in (failed or {}).items():
                self.failures += 1
                for ticket in cache.give_up(entry):
                    ticket.pending -= 1
                    ticket.errors[entry] = error
            self._changed.notify_all()
