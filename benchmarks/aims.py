"""Measure what a cached batch and a first epoch cost, and print it next to the aims as one table.

Calls scenarios.py (small in batches of 8 to 1,024, alone and with two busy processes; ragged,
ragged-large and large), overhead.py and million.py; their docstrings say what is measured. The
store has a budget everywhere. "a dict" is a dict of features by path, and `torch.stack` or
`pad_sequence`. All figures are medians, ratios those within a round; the other loaders of a
scenario are left out.

    python benchmarks/aims.py [--quick] [--files 1000000] [--json benchmarks/results/aims.json]

With `--quick` there are fewer files and rounds, in a minute: to try the command.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import million
import overhead
import torch
from _common import save
from scenarios import SCENARIOS, Scenario, run
from tables import rows_as_table

from gpucache_pipes.cli.bench import BASELINE, CONTENDERS, OURS, Contender, Report
from gpucache_pipes.cli.bench.figures import spread

BY_NAME = {contender.name: contender for contender in CONTENDERS}
DICT = BY_NAME["dict of features, never evicts"]
COLLATE_FN = BY_NAME["GPUCollator with a collate_fn"]
PREADV = BY_NAME["preadv of the bytes"]
PEERS = [
    BASELINE,
    DICT,
    BY_NAME["DataLoader, torch.load(mmap=True)"],
    BY_NAME["torchdata ParallelMapper"],
]
CPU = torch.device("cpu")
AGAINST_A_DICT = {8: 0.7, 32: 1.5, 256: 3.0, 1024: 3.0}
"""The aims by batch size."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: what is measured.
        aim: a lower bound, or an upper one if `unit` is given; None if there is none.
        value: what was measured.
        unit: of a time or an amount; "" for a ratio, which may also be given as
        spread: least and greatest of the rounds.
    """

    title: str
    aim: float | None
    value: float
    unit: str = ""
    spread: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """The row, and whether it reaches its aim."""
        reached = self.aim is not None and (
            self.value <= self.aim if self.unit else self.value >= self.aim
        )
        return {**vars(self), "reached": reached}


def ratio(
    title: str, aim: float, report: Report, case: str, other: Contender, ours: Contender = OURS
) -> Row:
    """How many times as fast as another contender, within each round."""
    times, theirs = (report["contenders"][c.name]["seconds"][case] for c in (ours, other))
    found = spread(theirs, times)
    if found is None:
        problems = {name: e["problem"] for name, e in report["contenders"].items()}
        raise RuntimeError(f"{title}: nothing was measured: {problems}")
    middle, *ends = found
    return Row(title, aim, middle, spread=(ends[0], ends[1]))


@dataclass(frozen=True)
class Options:
    """Scale of the number of files, and rounds of a scenario; None means its own."""

    scale: float = 1.0
    rounds: int | None = None

    def measure(self, scenario: Scenario, *contenders: Contender) -> Report:
        """The report of a scenario. Raises KeyboardInterrupt after Ctrl-C."""
        report = run(scenario, CPU, self.rounds, contenders=contenders, scale=self.scale)
        if not report["complete"]:
            raise KeyboardInterrupt
        return report


def small_files(options: Options) -> list[Row]:
    scenario = replace(SCENARIOS["small"], overlap=False)
    by_size = []
    for size, aim in AGAINST_A_DICT.items():
        report = options.measure(replace(scenario, share=None, batch_size=size), OURS, DICT)
        title = f"small, cached, batch {report['work']['batch_size']}, against a dict"
        by_size.append(ratio(title, aim, report, "later", DICT))
    report = options.measure(replace(scenario, busy=2, overlap=True), OURS, DICT, BASELINE, PREADV)
    compute = report["contenders"][OURS.name]["cases"]["overlap"]["to_limit"][0]
    title = f"small, {{}}, batch {report['work']['batch_size']}, against {{}}"
    return [
        ratio(title.format("cached", BASELINE.name), 400, report, "later", BASELINE),
        *by_size,
        ratio(title.format("cached, two busy processes", "a dict"), 1, report, "busy", DICT),
        ratio(
            title.format("5 epochs, half cached", BASELINE.name), 60, report, "partial", BASELINE
        ),
        ratio(title.format("first epoch", BASELINE.name), 40, report, "first", BASELINE),
        ratio(title.format("first epoch", "a bare preadv"), 0.6, report, "first", PREADV),
        Row("small, first epoch with compute, to the compute alone", 1.05, compute, "times"),
    ]


def large_files(options: Options) -> list[Row]:
    """Against the best of those that were the best in some run of all loaders."""
    scenario = replace(SCENARIOS["large"], overlap=False, share=None)
    report = options.measure(scenario, OURS, *PEERS)
    rows = [
        ratio(f"4 MB, first epoch, against {peer.name}", 1.5, report, "first", peer)
        for peer in PEERS
    ]
    return [min(rows, key=lambda row: row.value)]


def ragged_files(options: Options) -> list[Row]:
    large, short = (
        options.measure(
            replace(SCENARIOS[name], overlap=False, share=None), OURS, COLLATE_FN, DICT, BASELINE
        )
        for name in ("ragged-large", "ragged")
    )
    title = "sequences of {} KB, cached, {}, against a dict"
    first = f"sequences of {{}} KB, first epoch, {{}}, against {BASELINE.name}"
    return [
        ratio(title.format("16 to 260", "own collate_fn"), 1, large, "later", DICT, COLLATE_FN),
        ratio(title.format("16 to 260", 'ragged="pad"'), 2, large, "later", DICT),
        ratio(title.format("8", 'ragged="pad"'), 2, short, "later", DICT),
        ratio(first.format("16 to 260", "own collate_fn"), 4, large, "first", BASELINE, COLLATE_FN),
        ratio(first.format("8", 'ragged="pad"'), 20, short, "first", BASELINE),
    ]


def python_of_a_batch(rounds: int) -> list[Row]:
    figures = overhead.measure(rounds)
    return [
        Row("Python of a cached batch", 15, figures["batch"], "us"),
        Row("and of each of its files", 0.02, figures["file"], "us"),
    ]


def many_files(count: int) -> list[Row]:
    figures = million.measure(count)
    ours, keep = (figures[f"room for 40%, {policy}"] for policy in ("clairvoyant", "keep"))
    nbytes = figures["bytes_a_file"]
    name = f"{count:,} files"
    return [
        Row(f"{name}: listing", None, figures["listing_seconds"], "s"),
        Row(f"{name}: first batch with a budget", 1, figures["first_batch_seconds"], "s"),
        Row(f"{name}: a cached epoch, each file", 0.6, figures["warm_epoch_us"], "us"),
        Row(f"{name}: host memory of the store, each file", 120, nbytes["store"], "B"),
        Row(f"{name}: the same for a plan", None, nbytes["plan"], "B"),
        Row(f"{name}: the same for a symbolic link", None, nbytes["link"], "B"),
        Row(f"{name}, room for 40%: evictions for {ours['hits']:,} hits of two epochs"
            f' ("keep": {keep["hits"]:,} hits)', max(0, ours["hits"] - keep["hits"]),
            ours["evictions"], "evictions"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer files and rounds")
    parser.add_argument("--files", type=int, default=1_000_000, help="of million.py")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    options = Options(0.5, 1) if args.quick else Options()
    rows = [
        *small_files(options),
        *ragged_files(options),
        *large_files(options),
        *python_of_a_batch(5 if args.quick else 30),
        *many_files(4096 if args.quick else args.files),
    ]
    table = [row.as_json() for row in rows]
    print(rows_as_table(table))
    save(args.json, {"rows": table})


if __name__ == "__main__":
    main()
