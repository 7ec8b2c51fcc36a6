"""What each part of the default policy earns: hit rates with it, less hit rates without it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import PropertyMock, patch

from _workloads import workloads

from gpucache_pipes import simulate
from gpucache_pipes.cache import AccessPlan
from gpucache_pipes.cache.policies import clairvoyant
from gpucache_pipes.cache.policies.by_epoch import ByEpoch
from gpucache_pipes.cache.policies.clairvoyant import Clairvoyant
from gpucache_pipes.cache.policies.lru import LRU
from gpucache_pipes.cache.policies.schedule import Schedule
from gpucache_pipes.cache.policies.set_dueling import SetDueling
from gpucache_pipes.cache.policies.wtinylfu import WTinyLFU

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def _no_pause(self: Any, now: int, pause: float, remaining: float, others: float) -> float:
    silence = self.silence(now)
    return silence if silence > 2 * self._longest_silence else 0


def _with_rivals(*kinds: type) -> AbstractContextManager[Any]:
    def update(self: Any) -> None:
        if self.leader is self.by_epoch and self.by_epoch.repeats > max(
            8, 0.02 * self.by_epoch.requests
        ):
            rivals = [kind() for kind in kinds]
            for group in (self.by_epoch.stale, self.by_epoch.waiting, self.by_epoch.used):
                for key in group:
                    for rival in rivals:
                        rival.on_insert(key)
            self._policies = [self.by_epoch, *rivals]
            if rivals:
                self.leader = rivals[0]

    return patch.object(SetDueling, "update_shadows", update)


@contextmanager
def _all(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with contexts[0]:
        if len(contexts) > 1:
            with _all(*contexts[1:]):
                yield
        else:
            yield


def _victims(*names: str) -> Any:
    return patch.object(
        ByEpoch, "victims", lambda self, key: iter([k for n in names for k in getattr(self, n)])
    )


def parts() -> dict[str, AbstractContextManager[Any]]:
    """A context for each part, in which it is missing."""
    return {
        "schedules": _all(
            patch.object(Schedule, "duration", lambda self, n: n),
            patch.object(Schedule, "time_until_next", lambda *_: 0),
            patch.object(Schedule, "pause", PropertyMock(return_value=0)),
        ),
        "pauses": _all(
            patch.object(Schedule, "time_until_next", _no_pause),
            patch.object(Schedule, "pause", PropertyMock(return_value=0)),
        ),
        "silence": patch.object(Schedule, "silence", lambda *_: 0),
        "continuing ended pipelines": patch.object(
            Clairvoyant, "_resume_ended", lambda self, new, owner, keys: new
        ),
        "removing silent pipelines": patch.object(
            Clairvoyant, "_remove_silent_pipelines", lambda _: None
        ),
        "set dueling": _with_rivals(),
        "set dueling, for W-TinyLFU": _with_rivals(WTinyLFU),
        "set dueling, for LRU": _with_rivals(LRU),
        "ignoring announcements": patch.object(clairvoyant, "_IGNORED_ANNOUNCEMENTS", 0),
        "dropping wrong plans": patch.object(clairvoyant, "_MAX_UNANNOUNCED", 1 << 60),
        "following out of order": patch.object(
            AccessPlan, "_max_displacement", PropertyMock(return_value=0)
        ),
        "by epoch: used keys go": _victims("stale"),
        "by epoch: stale keys go": _victims("used"),
    }


def run() -> dict[str, Any]:
    """Points of hit rate, the most and the least over the sizes, known and unknown."""
    missing = {"": _all(patch.object(clairvoyant, "NEVER", float("inf"))), **parts()}
    rates: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for part, context in missing.items():
        with context:
            rates[part] = {}
            for name, workload in workloads().items():
                results = []
                for known in (True, False):
                    trace = workload.trace(known)
                    for share in SHARES:
                        result = simulate(trace, int(share * len(trace.names)))
                        could = len(trace) - len(trace.names)
                        results.append((result.hits / could, result.evictions / len(trace)))
                rates[part][name] = results
        earned = {
            name: [100 * (a[0] - b[0]) for a, b in zip(rates[""][name], results, strict=True)]
            for name, results in rates[part].items()
        }
        print(f"{part or 'nothing'}:", flush=True)
        for name, points in earned.items():
            if max(map(abs, points)) >= 0.5:
                known, unknown = points[: len(SHARES)], points[len(SHARES) :]
                print(f"    {name:24}" + "".join(f"{p:7.1f}" for p in known + unknown), flush=True)
    return rates
