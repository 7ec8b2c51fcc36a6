"""What a store has done so far."""

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from gpucache_pipes.cache import Cache
from gpucache_pipes.device import Backend
from gpucache_pipes.units import format_bytes


@dataclass
class Counters:
    """What a store counts while it runs; see StoreStats. Changed with its lock held."""

    hits: int = 0
    misses: int = 0
    failures: int = 0
    skipped: int = 0
    files_read: int = 0
    files_read_natively: int = 0
    bytes_read: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class StoreStats:
    """Counters since the store was made, and what it holds now. Times in seconds.

    Attributes:
        hits: features requested that were on the device or already being read.
        misses: features requested for which a file had to be read.
        failures: files that could not be loaded.
        skipped: features that were left out of batches, or replaced, because of that.
        files_read: files that were read, for requests or ahead of them.
        files_read_natively: those of them that the native reader has read. The others are large or
            of forms that it does not know; or there is no native reader.
        bytes_read: bytes read from storage for them.
        wait_seconds: time that consumers waited for files.
        evictions: features that were evicted to make room for others.
        items: features cached now.
        cached_bytes: bytes of their tensors.
        padding_bytes: bytes of their pages that hold nothing; a large share of cached_bytes means
            that page_bytes does not fit the data.
        bypassed_items: features that are not cached, and held until batches in flight have them.
        pending_batches: batches that were requested, and neither gathered nor cancelled.
        reserved_bytes: device memory of all pages, used or not.
        staging_bytes: page-locked host memory for uploads; 0 on the CPU.
        page_bytes: size of a page; 0 before the first feature.
        reader_threads: how many there are now.
        host_hits: features that were served from host memory; among `misses`, not in `files_read`.
        host_items: features in host memory now.
        host_cached_bytes: bytes of their tensors.
        host_reserved_bytes: host memory of their pages, used or not.
        disk_hits: features that came from the disk cache; those in `files_read`, too.
        disk_written: features that this store has written into it, in complete segments.
        disk_unpackable: features that cannot be kept there, since they hold other objects.
        disk_bytes: size of all of its segments.
        files_received: features that came from the caches of other ranks; neither hits nor misses
            of this one, where `hits` and `misses` count what it has served.
        bytes_received: bytes of their pages.
    """

    hits: int
    misses: int
    failures: int
    skipped: int
    files_read: int
    files_read_natively: int
    bytes_read: int
    wait_seconds: float
    evictions: int
    items: int
    cached_bytes: int
    padding_bytes: int
    bypassed_items: int
    pending_batches: int
    reserved_bytes: int
    staging_bytes: int
    page_bytes: int
    reader_threads: int
    host_hits: int = 0
    host_items: int = 0
    host_cached_bytes: int = 0
    host_reserved_bytes: int = 0
    disk_hits: int = 0
    disk_written: int = 0
    disk_unpackable: int = 0
    disk_bytes: int = 0
    files_received: int = 0
    bytes_received: int = 0

    @classmethod
    def of(cls, cache: Cache, counters: Counters, backend: Backend, readers: int) -> "StoreStats":
        """The statistics of a cache. With the lock of its store held."""
        ledger = cache.ledger
        return cls(
            **vars(counters),
            evictions=cache.evictions,
            items=ledger.cached_items,
            cached_bytes=ledger.cached_bytes,
            padding_bytes=ledger.cached_pages * ledger.page_bytes - ledger.cached_bytes,
            bypassed_items=cache.bypassed,
            pending_batches=len(cache.pins.batches),
            reserved_bytes=backend.reserved_bytes,
            staging_bytes=backend.staging_bytes,
            page_bytes=ledger.page_bytes,
            reader_threads=readers,
        )

    @property
    def hit_rate(self) -> float:
        """Share of requests that were hits, 0 to 1; 0.0 before the first request."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else 0.0

    @property
    def transient_items(self) -> int:
        """The former name of `bypassed_items`."""
        return self.bypassed_items

    def as_dict(self) -> dict[str, float]:
        """The figures by name, with `hit_rate`: for loggers."""
        return {**asdict(self), "hit_rate": self.hit_rate}

    def __str__(self) -> str:
        """The figures in units, one a line."""
        return "\n".join(f"{name:21} {text}" for name, text in self._in_units())

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        rows = "".join(
            f"<tr><td style='text-align:left'>{name}</td><td>{html.escape(text)}</td></tr>"
            for name, text in self._in_units()
        )
        return f"<table>{rows}</table>"

    def _in_units(self) -> Iterator[tuple[str, str]]:
        for name, value in self.as_dict().items():
            if name.endswith("_bytes") or name == "bytes_read":
                yield name, format_bytes(int(value))
            elif name == "wait_seconds":
                yield name, f"{value:.3g} s"
            elif name == "hit_rate":
                yield name, f"{value:.1%}"
            else:
                yield name, f"{value:,}"

    def since(self, earlier: "StoreStats") -> "StoreStats":
        """The counters less those of `earlier`, and the sizes of now."""
        return replace(self, **{n: getattr(self, n) - getattr(earlier, n) for n in _COUNTED})


def describe(cache: Cache, counters: Counters) -> str:
    """What a store holds, in a line. Takes no lock: an estimate while others change it."""
    ledger = cache.ledger
    budget = "" if ledger.max_bytes is None else f" of {format_bytes(ledger.max_bytes)}"
    requests = counters.hits + counters.misses
    hits = f", {counters.hits / requests:.0%} hits" if requests else ""
    return (
        f"{format_bytes(ledger.cached_bytes)}{budget} cached, {ledger.cached_items:,} items, "
        f"{type(cache.policy).__name__.lower()}{hits}"
    )


_COUNTED = (
    *Counters.__dataclass_fields__, "evictions", "host_hits",
    "disk_hits", "disk_written", "disk_unpackable", "files_received", "bytes_received",
)  # fmt: skip
