"""What each part of the default policy earns: points of hit rate with it, less those without it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

from _workloads import workloads

from gpucache_pipes import simulate
from gpucache_pipes.cache import AccessPlan
from gpucache_pipes.cache.policies import by_epoch, clairvoyant, member, pipeline
from gpucache_pipes.cache.policies.by_epoch import ByEpoch
from gpucache_pipes.cache.policies.clairvoyant import Clairvoyant
from gpucache_pipes.cache.policies.pipeline import Pipeline
from gpucache_pipes.cache.policies.schedule import Schedule

_Without = Callable[[], AbstractContextManager[Any]]
_MANY = 1 << 60


def _fixed(owner: type, name: str, value: Any) -> AbstractContextManager[Any]:
    """An attribute of all objects of a class that keeps its value, whatever is assigned to it."""
    return patch.object(owner, name, property(lambda _: value, lambda *_: None), create=True)


PARTS: dict[str, _Without] = {
    "equal next uses after the last repeat": lambda: _fixed(AccessPlan, "last_repeated", _MANY),
    "nearer ones first once epochs break off": lambda: _fixed(Pipeline, "breaks_off", False),
    "keys that the plan never had go first": lambda: patch.object(
        Pipeline, "farthest", _without_strangers
    ),
    "following a plan out of order": lambda: _fixed(AccessPlan, "_max_displacement", 0),
    "noticing that a plan is wrong": lambda: _fixed(AccessPlan, "unannounced", -1),
    "dropping such a plan": lambda: patch.object(pipeline, "_MAX_UNANNOUNCED", _MANY),
    "by epoch: stale keys go": lambda: patch.object(ByEpoch, "stale", lambda _: iter(())),
    "by epoch: used keys go while files are new": lambda: patch.object(by_epoch, "_FEW_NEW", 1),
    "by epoch: an epoch cut short is none": lambda: _fixed(ByEpoch, "_epoch_length", 0),
    "W-TinyLFU where files repeat": lambda: patch.object(by_epoch, "_FEW_REPEATS", 2),
    "several: one policy for each": lambda: patch.object(
        Clairvoyant, "_pipeline", _one_for_all(Clairvoyant._pipeline)
    ),
    "several: keys go to the next user": lambda: patch.object(
        Clairvoyant, "_next_user", lambda self, key: self._latest
    ),
    "several: the pace of each": lambda: _fixed(Schedule, "_pace", 1.0),
    "several: pauses": lambda: _fixed(Schedule, "pause", 0),
    "several: pauses not seen yet": lambda: patch.object(
        Schedule, "time_until", _without_guesses(Schedule.time_until)
    ),
    "several: pipelines that are over": lambda: patch.object(member, "_PATIENCE", _MANY),
    "several: shorter periods first": lambda: patch.object(clairvoyant, "_SIMILAR", _MANY),
}


def _without_strangers(self: Any, limit: int = -1, farthest: Any = Pipeline.farthest) -> Any:
    for position, key in farthest(self, limit):
        if limit < self.plan.end:
            yield min(position, self.plan.end), key


def _without_guesses(original: Any) -> Any:
    return lambda self, ahead, left: ahead if self.pause is None else original(self, ahead, left)


def _one_for_all(original: Any) -> Any:
    return lambda self, owner: original(self, "all")


def ablate(shares: Sequence[float]) -> dict[str, Any]:
    """Print and return what each part earns on each workload: the most over the sizes."""
    rates: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    parts: dict[str, _Without] = {"": nullcontext, **PARTS}
    figures: dict[str, Any] = {}
    for part, without in parts.items():
        with without():
            rates[part] = {name: _rates(workload, shares) for name, workload in workloads().items()}
        figures[part] = earned = {}
        for name, (hits, evicted) in rates[part].items():
            gains = [100 * (a - b) for a, b in zip(rates[""][name][0], hits, strict=True)]
            spared = [b - a for a, b in zip(rates[""][name][1], evicted, strict=True)]
            best, worst = max(gains), min(gains)
            if part and (best >= 0.5 or worst <= -0.5 or max(spared) >= 0.02):
                earned[name] = {"most": best, "least": worst, "evictions spared": max(spared)}
        if part:
            print(part)
            for name, of in earned.items():
                line = f"{of['most']:+8.1f} points at most,{of['least']:+6.1f} at least"
                print(f"    {name:24}{line};{of['evictions spared']:+7.3f} evictions a request")
            print(end="", flush=True)
    return figures


def _rates(workload: Any, shares: Sequence[float]) -> tuple[list[float], list[float]]:
    """Hit rates, and evictions for each request, known and unknown."""
    hits, evicted = [], []
    for trace in (workload.trace(True), workload.trace(False)):
        for share in shares:
            result = simulate(trace, int(share * len(trace.names)))
            hits.append(result.hits / (len(trace) - len(trace.names)))
            evicted.append(result.evictions / len(trace))
    return hits, evicted
