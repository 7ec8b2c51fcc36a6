"""Small objects, many of which are got at once into scratch memory."""

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpucache_pipes.files.chunks import LEFT_TO_PYTHON, SIZE, START, STATUS, UNKNOWN, Chunk
from gpucache_pipes.files.forms import KnownForms
from gpucache_pipes.files.remote.bucket import WHOLE_BYTES, Answer, Bucket, Buckets
from gpucache_pipes.files.remote.errors import ERRORS
from gpucache_pipes.files.remote.versions import UNKNOWN_VERSION, ObjectVersion
from gpucache_pipes.files.source import Progress

_ALIGNMENT = 64
_MOST = 1024
"""Objects that are asked for in one go."""


class ObjectChunk(Chunk):
    """Objects in scratch memory."""

    def __init__(self, native: Any, known: KnownForms, files: int) -> None:
        super().__init__(native, known, files)
        self.urls: list[str] = []
        self.versions: list[ObjectVersion] = []

    def version(self, number: int) -> bytes | None:
        """See Scratch."""
        return self.versions[number].packed

    def plan_key(self, number: int) -> bytes | None:
        """See Chunk."""
        return self.versions[number].plan_key(self.urls[number])

    def file_version(self, number: int) -> tuple[int, int] | None:
        """See Scratch."""
        return self.versions[number].stored


class SmallObjects:
    """Gets objects, and keeps for each thread what it has got and not used yet.

    Args:
        buckets: answer.
    """

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._got = threading.local()

    def _answers(self) -> dict[str, Answer]:
        answers: dict[str, Answer] = self._got.__dict__.setdefault("answers", {})
        return answers

    def begin(self, urls: Sequence[str]) -> None:
        """A thread wants these objects. What it has is kept only if it goes on with the same."""
        expected: list[str] = self._got.__dict__.get("expected", [])
        if not expected or urls[: len(expected)] != expected:
            self.drop()

    def end(self, urls: list[str]) -> None:
        """The thread will go on with these objects, or give them up."""
        self._got.expected = urls

    def drop(self) -> None:
        """Drop what this thread has got."""
        self._answers().clear()
        self._got.expected = []

    def take(self, url: str) -> Answer | None:
        """What this thread has got of an object, once."""
        return self._answers().pop(url, None)

    def peek(self, url: str) -> Answer | None:
        """What this thread has got of an object."""
        return self._answers().get(url)

    def chunk(
        self, native: Any, known: KnownForms, urls: Sequence[str], progress: Progress
    ) -> ObjectChunk:
        """The first of these objects in scratch memory, but those that are large.

        All of them can be taken afterwards. There are as many as scratch has room for, or fewer, if
        `progress` says to stop.
        """
        chunk = ObjectChunk(native, known, len(urls))
        memory = chunk.memory.data
        used, sizes, full = 0, [], False
        for url, got in zip(urls, self._get(urls, len(memory), progress), strict=False):
            size = 0 if got.data is None or len(got.data) > WHOLE_BYTES else len(got.data)
            full = full or size > len(memory) - used
            if full:
                continue  # it is there for the next call
            chunk.starts.append(used)
            chunk.urls.append(url)
            chunk.versions.append(got.version)
            sizes.append(size)
            if size:
                memory[used : used + size] = memoryview(got.data)
                used += -(-size // _ALIGNMENT) * _ALIGNMENT
        rows = chunk.rows[: len(sizes)]
        rows[:, START], rows[:, SIZE] = chunk.starts, sizes
        rows[:, STATUS] = np.where(rows[:, SIZE] > 0, UNKNOWN, LEFT_TO_PYTHON)
        return chunk

    def _get(self, urls: Sequence[str], room: int, progress: Progress) -> list[Answer]:
        """Get the first of these objects, but those that are large, or were got before.

        Those of one bucket, as far as they go.
        """
        answers = self._answers()
        found: dict[int, Answer] = {}
        asked: list[int] = []
        names: list[str] = []
        first: Bucket | None = None
        for n, url in enumerate(urls[:_MOST]):
            got = answers.get(url)
            if got is None:
                try:
                    bucket, name = self._buckets.place(url)
                except ERRORS as error:
                    found[n] = Answer(None, UNKNOWN_VERSION, error)
                    continue
                listed = bucket.listed(url)
                if listed is None or not bucket.is_large(listed):
                    if first not in (None, bucket):
                        break
                    first = bucket
                    asked.append(n)
                    names.append(name)
                    continue
                got = Answer(None, listed)
            found[n] = got
        if first is not None:
            begin = time.monotonic_ns()

            def begins(at: int, moment: int) -> bool:
                progress.begin(asked[at], moment - begin)
                return not progress.stopped

            answered = first.get_many(names, room - _ALIGNMENT * len(asked), begins)
            found.update((asked[at], got) for at, got in answered.items())
        answers.update((urls[n], got) for n, got in found.items())
        end = next(n for n in itertools.count() if n not in found)
        return [found[n] for n in range(end)]
