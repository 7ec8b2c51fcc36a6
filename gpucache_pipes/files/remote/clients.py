"""What RemoteFiles asks of an object store, and which library asks it."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from gpucache_pipes.files.remote.errors import translate
from gpucache_pipes.files.remote.urls import OBSTORE, Location
from gpucache_pipes.files.remote.versions import ObjectVersion
from gpucache_pipes.files.remote.workers import Turns

Options = Mapping[str, Any]
Found = list[tuple[str, ObjectVersion]]
"""A part of a listing: names of objects and what the server says of them."""

_T = TypeVar("_T")

RETRY_SECONDS = 120.0
"""For how long a request is tried, unless storage_options say otherwise."""

ATTEMPTS = 11
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Got(NamedTuple):
    """What a server answers.

    Attributes:
        data: bytes; None if the object is larger than was asked for.
        version: of the object.
        md5: its etag, if that may be the MD5 of the whole object.
    """

    data: Any
    version: ObjectVersion
    md5: bytes | None


class NoRangesError(Exception):
    """The server cannot send a part of an object, so that all of it has to be asked for."""


class Client(Protocol):
    """The requests for one bucket, container or host. For any number of threads.

    Methods raise OSError or ValueError, which name the URL and show no credentials, after they have
    tried again what may pass. Names are those of `Location`.

    Attributes:
        root: see Location.
    """

    root: str

    def get(self, name: str, most: int | None) -> Got:
        """An object, by one request; without its bytes if they are more than `most`."""

    def get_turns(
        self, names: Sequence[str], turns: Turns, found: dict[int, Any], most: int
    ) -> None:
        """Get objects whose turn it is, until there are no more. Several threads do so at once.

        Args:
            names: of the objects.
            turns: hands out positions in `names`.
            found: gets, by position, what `finish` makes an answer of.
            most: see `get`.
        """

    def finish(self, name: str, held: Any) -> Got | None:
        """An answer of what `get_turns` has found. None if it has to be got again.

        Raises as `get`.
        """

    def get_again(self, name: str, most: int | None) -> Got:
        """As `get`, after a request that counts as the first attempt."""

    def get_range(self, name: str, start: int, end: int) -> tuple[Any, ObjectVersion]:
        """Bytes `start` to `end` of an object, and its version. Raises NoRangesError.

        Fewer bytes only if its version says that it is smaller.
        """

    def head(self, name: str) -> ObjectVersion:
        """The version of an object."""

    def list(self, prefix: str) -> Iterator[Found]:
        """All objects whose names begin with `prefix`, by pages. It is "" or ends with a slash."""

    def list_directly(self, prefix: str) -> Found:
        """Those without a further slash in their names, by requests for these alone."""


def open_client(location: Location, options: Options) -> Client:
    """The client for the root of a location.

    Raises:
        ImportError: a library is not installed; says how to install it.
        ValueError: the options are not those of the library.
    """
    if location.scheme in OBSTORE:
        from gpucache_pipes.files.remote.obstore_client import ObstoreClient

        return ObstoreClient(location, options)
    from gpucache_pipes.files.remote.fsspec_client import FsspecClient

    return FsspecClient(location, options)


class Retries:
    """Repeats requests that have failed and may succeed, after pauses that grow and are random.

    Args:
        seconds: after which a request is not repeated any more.
        attempts: how often it is made at most.
        sleep: pauses.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        seconds: float = RETRY_SECONDS,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._attempts = attempts
        self._sleep = sleep
        self._clock = clock

    def require_again(self, error: BaseException, root: str, name: str) -> None:
        """Raise what `translate` says of an exception, unless asking again may help."""
        failure = translate(error, f"{root}/{name}")
        if not failure.again or self._attempts < 2:
            raise failure.error from None

    def call(self, request: Callable[[], _T], root: str, name: str, before: int = 0) -> _T:
        """The result of a request, which failed `before` times.

        Raises what `translate` says, or NoRangesError.
        """
        begin = self._clock()
        for attempt in itertools.count(1 + before):
            try:
                return interruptible(request)
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException as error:
                failure = translate(error, f"{root}/{name}")
            # Outside of the block: an exception that is raised within refers to that of the client.
            if failure.no_ranges:
                raise NoRangesError
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(attempt - 1, 20))
            pause *= random.uniform(0.5, 1.5)
            over = self._clock() - begin + pause > self._seconds
            if not failure.again or attempt >= self._attempts or over:
                raise failure.error
            self._sleep(pause)
        raise AssertionError("unreachable")


def interruptible(request: Callable[[], _T]) -> _T:
    """Make a request so that Ctrl-C ends waiting for it.

    Libraries do not look for signals while they wait for the network. So the main thread leaves
    the request to another one, which takes 0.1 ms.
    """
    if threading.current_thread() is not threading.main_thread():
        return request()
    results: list[_T] = []
    errors: list[BaseException] = []

    finished = threading.Event()

    def run() -> None:
        try:
            results.append(request())
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=run, name="gpucache-request", daemon=True).start()
    finished.wait()
    if errors:
        error = errors.pop()
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame
    return results[0]
