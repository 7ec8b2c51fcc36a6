"""`python -m gpucache_pipes bench`: gpucache_pipes and other loaders on the user's files.

`Work` holds the files and their batches. Each `Contender` turns them into batches on the device;
`contender.py` says what one needs, and the modules `loaders`, `libraries` and `limits`
define those that exist. `measuring` runs them, `figures` computes ratios, `report` writes them.
"""

from gpucache_pipes.cli.bench.contender import Contender
from gpucache_pipes.cli.bench.figures import (
    CONTENDERS,
    Report,
    bench,
    choose,
    find_device,
    free_bytes,
)
from gpucache_pipes.cli.bench.loaders import BASELINE, OURS, with_readers
from gpucache_pipes.cli.bench.objects import objects_contenders
from gpucache_pipes.cli.bench.report import advice, as_text, draw, headings
from gpucache_pipes.cli.bench.unpacked import packed_contender, unpacked
from gpucache_pipes.cli.bench.work import Work, sample

__all__ = [
    "BASELINE",
    "CONTENDERS",
    "OURS",
    "Contender",
    "Report",
    "Work",
    "advice",
    "as_text",
    "bench",
    "choose",
    "draw",
    "find_device",
    "free_bytes",
    "headings",
    "objects_contenders",
    "packed_contender",
    "sample",
    "unpacked",
    "with_readers",
]
