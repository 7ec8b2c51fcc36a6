"""The cost of the store on an accelerator, compared with the limits of the device.

Everything cached:

- warm: a batch of 256 rows of 4 KiB: host time and total time, compared with index_select of a
  resident tensor with its indices already on the device (the same rows).
- rows: gathers of rows of 256 KiB and 4 MiB, compared with the copy bandwidth of the device.
- segments: the batch of `warm` from an arena of 1, 2 and 8 segments.
- step: host time of a step of the whole pipeline, and of its parts.

Files from the page cache:

- cold: files of 4 MiB, compared with the smaller of two bandwidths: preadv by 16 threads into
  pinned memory, and a copy from there to the device.
- cold_small, cold_large: files of 6 KB and of 4 MB with 1, 4 and 16 readers, compared with copies
  through pinned memory in as many threads, DataLoader with 8 and 16 workers, and SPDL.
- overlap: the fraction of time spent waiting, with a training step as long as the load of a batch.
- small_kernels: the same with a step of many small kernels.
- small_copies: the latency of a copy of 1 KiB while files are uploaded.

- host_tier: batches from host memory below the device, of rows of 4 KiB, 64 KiB and 1 MiB, compared
  with a copy from pinned memory. The aim is 0.8 of that for 64 KiB and more.

Memory:

- peak: the most memory that is reserved, compared with the budget.
- largest_batch: the largest batch with which a small model trains, with and without a cache.

`scenarios.py --device cuda` and `peers.py` compare the store with other loaders.

    python benchmarks/accelerator.py [--device cuda] [--scale 1.0] [--only SCENARIO] [--json FILE]

With `--device cpu --scale 0.05` it runs on any machine. That only tests the script.
"""

from collections.abc import Callable

from _cached import rows, segments, step, warm
from _common import parser_for, save
from _device import Device, Figures
from _memory import largest_batch, peak
from _reading import cold, cold_large, cold_small, overlap, small_copies, small_kernels
from _tiers import host_tier

SCENARIOS: dict[str, Callable[[Device, float], Figures]] = {
    "warm": warm,
    "rows": rows,
    "segments": segments,
    "step": step,
    "cold": cold,
    "cold_small": cold_small,
    "cold_large": cold_large,
    "overlap": overlap,
    "small_kernels": small_kernels,
    "small_copies": small_copies,
    "host_tier": host_tier,
    "peak": peak,
    "largest_batch": largest_batch,
}


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument("--scale", type=float, default=1.0, help="of the amounts of data")
    parser.add_argument("--only", choices=SCENARIOS, default=None)
    args = parser.parse_args()
    device = Device(args.device)
    figures: Figures = {"device": device.name}
    for name, scenario in SCENARIOS.items():
        if args.only in (None, name):
            figures[name] = scenario(device, args.scale)
            device.empty_cache()
            print(f"{name}: {figures[name]}", flush=True)
            # After each scenario, so that an interrupted run keeps its figures.
            save(args.json, figures)


if __name__ == "__main__":
    main()
