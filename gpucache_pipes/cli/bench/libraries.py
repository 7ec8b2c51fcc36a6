"""Contenders from libraries that must be installed.

SPDL, grain and MONAI read the same files. safetensors and tensordict get the data in formats of
their own, and that conversion is not measured.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gpucache_pipes.cli.bench.contender import Contender, NotApplicableError, Run
from gpucache_pipes.cli.bench.loaders import Batches
from gpucache_pipes.cli.bench.work import Work
from gpucache_pipes.files import build, flatten


def _spdl(work: Work, share: float) -> Iterator[Run]:
    from spdl.pipeline import PipelineBuilder

    def epoch(number: int) -> Iterable[Any]:
        builder: Any = PipelineBuilder()
        builder.add_source(work.batches[number])
        builder.pipe(work.load_batch, concurrency=work.threads, output_order="input")
        pipeline = builder.add_sink(4).build(num_threads=work.threads)
        with pipeline.auto_stop():
            yield from map(work.upload, pipeline)

    yield Run(epoch)


def _grain(work: Work, share: float) -> Iterator[Run]:
    import grain

    options = grain.ReadOptions(num_threads=work.threads, prefetch_buffer_size=4)

    def epoch(number: int) -> Iterable[Any]:
        batches = grain.MapDataset.source(work.batches[number]).map(work.load_batch)
        return map(work.upload, batches.to_iter_dataset(options))

    yield Run(epoch)


def _monai(work: Work, share: float) -> Iterator[Run]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai import data, transforms

        class Load(transforms.Transform):  # type: ignore[misc]
            # A plain function does not work: CacheDataset only caches the results of Transforms.
            def __call__(self, path: str) -> Any:
                return work.load(path)

        dataset = data.CacheDataset(
            data=list(work.paths),
            transform=Load(),
            cache_num=round(share * len(work.paths)),
            num_workers=work.threads,
            progress=False,
        )
        sampler = Batches()
        loader = data.ThreadDataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=0,
            pin_memory=work.on_accelerator,
            collate_fn=work.collation.by_hand,
        )
    numbers = {path: number for number, path in enumerate(work.paths)}

    def epoch(number: int) -> Iterable[Any]:
        sampler.chosen = [[numbers[path] for path in batch] for batch in work.batches[number]]
        return map(work.upload, loader)

    yield Run(epoch)


def _tensors(work: Work, path: str) -> dict[str, torch.Tensor]:
    """The leaves of a feature, by number as text.

    Raises NotApplicableError if it has plain values.
    """
    _, tensors, values = flatten(work.load(path))
    if values:
        raise NotApplicableError("the features hold plain values")
    return {str(number): tensor.contiguous() for number, tensor in enumerate(tensors)}


def _feature(work: Work, leaves: dict[str, torch.Tensor]) -> Any:
    """The feature with these leaves: the inverse of `_tensors`."""
    return build(work.layouts[0].tree, lambda number: leaves[str(number)], lambda _: None)


def _safetensors(work: Work, share: float) -> Iterator[Run]:
    from safetensors.torch import load_file, save_file

    if work.collation.mode == "list":
        raise NotApplicableError("the features do not have one structure")
    if all(path.endswith(".safetensors") for path in work.paths):
        raise NotApplicableError("it is the format of these features already")

    def write() -> dict[str, str]:
        directory = work.directory("safetensors")
        written = {path: str(directory / str(n)) for n, path in enumerate(work.paths)}
        for path, copy in written.items():
            save_file(_tensors(work, path), copy)
        return written

    copies = work.prepared("safetensors", write)

    def epoch(number: int) -> Iterable[Any]:
        for batch in work.batches[number]:
            leaves = [load_file(copies[path]) for path in batch]
            yield work.upload(work.collation.by_hand([_feature(work, each) for each in leaves]))

    yield Run(epoch)


def _memory_map(work: Work, share: float) -> Iterator[Run]:
    from tensordict import TensorDict

    if work.collation.mode != "stack":
        raise NotApplicableError("the features do not have one shape")

    def write() -> str:
        features = [_tensors(work, path) for path in work.paths]
        columns = {name: torch.stack([f[name] for f in features]) for name in features[0]}
        directory = str(work.directory("tensordict"))
        TensorDict(columns, batch_size=[len(features)]).memmap_(directory)
        return directory

    rows = {path: number for number, path in enumerate(work.paths)}
    data = TensorDict.load_memmap(work.prepared("tensordict", write))

    def epoch(number: int) -> Iterable[Any]:
        for batch in work.batches[number]:
            columns: Any = data[torch.tensor([rows[path] for path in batch], device="cpu")]
            leaves = {name: leaf.as_subclass(torch.Tensor) for name, leaf in columns.items()}
            yield work.upload(_feature(work, leaves))

    yield Run(epoch)


LIBRARIES = [
    Contender("SPDL", "peer", _spdl, needs="spdl.pipeline"),
    Contender("grain", "peer", _grain, needs="grain"),
    Contender("MONAI CacheDataset", "peer", _monai, caches=True, needs="monai"),
    Contender("safetensors files", "format", _safetensors, needs="safetensors"),
    Contender("one tensordict memory map", "format", _memory_map, needs="tensordict"),
]
