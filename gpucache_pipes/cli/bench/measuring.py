"""Measures contenders in rounds, in a random order within each, and keeps every time."""

import gc
import random
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpucache_pipes.cli.bench.beside import Step, busy_processes, measure_overlap
from gpucache_pipes.cli.bench.collation import checksum
from gpucache_pipes.cli.bench.contender import Contender, NotApplicableError, Run
from gpucache_pipes.cli.bench.loaders import BASELINE
from gpucache_pipes.cli.bench.work import Work
from gpucache_pipes.store.progress import progress_bar

CASES = ("first", "later", "partial", "overlap", "busy")
"""What is measured; see `Series`."""

BUSY_SECONDS = 1.0
"""How long the case "busy" is measured in a turn: shorter, and a thread that has just been idle is
preferred to the busy processes."""


@dataclass
class Series:
    """The times of one contender, in seconds, one for each round.

    Attributes:
        kind: a key of KINDS.
        caches: whether the contender caches.
        seconds: times by case. "first": the first epoch, from making the loader on. "later": an
            epoch with everything cached, of the same loader. "partial": all epochs together, with
            only a fraction of the data cached. "overlap": a first epoch with a training step after
            each batch. "busy": as "later", beside busy processes, and the mean and not the median:
            what makes it slow is rare and takes long.
        hit_rate: of the epochs of "partial" after the first, in the last round.
        problem: why there are no times; None if there are.
    """

    kind: str
    caches: bool
    seconds: dict[str, list[float]] = field(default_factory=lambda: {case: [] for case in CASES})
    hit_rate: float | None = None
    problem: str | None = None


@dataclass
class Measurement:
    """The times of all contenders.

    Attributes:
        series: by name of the contender.
        share: fraction of the data that "partial" may cache; None if it was left out.
        busy: number of processes in the case "busy"; 0 if it was left out.
        compute: seconds of the training steps of one epoch without loading, one for each round.
        complete: False if Ctrl-C ended the measurement.
    """

    series: dict[str, Series]
    share: float | None
    busy: int = 0
    compute: list[float] = field(default_factory=list)
    complete: bool = True


def measure(
    work: Work,
    contenders: Sequence[Contender],
    *,
    rounds: int = 3,
    share: float | None = 0.5,
    overlap: bool = False,
    busy: int = 0,
    progress: bool = True,
) -> Measurement:
    """Verify that all contenders produce the same batches, then measure them in rounds.

    First, each contender runs two epochs that are not timed, and the checksums of its batches are
    compared with those of `torch.load`. A contender with other batches is not measured. This also
    warms the page cache. Then, in each round, all contenders take turns in a random order, each
    starting with an empty cache. Ctrl-C ends the measurement early; the result then holds the times
    so far.

    Args:
        work: files and batches.
        contenders: what to measure. Each must be installed.
        rounds: turns of each contender.
        share: fraction of the data that may be cached in the case "partial"; None leaves it out.
        overlap: measure also the case "overlap". Needs the baseline among `contenders`.
        busy: measure also the case "busy", with this many processes.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: `overlap` without the baseline.
    """
    found = {c.name: Series(c.kind, c.caches) for c in contenders}
    result = Measurement(found, share, busy)
    step = Step(work) if overlap else None
    batches = len(work.batches[0])
    if overlap and BASELINE.name not in found:
        raise ValueError(f"overlap needs {BASELINE.name!r} among the contenders")
    gc.collect()
    gc.freeze()
    try:
        # Other loaders warn about more workers than cores, and about future changes.
        with (
            warnings.catch_warnings(action="ignore"),
            progress_bar(total=(rounds + 1) * len(contenders), shown=progress, unit="run") as bar,
        ):
            for contender in contenders:
                bar.set_description(f"comparing: {contender.name}")
                found[contender.name].problem = _problem(contender, work, share)
                bar.update()
            ready = [c for c in contenders if found[c.name].problem is None]
            bar.total = len(contenders) + rounds * len(ready)
            shuffle = random.Random(0).shuffle
            for number in range(rounds):
                shuffle(ready)
                for contender in ready.copy():
                    bar.set_description(f"round {number + 1}: {contender.name}")
                    try:
                        _measure_one(contender, work, share, busy, found[contender.name])
                    except Exception as error:
                        found[contender.name].problem = _in_a_line(error)
                        ready.remove(contender)
                    bar.update()
                if step is not None:
                    bar.set_description(f"round {number + 1}: overlap")
                    if not step.repeats:  # as long as the baseline loads a batch
                        step.calibrate(found[BASELINE.name].seconds["first"][0] / batches)
                    taking_part = [c for c in ready if "overlap" in (c.cases or CASES)]
                    alone, taken = measure_overlap(taking_part, work, step, number)
                    result.compute.append(alone)
                    for name, seconds in taken.items():
                        found[name].seconds["overlap"].append(seconds)
    except KeyboardInterrupt:
        result.complete = False
    finally:
        gc.unfreeze()
    return result


