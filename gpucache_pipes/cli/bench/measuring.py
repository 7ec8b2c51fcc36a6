"""Runs contenders side by side, in an order that changes, and keeps every figure."""

import gc
import random
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from gpucache_pipes.cli.bench.collation import checksum
from gpucache_pipes.cli.bench.contender import Contender, NotApplicableError
from gpucache_pipes.cli.bench.loaders import BASELINE
from gpucache_pipes.cli.bench.overlap import Step, measure_overlap
from gpucache_pipes.cli.bench.work import Work

CASES = ("first", "later", "partial", "overlap")


@dataclass
class Series:
    """What was measured of one contender: seconds, one for each round.

    Attributes:
        kind: see KINDS.
        caches: whether it does.
        seconds: by case. "first" epoch; a "later" one, everything cached; "partial", all epochs,
            the first included, with room for a part of the data; "overlap", a first epoch with
            a training step after each batch.
        hit_rate: of the later epochs of "partial".
        problem: why there are no figures.
    """

    kind: str
    caches: bool
    seconds: dict[str, list[float]] = field(default_factory=lambda: {case: [] for case in CASES})
    hit_rate: float | None = None
    problem: str | None = None


@dataclass
class Measurement:
    """All series, and how they came about.

    Attributes:
        series: by the name of the contender.
        share: of the data that "partial" had room for.
        compute: seconds of the training steps of an epoch alone, one for each round.
        complete: False after Ctrl-C.
    """

    series: dict[str, Series]
    share: float
    compute: list[float] = field(default_factory=list)
    complete: bool = True


def measure(
    work: Work,
    contenders: Sequence[Contender],
    *,
    rounds: int = 3,
    share: float = 0.5,
    overlap: bool = False,
    progress: bool = True,
) -> Measurement:
    """Let all contenders make the same batches, once to compare them and then in rounds.

    First each of them goes through two epochs unmeasured, while checksums of all batches are
    compared with those of `torch.load`: who gives others is not measured. That also warms the page
    cache. Then all take their turn in each round, in an order drawn anew, each from nothing.
    Ctrl-C ends it early with what there is.
    """
    found = {c.name: Series(c.kind, c.caches) for c in contenders}
    result = Measurement(found, share)
    step = Step(work) if overlap else None
    if overlap and BASELINE.name not in found:
        raise ValueError(f"overlap is measured beside {BASELINE.name!r}, which is not there")
    gc.collect()
    gc.freeze()
    try:
        # Peers have much to say: of more workers than cores, of what they will do in the plan.
        with (
            warnings.catch_warnings(action="ignore"),
            tqdm(total=(rounds + 1) * len(contenders), disable=not progress, unit="run") as bar,
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
                        _measure_one(contender, work, share, found[contender.name])
                    except Exception as error:
                        found[contender.name].problem = _in_a_line(error)
                        ready.remove(contender)
                    bar.update()
                if step is not None:
                    bar.set_description(f"round {number + 1}: overlap")
                    _overlap(ready, work, step, result)
    except KeyboardInterrupt:
        result.complete = False
    finally:
        gc.unfreeze()
    return result


def _problem(contender: Contender, work: Work, share: float) -> str | None:
    """Why a contender cannot be measured; None if it gives the batches that it should."""
    try:
        for part in (1.0, share) if contender.caches else (1.0,):
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
                        return f"gives another batch {at} in epoch {number} than torch.load"
    except NotApplicableError as error:
        return str(error)
    except Exception as error:
        return _in_a_line(error)
    return None


def _in_a_line(error: Exception) -> str:
    """What went wrong. Workers put a traceback in front of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _exhaust(batches: Iterable[Any], work: Work) -> None:
    count = 0
    for batch in batches:
        del batch
        count += 1
    if count != len(work.batches[0]):
        raise RuntimeError(f"{count} batches instead of {len(work.batches[0])}")


def _measure_one(contender: Contender, work: Work, share: float, series: Series) -> None:
    epochs = len(work.batches) if contender.caches or contender.cases == ("later",) else 2
    seconds, _ = _timed(contender, work, 1.0, epochs)
    cases = contender.cases or CASES
    if "first" in cases:
        series.seconds["first"].append(seconds[0])
    later = statistics.median(seconds[1:])
    if "later" in cases:
        series.seconds["later"].append(later)
    if "partial" not in cases:
        return
    if contender.caches:
        seconds, series.hit_rate = _timed(contender, work, share, work.epochs)
        series.seconds["partial"].append(sum(seconds))
    else:
        series.seconds["partial"].append(seconds[0] + (work.epochs - 1) * later)


def _timed(
    contender: Contender, work: Work, share: float, epochs: int
) -> tuple[list[float], float | None]:
    """Seconds of each epoch, the first one with all that comes before it; and the hit rate."""
    gc.collect()
    work.forget_pages()
    seconds = []
    start = time.perf_counter()
    with contender.open(work, share) as run:
        for number in range(epochs):
            if number:
                work.forget_pages()
                start = time.perf_counter()
            _exhaust(run.epoch(number), work)
            work.wait()
            seconds.append(time.perf_counter() - start)
        return seconds, None if run.hit_rate is None else run.hit_rate()


def _overlap(contenders: Sequence[Contender], work: Work, step: Step, result: Measurement) -> None:
    """With a step that takes as long as the baseline takes to load a batch."""

    def keep(name: str | None, seconds: float) -> None:
        (result.compute if name is None else result.series[name].seconds["overlap"]).append(seconds)

    if not step.repeats:
        baseline = result.series[BASELINE.name].seconds["first"]
        step.calibrate(baseline[0] / len(work.batches[0]))
    taking_part = [c for c in contenders if "overlap" in (c.cases or CASES)]
    measure_overlap(taking_part, work, step, keep, len(result.compute))
