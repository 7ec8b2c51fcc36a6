"""Measure the memory of a run, which should grow with the budget and with nothing else.

Up to ten shuffled epochs over 4,000 files of 64 KB (256 MB) in batches of 256, each run in a
process of its own. The figure is the peak resident size. The memory of one epoch with the smallest
budget, less that budget, belongs to the process and is shown separately.

    python benchmarks/memory.py [--json FILE]
"""

import resource
import subprocess
import sys

import torch
from _common import parser_for, save, temporary_directory, write_files

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

BUDGETS = (16, 64, 128, 256)
EPOCHS = (1, 2, 10)


def peak(directory: str, budget: int, epochs: int) -> float:
    """Peak resident MiB of a run, which is this script in a new process."""
    command = [sys.executable, __file__, "--run", directory, str(budget), str(epochs)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout)


def run(directory: str, budget: int, epochs: int) -> None:
    paths = PathLister(directory, batch_size=256, shuffle=True)
    with GPUFeatureStore("cpu", max_cache_bytes=f"{budget}MiB") as store:
        batches = GPUCollator(GPUPrefetcher(paths, store, depth=2))
        for _ in range(epochs):
            batches.reset()
            for batch in batches:
                del batch
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def main() -> None:
    if "--run" in sys.argv:
        torch.set_num_threads(1)
        directory, budget, epochs = sys.argv[2:]
        run(directory, int(budget), int(epochs))
        return
    args = parser_for(__doc__).parse_args()
    with temporary_directory() as directory:
        write_files(directory, 4000, 16_384)
        own = peak(directory, BUDGETS[0], 1) - BUDGETS[0]
        print(f"{own:.0f} MiB besides the smallest budget, batches in flight included")
        print("MiB more than that, by budget\n" + f"{'epochs':>8}"
              + "".join(f"{budget:>8} MiB" for budget in BUDGETS))  # fmt: skip
        figures = {}
        for epochs in EPOCHS:
            row = {f"{b} MiB": peak(directory, b, epochs) - own for b in BUDGETS}
            figures[f"{epochs} epochs"] = row
            print(f"{epochs:>8}" + "".join(f"{mib:12.0f}" for mib in row.values()))
    save(args.json, {"own_mib": own, "more_mib": figures})


if __name__ == "__main__":
    main()
