"""Everything that there is to measure, side by side."""

from collections.abc import Sequence

import torch

from gpucache_pipes.cli.bench.contender import Contender
from gpucache_pipes.cli.bench.figures import as_json
from gpucache_pipes.cli.bench.formats import FORMATS
from gpucache_pipes.cli.bench.libraries import LIBRARIES
from gpucache_pipes.cli.bench.limits import LIMITS
from gpucache_pipes.cli.bench.loaders import BASELINE, LOADERS, OURS
from gpucache_pipes.cli.bench.measuring import measure
from gpucache_pipes.cli.bench.report import Report
from gpucache_pipes.cli.bench.work import Work
from gpucache_pipes.device import available_host_bytes, resolve_device

_SHARE = 0.9
"""Of what is free, that a cache may have."""

CONTENDERS: list[Contender] = [*LOADERS, *LIBRARIES, *FORMATS, *LIMITS]
"""All that there are. A contender of your own is one more: see `Contender`."""


def bench(
    work: Work,
    *,
    contenders: Sequence[Contender] = (),
    rounds: int = 3,
    share: float = 0.5,
    overlap: bool = False,
    progress: bool = True,
) -> Report:
    """Measure all contenders that are installed, and return the report, as JSON has it.

    Args:
        work: the files, and what batches to make of them.
        contenders: some of CONTENDERS, or others; none are all.
        rounds: how often each of them takes its turn.
        share: of the data that there is room for where not all is cached.
        overlap: measure also a first epoch beside training steps.
        progress: show a bar on stderr.
    """
    wanted = list(contenders) or CONTENDERS
    installed = [contender for contender in wanted if contender.installed]
    missing = [contender.name for contender in wanted if not contender.installed]
    measurement = measure(
        work, installed, rounds=rounds, share=share, overlap=overlap, progress=progress
    )
    return as_json(work, measurement, missing)


def choose(names: Sequence[str] | None) -> list[Contender]:
    """The contenders whose names begin so, with ours and the one that all are compared with."""
    if not names:
        return CONTENDERS
    for name in names:
        if not any(contender.name.startswith(name) for contender in CONTENDERS):
            known = ", ".join(contender.name for contender in CONTENDERS)
            raise ValueError(f"{name!r} is none of the contenders: {known}")
    return [c for c in CONTENDERS if c.name.startswith(tuple(names)) or c in (OURS, BASELINE)]


def find_device(name: str) -> torch.device:
    """The device of that name; of "auto" the accelerator, or the CPU if there is none.

    Raises ValueError if there is no such device.
    """
    return resolve_device(None if name == "auto" else name)


def free_bytes(device: torch.device) -> int | None:
    """What a cache could take there; None where that is not known."""
    if device.type == "cpu":
        return int(available_host_bytes() * _SHARE)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE)
    return None