def _problem(contender: Contender, work: Work, share: float | None) -> str | None:
    """Why a contender cannot be measured; None if its batches are those of `torch.load`."""
    try:
        for part in (1.0, share) if contender.caches and share is not None else (1.0,):
            with contender.open(work, part) as run:
                for number in range(min(2, work.epochs)):
                    if not contender.makes_batches:
                        _exhaust(run.epoch(number), work)
                        continue
                    sums = []
                    for batch in run.epoch(number):
                        sums.append(checksum(batch))
                        del batch
                    expected = work.expected(number)
                    if sums != expected:
                        wrong = [a == b for a, b in zip(sums, expected, strict=False)]
                        at = wrong.index(False) if False in wrong else len(wrong)
                        return f"batch {at} of epoch {number} differs from that of torch.load"
    except NotApplicableError as error:
        return str(error)
    except Exception as error:
        return _in_a_line(error)
    return None


def _in_a_line(error: Exception) -> str:
    """The type of an error and the last line of its text. Worker processes prepend a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _exhaust(batches: Iterable[Any], work: Work) -> None:
    """Consume an epoch. Raises RuntimeError if it has the wrong number of batches."""
    count = 0
    for batch in batches:
        del batch
        count += 1
    if count != len(work.batches[0]):
        raise RuntimeError(f"{count} batches instead of {len(work.batches[0])}")


def _measure_one(
    contender: Contender, work: Work, share: float | None, busy: int, series: Series
) -> None:
    """One turn of a contender: append a time to each case that applies to it."""
    cases = contender.cases or CASES
    epochs = len(work.batches) if contender.caches or "first" not in cases else 2
    seconds, beside, _ = _take_turn(contender, work, 1.0, epochs, busy if "busy" in cases else 0)
    times = {"first": seconds[0], "later": statistics.median(seconds[1:])}
    if beside:
        times["busy"] = statistics.mean(beside)
    if share is not None and not contender.caches:
        times["partial"] = times["first"] + (work.epochs - 1) * times["later"]
    elif share is not None:
        seconds, _, series.hit_rate = _take_turn(contender, work, share, work.epochs)
        times["partial"] = sum(seconds)
    for case in times.keys() & cases:
        series.seconds[case].append(times[case])


def _take_turn(
    contender: Contender, work: Work, share: float, epochs: int, busy: int = 0
) -> tuple[list[float], list[float], float | None]:
    """Open a contender and run its epochs; returns their seconds, and the hit rate.

    The first epoch includes opening it. The second list is of epochs beside `busy` processes.
    """
    gc.collect()
    work.evict_page_cache()
    start = time.perf_counter()
    with contender.open(work, share) as run:
        seconds = [_seconds(run, work, 0, start)]
        seconds += [_seconds(run, work, number) for number in range(1, epochs)]
        beside: list[float] = []
        if busy:
            with busy_processes(busy):
                while not beside or sum(beside) < BUSY_SECONDS:
                    beside.append(_seconds(run, work, 1 + len(beside) % (epochs - 1)))
        return seconds, beside, None if run.hit_rate is None else run.hit_rate()


def _seconds(run: Run, work: Work, number: int, start: float | None = None) -> float:
    """Run an epoch; returns the seconds from `start`, or from its beginning, to its end."""
    if start is None:
        work.evict_page_cache()
        start = time.perf_counter()
    _exhaust(run.epoch(number), work)
    work.wait()
    return time.perf_counter() - start
