"""Write a trace of a first and a second epoch, to see in Perfetto what takes the time.

    python examples/profile_pipeline.py features/ trace.json

Open the file at https://ui.perfetto.dev (or chrome://tracing) and look for the ranges
`gpucache::read`, `gpucache::upload`, `gpucache::wait` and `gpucache::gather`.
"""

import argparse
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", help="a directory of .pt files")
    parser.add_argument("trace", nargs="?", default="trace.json", help="the file to write")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    # Without this option, the reader threads are not in the trace.
    everything = _ExperimentalConfig(profile_all_threads=True)
    with GPUFeatureStore() as store:
        lister = PathLister(args.features, batch_size=args.batch_size, shuffle=True)
        pipeline = GPUCollator(GPUPrefetcher(lister, store, depth=2))
        with profile(activities=activities, experimental_config=everything) as profiler:
            for epoch in ("first epoch", "second epoch"):
                pipeline.reset()
                with record_function(epoch):
                    for batch in pipeline:
                        with record_function("training step"):
                            train(batch)
    profiler.export_chrome_trace(args.trace)
    size = Path(args.trace).stat().st_size
    print(f"{args.trace}: {size >> 10} KiB; open it at https://ui.perfetto.dev")


def train(batch: object) -> None:
    """A stand-in for a training step: a matrix product for each tensor of the batch."""
    for tensor in batch.values() if isinstance(batch, dict) else [batch]:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            flat = tensor.flatten(1)
            flat @ flat.T


if __name__ == "__main__":
    main()
