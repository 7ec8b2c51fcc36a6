"""What runs beside a loader: training steps (the case "overlap") and busy processes ("busy")."""

import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from gpucache_pipes.cli.bench.contender import Contender
from gpucache_pipes.cli.bench.work import Work

_SPIN = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """A context in which `count` processes keep a core busy each; yields their ids.

    All of them run when the context is entered, and have ended when it is left. If this process is
    killed they end by themselves.
    """
    command = [sys.executable, "-S", "-c", _SPIN, str(os.getpid())]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            # Ctrl-C reaches them as well, and their tracebacks would be noise.
            processes.append(  # noqa: PERF401
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            )
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


class Step:
    """Trains a small network for about as long as a batch takes to load.

    It uses one thread. The other cores are idle, as they are during a training step on a GPU.

    Attributes:
        repeats: optimizer steps in one call; 0 before `calibrate`.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._model = torch.nn.Sequential(
            torch.nn.Linear(256, 512, device=work.device),
            torch.nn.ReLU(),
            torch.nn.Linear(512, 256, device=work.device),
        )
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4)
        self._input = torch.randn(64, 256, device=work.device)
        self.repeats = 0

    def calibrate(self, seconds: float) -> None:
        """Choose `repeats` so that a call takes about `seconds`, by measuring the current speed."""
        with threads(1):
            self.repeats = 20
            self()
            start = time.perf_counter()
            self()
            self.repeats = max(1, round(seconds / ((time.perf_counter() - start) / 20)))

    def __call__(self) -> None:
        """Train, and wait for the device, as most training loops do with `loss.item()`."""
        for _ in range(self.repeats):
            self._optimizer.zero_grad()
            loss = (self._model(self._input) - self._input).square().mean()
            loss.backward()
            self._optimizer.step()
        self._work.wait()


def measure_overlap(
    contenders: Sequence[Contender], work: Work, step: Step, seed: int
) -> tuple[float, dict[str, float]]:
    """Measure one round: the compute alone, and a first epoch of each contender with compute.

    Args:
        contenders: what to measure.
        work: files and batches.
        step: a calibrated step.
        seed: seed of the order.

    Returns:
        Seconds of the compute alone, and those of the contenders by name.
    """
    turns: list[Contender | None] = [None, *contenders]
    random.Random(seed).shuffle(turns)
    seconds: dict[str, float] = {}
    with threads(1):
        for turn in turns:
            gc.collect()
            work.evict_page_cache()
            start = time.perf_counter()
            with nullcontext() if turn is None else turn.open(work, 1.0) as run:
                for batch in work.batches[0] if run is None else run.epoch(0):
                    step()
                    del batch
                seconds["" if turn is None else turn.name] = time.perf_counter() - start
    return seconds.pop(""), seconds


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A context in which torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
