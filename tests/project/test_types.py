"""What type checkers and editors know of what a loader yields."""

import os
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

LOADER = "gpucache_pipes.adapters.dataloader.GPUCachedPathDataLoader"

CODE = """
from typing import Any
import torch
from torch import Tensor
from gpucache_pipes import (
    FeatureBatch, GPUCachedPathDataLoader, GPUCollator, GPUFeatureStore, GPUPrefetcher, NodeLoader,
    PathLister, StoreStats,
)

def pair(batch: Any) -> tuple[Tensor, int]:
    return batch["x"], 1

def build(batch: Any, original: Any, paths: Any) -> dict[str, Tensor]:
    return {"x": batch}

store = GPUFeatureStore("cpu", max_cache_bytes="1GiB", keys=["x"], dtype=torch.bfloat16)
lister = PathLister("x", batch_size=2)
for built in GPUCachedPathDataLoader(lister, store=store, build_batch_fn=build):
    reveal_type(built)
collator = GPUCollator(GPUPrefetcher(lister, store), transform=pair)
for pairs in NodeLoader(collator):
    reveal_type(pairs)
for plain in GPUCachedPathDataLoader(lister, max_cache_bytes=8):
    reveal_type(plain)
loader: GPUCachedPathDataLoader[tuple[Tensor, Tensor]] = GPUCachedPathDataLoader(lister)
for declared in loader:
    reveal_type(declared)
with GPUCachedPathDataLoader(lister, build_batch_fn=build) as entered:
    reveal_type(entered)
features: FeatureBatch = store.get_batch(["a"])
stats: StoreStats = loader.stats()
GPUCachedPathDataLoader(lister, max_cache_byte=8)
"""


def test_types_of_batches(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CODE)
    root = Path(__file__).parents[2]
    before = Path.cwd()
    os.chdir(root)
    try:
        said, _, _ = api.run(["--no-error-summary", "--hide-error-context", str(script)])
    finally:
        os.chdir(before)
    told = [line.partition(": ")[2] for line in said.splitlines()]
    assert told[:5] == [
        'note: Revealed type is "dict[str, torch._tensor.Tensor]"',
        'note: Revealed type is "tuple[torch._tensor.Tensor, int]"',
        'note: Revealed type is "Any"',
        'note: Revealed type is "tuple[torch._tensor.Tensor, torch._tensor.Tensor]"',
        f'note: Revealed type is "{LOADER}[dict[str, torch._tensor.Tensor]]"',
    ]
    assert any('Unexpected keyword argument "max_cache_byte"' in line for line in told[5:])
