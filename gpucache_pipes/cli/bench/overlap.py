"""A first epoch while a network is trained: what of the loading is felt."""

import gc
import random
import time
from collections.abc import Callable, Sequence

import torch

from gpucache_pipes.cli.bench.contender import Contender
from gpucache_pipes.cli.bench.work import Work


class Step:
    """Training of a small network for about as long as a batch takes to load.

    On one thread: as with a training step on a GPU, other cores have nothing to do.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._model = torch.nn.Sequential(
            torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)
        ).to(work.device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4)
        self._input = torch.randn(64, 256, device=work.device)
        self.repeats = 0

    def calibrate(self, seconds: float) -> None:
        """Take so long from now on, by how fast it is now."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.repeats = 20
        self()
        start = time.perf_counter()
        self()
        self.repeats = max(1, round(seconds / ((time.perf_counter() - start) / 20)))
        torch.set_num_threads(threads)

    def __call__(self) -> None:
        """Until the device is done, as `loss.item()` has it in most loops."""
        for _ in range(self.repeats):
            self._optimizer.zero_grad()
            loss = (self._model(self._input) - self._input).square().mean()
            loss.backward()
            self._optimizer.step()
        self._work.wait()


def measure_overlap(
    contenders: Sequence[Contender],
    work: Work,
    step: Step,
    keep: Callable[[str | None, float], None],
    seed: int,
) -> None:
    """A first epoch of each with compute, and the compute alone, which has no name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    turns: list[Contender | None] = [None, *contenders]
    random.Random(seed).shuffle(turns)
    try:
        for turn in turns:
            gc.collect()
            if turn is None:
                keep(None, _alone(work, step))
            else:
                keep(turn.name, _overlapped(turn, work, step))
    finally:
        torch.set_num_threads(threads)


def _alone(work: Work, step: Step) -> float:
    start = time.perf_counter()
    for _ in work.batches[0]:
        step()
    return time.perf_counter() - start


def _overlapped(contender: Contender, work: Work, step: Step) -> float:
    work.forget_pages()
    start = time.perf_counter()
    with contender.open(work, 1.0) as run:
        for batch in run.epoch(0):
            step()
            del batch
        return time.perf_counter() - start
