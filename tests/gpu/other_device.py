"""A process that uses a store on the second GPU only. Run by test_several_gpus.py.

Its current device stays the first one, on which a context takes about 500 MB. Prints, after each
phase, whether there is one.
"""

import gc
import sys
from pathlib import Path

import torch
import torchdata.nodes as tn

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

DEVICE = "cuda:1"


def say(phase: str) -> None:
    print(f"{phase}: {torch._C._cuda_hasPrimaryContext(0)}", flush=True)


def main(directory: str) -> None:
    paths = sorted(str(path) for path in Path(directory).glob("*.pt"))
    store = GPUFeatureStore(DEVICE, max_cache_items=len(paths) // 2, reader_threads=2)
    say("made a store")
    batch = store.get_batch(paths[:8]).collate()
    assert batch["label"].flatten().cpu().tolist() == list(range(8))
    say("read in reader threads")
    lister = PathLister(paths, batch_size=8, shuffle=True)
    node = GPUCollator(GPUPrefetcher(lister, store))
    loader = tn.Loader(tn.Prefetcher(node, 2))
    for _ in range(3):
        found = sorted(int(n) for batch in loader for n in batch["label"].flatten().cpu())
        assert found == list(range(len(paths)))
    say("iterated in a thread of Prefetcher")
    node = GPUCollator(GPUPrefetcher(PathLister(paths, batch_size=8), store, depth=4))
    next(iter(node))
    del node, loader, lister, batch
    gc.collect()
    say("dropped pipelines with pending batches")
    store.clear()
    say("cleared")
    store.close()
    say("closed")
    dropped = GPUFeatureStore(DEVICE, reader_threads=2)
    dropped.prefetch(paths)
    dropped.get(paths[0])
    del dropped, store
    gc.collect()
    say("dropped a store that was not closed")


if __name__ == "__main__":
    main(sys.argv[1])
