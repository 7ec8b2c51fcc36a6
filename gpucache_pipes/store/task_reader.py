"""Opens the files of a read task, has pages assigned, reads into them, and reports."""

from collections.abc import Container, Iterator, Sequence

import numpy as np

from gpucache_pipes.device import Backend, Upload, ends_the_device, is_device_error
from gpucache_pipes.files import OpenFeature, Source, VersionedFeature, read_many
from gpucache_pipes.store.group_reader import GroupReader, memory_of
from gpucache_pipes.store.host_tier import HostTier
from gpucache_pipes.store.load_tracker import LoadTracker
from gpucache_pipes.store.page_size import choose_page_bytes, pages_per_file
from gpucache_pipes.store.read_task import OpenFiles, ReadTask, Revoked
from gpucache_pipes.store.tracing import trace

_KNOWN_FILES = 100_000
"""Known files from which some are drawn to choose a page size."""


class TaskReader:
    """Reads files into the pages that `loads` assigns. For any number of threads.

    It changes no entry itself. Files are opened and read without the lock of the store: in one go
    where the source can, else one by one.

    Args:
        source: opens files.
        loads: the reader side of the shared cache.
        backend: takes the bytes.
        in_threads: whether reader threads call it, or the caller of the store.
        page_bytes: the size of a page; None chooses by the first files.
        upload_bytes: what goes to the device at once, at most, unless one file is larger: staging
            memory is in proportion to it.
        revalidate: note the version of each file that is read.
        host: features in host memory.
        timed: whether readers that hang are replaced.

    Attributes:
        running: tasks under way. Adding and discarding an item of a set is atomic; others iterate
            over a copy.
        stopping: the store was closed: end early.
        opens_at_once: whether the source has opened files in one go, of late.
    """

    def __init__(
        self,
        source: Source,
        loads: LoadTracker,
        backend: Backend,
        *,
        in_threads: bool,
        page_bytes: int | None,
        upload_bytes: int,
        revalidate: bool,
        host: HostTier | None = None,
        timed: bool = False,
    ) -> None:
        self._source = source
        # Older sources have no such method.
        self._open_at_once = getattr(source, "open_many", _open_none)
        self._keep = getattr(source, "keep", None)
        self._loads = loads
        self._backend = backend
        self._in_threads = in_threads
        self._page_bytes = page_bytes
        self._upload_bytes = upload_bytes
        self._revalidate = revalidate
        self._host = host
        # Reading goes straight to pages, where a reader that was replaced must not write.
        self._open_group = None if timed else getattr(source, "open_group", None)
        self._groups = GroupReader(loads, backend, page_bytes, upload_bytes, host)
        self.running: set[ReadTask] = set()
        self.stopping = False
        self.opens_at_once = False

    def stop(self) -> None:
        """End the tasks under way after the file at hand. Takes no lock."""
        self.stopping = True
        for task in list(self.running):
            task.stop()

    def read(self, numbers: Sequence[int], caller: list[int]) -> int:
        """Open, place, read and report every entry. None is LOADING afterwards.

        `caller` is the list of a caller that fails what is still in it when this raises. It is
        emptied once the entries are safe here: they are always in one place or the other. Returns
        how many files the native reader has read.
        """
        task = ReadTask(numbers)
        natively = 0
        self.running.add(task)
        try:
            caller.clear()
            numbers = self._read_groups(numbers, task)
            while numbers:
                features = self._open_many(numbers, task)
                begun, numbers = numbers[: len(features)], numbers[len(features) :]
                opened = [feature for feature in features if feature is not None]
                if len(opened) < len(features):
                    self._load_each(begun, features, task)
                else:
                    versions = [f.version for f in opened] if self._revalidate else []
                    natively += self._upload(OpenFiles(list(begun), list(opened), versions), task)
            return natively
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
            self.running.discard(task)
            task.close_opened()

    def _read_groups(self, numbers: Sequence[int], task: ReadTask) -> Sequence[int]:
        """Read those of these entries that other tiers have; returns the others."""
        numbers = self._groups.from_host(numbers, task)
        if not numbers or self._open_group is None:
            return numbers
        progress = task.begin_many(numbers)
        try:
            with trace("gpucache::read"):
                group = self._open_group(*self._loads.identities(numbers), progress)
        finally:
            task.end()
        if group is None:
            return numbers
        self.opens_at_once = self.opens_at_once or len(group) > 0
        return self._groups.from_segments(group, numbers, task, self._revalidate)

    def _open_many(
        self, numbers: Sequence[int], task: ReadTask
    ) -> "Sequence[VersionedFeature | None]":
        """Open the first of these entries, and at least one; None is left to `_open`."""
        features: list[VersionedFeature | None] = []
        progress = task.begin_many(numbers)
        try:
            if self.stopping:  # after `begin_many`: `stop` has missed it, or will stop it
                raise RuntimeError("the store was closed")
            with trace("gpucache::read"):
                features = self._open_at_once(*self._loads.identities(numbers), progress)
        finally:
            task.end()
        self.opens_at_once = bool(features)
        return features or [None] * len(numbers)

    def _load_each(
        self,
        numbers: Sequence[int],
        features: "Sequence[VersionedFeature | None]",
        task: ReadTask,
    ) -> None:
        """Open those that are not, and read all, at most `upload_bytes` and a file at a time."""
        group = OpenFiles([], [], [])
        size = 0
        for number, known in zip(numbers, features, strict=True):
            if self.stopping:
                raise RuntimeError("the store was closed")
            version, feature = self._open(number, task) if known is None else (None, known)
            if isinstance(feature, BaseException):
                self._loads.complete(task.left, failed={number: feature})
                continue
            group.numbers.append(number)
            group.features.append(feature)
            if self._revalidate:
                group.versions.append(version if known is None else known.version)
            size += feature.layout.span
            if size >= self._upload_bytes:
                self._upload(group, task)
                group, size = OpenFiles([], [], []), 0
        if group.numbers:
            self._upload(group, task)

    def _open(
        self, number: int, task: ReadTask
    ) -> tuple[bytes | None, OpenFeature | BaseException]:
        """The version of a file, and what was opened, or why that failed."""
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
            return None, error
        finally:
            task.end(feature)
        # After `end`, which raises in a reader that was replaced: it must not touch anything.
        task.opened[number] = feature
        return version, feature

    def _concerns_the_file(self, error: BaseException) -> bool:
        """Whether an exception fails one file, and the others are read all the same."""
        if is_device_error(error):
            return False
        # In a reader thread even a SystemExit comes from the file: no signal is handled there.
        return isinstance(error, Exception) or self._in_threads

    def _upload(self, group: OpenFiles, task: ReadTask) -> int:
        """Have pages assigned, read into them, and report. Returns how many were read natively."""
        try:
            placed, pages, failed = self._loads.place(task, group, *self._choose_page_bytes(group))
            natively = 0
            with trace("gpucache::upload"):
                for begin, end in self._parts(pages):
                    upload = self._backend.upload(pages[begin:end])
                    features = placed.features[begin:end]
                    left = self._read_many(features, upload)
                    natively += len(features) - len(left)
                    for at in left:
                        number, feature = placed.numbers[begin + at], features[at]
                        task.begin(number)
                        try:
                            feature.read_into(upload.buffers(at))
                        except BaseException as error:
                            if not self._concerns_the_file(error):
                                raise
                            failed[number] = error
                        finally:
                            task.end(feature)
                    if self._keep is not None or self._host is not None:
                        self._keep_copies(placed, begin, end, upload, failed)
                    upload.finish()
        finally:
            task.close_opened()
        ready = placed.without(failed) if failed else placed
        self._loads.complete(task.left, ready, failed, natively)
        return natively

    def _keep_copies(
        self,
        placed: OpenFiles,
        begin: int,
        end: int,
        upload: Upload,
        failed: Container[int],
    ) -> None:
        """Have lower tiers copy those of these features that were read."""
        at = [n for n in range(begin, end) if placed.numbers[n] not in failed]
        numbers = np.array([placed.numbers[n] for n in at], np.intp)
        features = [placed.features[n] for n in at]
        memory, offsets = memory_of(upload, end - begin)
        places = offsets[np.array(at, np.intp) - begin]
        kept = self._groups.keep_on_host(
            numbers, [feature.layout for feature in features],
            [feature.values for feature in features],
            [placed.versions[n] for n in at] if placed.versions else [],
            memory if memory is not None else memoryview(b""), places,
            places >= (0 if memory is not None else 1 << 62),
        )  # fmt: skip
        if self._keep is not None:
            keys, _ = self._loads.identities(numbers.tolist())
            self._keep(
                keys,
                features,
                memory,
                places.tolist(),
                lambda k: upload.buffers(at[k] - begin),
                kept.tolist(),
            )

    def _read_many(self, features: Sequence[OpenFeature], upload: Upload) -> Sequence[int]:
        """Read all that can be read in one go; the positions of the others."""
        memory, offsets = upload.memory()
        if memory is None:
            return range(len(features))
        return read_many(features, memory, offsets)

    def _parts(self, pages: list[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """What goes to the device at once: from which to which feature, given their pages."""
        most = self._upload_bytes // (self._backend.page_bytes or 1)
        if sum(map(len, pages)) <= most:
            yield 0, len(pages)
            return
        begin = total = 0
        for end, held in enumerate(pages):
            if end > begin and total + len(held) > most:
                yield begin, end
                begin, total = end, 0
            total += len(held)
        if begin < len(pages):
            yield begin, len(pages)

    def _choose_page_bytes(self, group: OpenFiles) -> tuple[int, float]:
        """The page size that suits these features and others like them; 0 for no choice.

        And how many pages a file takes in the mean.
        """
        limit = self._loads.page_limit()
        if limit == 0:
            return 0, 0.0
        features = group.features
        fits = [f for f in features if limit is None or f.layout.nbytes <= limit]
        spans = [feature.layout.span for feature in fits]
        if not any(spans):
            return self._page_bytes or 0, 0.0
        sizes = self._source.sample_sizes(self._loads.known_paths(_KNOWN_FILES))
        overhead = max(0, min(feature.bytes_read - feature.layout.span for feature in fits))
        page_bytes = self._page_bytes or choose_page_bytes(spans, sizes, overhead)
        return page_bytes, pages_per_file(spans, sizes, overhead, page_bytes)


def _open_none(*arguments: object) -> "list[VersionedFeature | None]":
    return []
