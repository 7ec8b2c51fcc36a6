"""Memory of the simulated device: allocations by stream, and the current device of each thread."""

import contextlib
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Iterator


class WrongDeviceError(RuntimeError):
    """A call for one device while another one is current in the calling thread."""


class CurrentDevices:
    """The device that is current in each thread, as CUDA has it: device 0 in a new thread.

    With one device of a machine, nothing can be wrong. With another one, CUDA creates a context on
    device 0 where these calls are made without a care.

    Args:
        index: of the simulated device.

    Attributes:
        wrong: the calls that were made while another device was current, finalizers included.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.wrong: list[str] = []
        self._local = threading.local()

    @property
    def current(self) -> int:
        """The device of the calling thread."""
        return getattr(self._local, "index", 0)

    def set_current(self) -> None:
        """Make the simulated device current in the calling thread."""
        self._local.index = self.index

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """A context in which the simulated device is current."""
        before = self.current
        self._local.index = self.index
        try:
            yield
        finally:
            self._local.index = before

    def note(self, call: str) -> bool:
        """Whether the simulated device is current; else `call` is added to `wrong`."""
        if self.current == self.index:
            return True
        self.wrong.append(f"{call} in {threading.current_thread().name}")
        return False

    def require(self, call: str) -> None:
        """Raise WrongDeviceError unless the simulated device is current."""
        if not self.note(call):
            raise WrongDeviceError(
                f"{call} for device {self.index} while device {self.current} is current in "
                f"{threading.current_thread().name}"
            )


class Allocation:
    """Memory of the device. Once nothing refers to it, its stream may be given it again.

    Attributes:
        number: names the memory to the order checker.
    """

    __slots__ = ("_free", "number")

    def __init__(self, number: int, free: "deque[int]") -> None:
        self.number = number
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.number)


class StreamPools:
    """Gives memory out as torch's caching allocator does, without its sizes.

    Memory that was freed is given to the next allocation of the same size on the same stream, at
    once: the allocator knows that this stream uses it in order, and nothing of other streams. So a
    use on another stream that is not finished conflicts with the next use.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[int, int], deque[int]] = defaultdict(deque)
        self._numbers = itertools.count()

    def allocate(self, stream: int, nbytes: int) -> Allocation:
        """Memory of `nbytes` for a stream, by its number."""
        free = self._free[stream, nbytes]
        try:
            return Allocation(free.popleft(), free)
        except IndexError:
            return Allocation(next(self._numbers), free)
