"""Contenders from libraries that must be installed: SPDL, grain and MONAI."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from gpucache_pipes.cli.bench.contender import Contender, Run
from gpucache_pipes.cli.bench.loaders import Batches
from gpucache_pipes.cli.bench.work import Work


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


LIBRARIES = [
    Contender("SPDL", "peer", _spdl, needs="spdl.pipeline"),
    Contender("grain", "peer", _grain, needs="grain"),
    Contender("MONAI CacheDataset", "peer", _monai, caches=True, needs="monai"),
]
