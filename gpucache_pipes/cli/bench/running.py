"""Selects contenders and a device, and runs a benchmark."""

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
"""Fraction of the free memory that a cache may use."""

CONTENDERS: list[Contender] = [*LOADERS, *LIBRARIES, *FORMATS, *LIMITS]
"""All contenders. To measure another loader, add a `Contender` of your own."""


def bench(
    work: Work,
    *,
    contenders: Sequence[Contender] = (),
    rounds: int = 3,
    share: float = 0.5,
    overlap: bool = False,
    progress: bool = True,
) -> Report:
    """Measure the contenders that are installed.

    Args:
        work: the files and their batches.
        contenders: some of CONTENDERS, or your own; empty means all of CONTENDERS.
        rounds: turns of each contender.
        share: fraction of the data that may be cached in the case "partial".
        overlap: measure also a first epoch with training steps.
        progress: show a progress bar on stderr.

    Returns:
        A report that `json.dumps` accepts; see `figures.as_json`.

    Raises:
        ValueError: `overlap` without the baseline among the contenders.
    """
    wanted = list(contenders) or CONTENDERS
    installed = [contender for contender in wanted if contender.installed]
    missing = [contender.name for contender in wanted if not contender.installed]
    measurement = measure(
        work, installed, rounds=rounds, share=share, overlap=overlap, progress=progress
    )
    return as_json(work, measurement, missing)


def choose(names: Sequence[str] | None) -> list[Contender]:
    """The contenders whose names begin with one of `names`, with OURS and BASELINE.

    Args:
        names: beginnings of names; None or empty means all contenders.

    Raises:
        ValueError: a name matches no contender.

    >>> [contender.name for contender in choose(["preadv"])]
    ['gpucache_pipes', 'DataLoader, 0 workers', 'preadv of the bytes']
    """
    if not names:
        return CONTENDERS
    for name in names:
        if not any(contender.name.startswith(name) for contender in CONTENDERS):
            known = ", ".join(contender.name for contender in CONTENDERS)
            raise ValueError(f"{name!r} is none of the contenders: {known}")
    return [c for c in CONTENDERS if c.name.startswith(tuple(names)) or c in (OURS, BASELINE)]


def find_device(name: str) -> torch.device:
    """Resolve the name of a device.

    Args:
        name: as in `torch.device`, or "auto" for the accelerator, or the CPU if there is none.

    Raises:
        ValueError: this machine has no such device.
    """
    return resolve_device(None if name == "auto" else name)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a cache could use on `device`; None if that is unknown."""
    if device.type == "cpu":
        return int(available_host_bytes() * _SHARE)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE)
    return None
