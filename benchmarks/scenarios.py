"""Measure all contenders on generated files, in one of the fixed scenarios.

- small: 4,000 files of {"feature": f32[1024], "label": int64[1]}, 6 KB, in batches of 256.
- busy: later epochs of small only, alone and with two busy processes running.
- large: 64 files of 4 MB in batches of 8.
- ragged: 4,000 files of {"frames": f32[T, 32], "label": int64[]}, T log-normal about 60 (a median
  of 8 KB), in batches of 256, padded.
- ragged-large: 600 such files, T uniform in 128 to 2,080 (16 to 260 KB), in batches of 32.
- quick: 1,000 files as in small in batches of 64, with the limits only: for `check.py`.

The measurement is that of `python -m gpucache_pipes bench`: a first epoch, later epochs with
everything cached, five epochs with a budget for half of the data, and a first epoch with as much
compute as DataLoader takes to load. The store has a budget in all of them. The page cache is warm,
the order is shuffled, and all contenders take turns producing the same batches, verified by
checksum.

    python benchmarks/scenarios.py small [--device cuda] [--cold-storage] [--json FILE]
        [--plot FILE] [--only CONTENDER] [--batch-size N] [--scale 1.0]

`--only` is the beginning of the name of a contender, and may be given repeatedly. With `--scale`
there are more or fewer files, and with `--batch-size` other batches; the scenario is then not the
fixed one.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _common import temporary_directory, write_files

from gpucache_pipes.cli import bench


def write_ragged(directory: str | Path, lengths: torch.Tensor) -> list[str]:
    """Write a file with a sequence for each of `lengths`, int64 [files]; returns their paths."""
    paths = []
    for number, length in enumerate(lengths.tolist()):
        path = Path(directory) / f"{number:06d}.pt"
        torch.save({"frames": torch.randn(length, 32), "label": torch.tensor(number)}, path)
        paths.append(str(path))
    return paths


def log_normal(count: int) -> torch.Tensor:
    """Lengths of 1 to 500 about 60."""
    random = torch.Generator().manual_seed(0)
    return torch.empty(count).log_normal_(4.1, 0.6, generator=random).long().clamp(1, 500)


def uniform(count: int) -> torch.Tensor:
    """Lengths of 128 to 2,080, for sequences of 16 to 260 KB."""
    return torch.randint(128, 2081, (count,), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Scenario:
    """Files, and the options of their measurement.

    Attributes:
        write: writes a number of files, scaled by its second argument, into a directory.
        batch_size: files in a batch.
        rounds: turns of each contender.
        only: beginnings of the names of contenders; empty means all.
        overlap: measure also a first epoch with training steps.
        share: of the data that is cached in the case "partial"; None leaves that case out.
        busy: processes of the case "busy"; 0 leaves it out.
    """

    write: Callable[[str, float], Sequence[str]]
    batch_size: int
    rounds: int = 5
    only: tuple[str, ...] = ()
    overlap: bool = True
    share: float | None = 0.5
    busy: int = 0


def scaled(count: int, scale: float) -> int:
    """A scaled number of files, enough for a few batches of one."""
    return max(8, round(count * scale))


def small(where: str, scale: float) -> list[str]:
    return write_files(where, scaled(4000, scale))


LIMITS = ("preadv", "index_select")
SCENARIOS = {
    "small": Scenario(small, 256),
    "busy": Scenario(small, 256, overlap=False, share=None, busy=2),
    "large": Scenario(lambda where, scale: write_files(where, scaled(64, scale), 1 << 20), 8, 7),
    "ragged": Scenario(
        lambda where, scale: write_ragged(where, log_normal(scaled(4000, scale))), 256
    ),
    "ragged-large": Scenario(
        lambda where, scale: write_ragged(where, uniform(scaled(600, scale))), 32
    ),
    "quick": Scenario(
        lambda where, scale: write_files(where, scaled(1000, scale)), 64, 9, LIMITS, False
    ),
}


def run(
    scenario: Scenario,
    device: torch.device,
    rounds: int | None = None,
    *,
    contenders: Sequence[bench.Contender] = (),
    progress: bool = True,
    cold_storage: bool = False,
    scale: float = 1.0,
) -> bench.Report:
    """Write the files of a scenario, measure its contenders or these, and return the report."""
    with temporary_directory() as directory:
        paths = scenario.write(directory, scale)
        batch_size = min(scenario.batch_size, len(paths) // 2)
        with bench.Work(paths, batch_size, device, cold_storage=cold_storage) as work:
            print(f"{work}\n")
            return bench.bench(
                work,
                contenders=contenders or bench.choose(scenario.only),
                rounds=rounds or scenario.rounds,
                share=scenario.share,
                overlap=scenario.overlap,
                busy=scenario.busy,
                progress=progress,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--cold-storage", action="store_true", help="from the disk, each epoch")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--plot", help="draw them to this file")
    parser.add_argument("--only", action="append", default=[], help="of the contenders")
    parser.add_argument("--batch-size", type=int, help="another one than that of the scenario")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of files")
    args = parser.parse_args()
    scenario = SCENARIOS[args.scenario]
    scenario = replace(
        scenario,
        only=tuple(args.only) or scenario.only,
        batch_size=args.batch_size or scenario.batch_size,
    )
    device = bench.find_device(args.device)
    report = run(scenario, device, args.rounds, cold_storage=args.cold_storage, scale=args.scale)
    report = {"scenario": args.scenario, **report}
    print(bench.as_text(report))
    if not report["complete"]:
        print("interrupted: nothing is written")
        return 130
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        bench.draw(report, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
