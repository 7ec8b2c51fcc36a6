"""What a store has done so far."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StoreStats:
    """Counters since the store was made, and what it holds now. Times in seconds.

    Attributes:
        hits: features requested that were on the device or already on their way.
        misses: features requested for which a file had to be read.
        evictions: features that went so that others could come.
        failures: files that could not be loaded.
        skipped: features that were left out of batches, or replaced, because of that.
        files_read: files that were read, for requests or ahead of them.
        bytes_read: bytes read from storage for them.
        items: features cached now.
        cached_bytes: bytes of their tensors.
        padding_bytes: bytes of their pages that hold nothing; a large share of cached_bytes
            means that page_bytes does not fit the data.
        bypassed_items: features that are held only until in-flight batches have them.
        reserved_bytes: device memory taken for pages, used or not.
        page_bytes: size of a page; 0 before the first feature.
        wait_seconds: time that consumers waited for files.
    """

    hits: int
    misses: int
    evictions: int
    failures: int
    skipped: int
    files_read: int
    bytes_read: int
    items: int
    cached_bytes: int
    padding_bytes: int
    bypassed_items: int
    reserved_bytes: int
    page_bytes: int
    wait_seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of requests that were hits; 0.0 before the first request."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else 0.0

    def since(self, earlier: "StoreStats") -> "StoreStats":
        """What was counted after `earlier`; sizes are those of now."""
        return replace(self, **{n: getattr(self, n) - getattr(earlier, n) for n in _COUNTERS})


_COUNTERS = (
    "hits",
    "misses",
    "evictions",
    "failures",
    "skipped",
    "files_read",
    "bytes_read",
    "wait_seconds",
)
