"""Lower bounds of the time: reading the bytes of the files, and gathering resident tensors."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from gpucache_pipes.batches import Padded
from gpucache_pipes.cli.bench.beside import threads
from gpucache_pipes.cli.bench.contender import Contender, NotApplicableError, Run
from gpucache_pipes.cli.bench.work import Work
from gpucache_pipes.files import build, file_size, flatten, leaf_names

Batch = tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], Any]
"""The gathers (source, rows, result) that complete a batch, and the batch of their results."""


def _preadv(work: Work, share: float) -> Iterator[Run]:
    """Open, one read and close for each file, into one buffer, then one copy to the device."""
    sizes, staging, target = work.prepared("buffers", lambda: _make_buffers(work))
    view = memoryview(staging.numpy())

    def epoch(number: int) -> Iterable[Any]:
        for batch in work.batches[number]:
            end = 0
            for path in batch:
                fd = os.open(path, os.O_RDONLY)
                end += os.preadv(fd, [view[end : end + sizes[path]]], 0)
                os.close(fd)
            if work.on_accelerator:
                target[:end].copy_(staging[:end], non_blocking=True)
                work.wait()  # the next batch overwrites the buffer
            yield None

    yield Run(epoch)


def _make_buffers(work: Work) -> tuple[dict[str, int], torch.Tensor, torch.Tensor]:
    """The sizes of the files, and buffers for the largest batch on the host and on the device."""
    sizes = {path: file_size(path) for path in work.paths}
    largest = max(sum(sizes[path] for path in batch) for batch in chain(*work.batches))
    staging = torch.zeros(largest, dtype=torch.uint8, device="cpu", pin_memory=work.on_accelerator)
    return sizes, staging, torch.zeros(largest, dtype=torch.uint8, device=work.device)


def _index_select(work: Work, share: float) -> Iterator[Run]:
    """Gather rows of one resident tensor for each leaf, padded if the leaf is ragged.

    Everything else is prepared: rows, plain values, lengths and masks. The results reuse the memory
    of the previous batch, which a loader must not do.
    """
    if work.collation.mode == "list":
        raise NotApplicableError("the features cannot be stacked")
    prepared: list[list[Batch]] = work.prepared("resident tensors", lambda: _make_resident(work))

    def epoch(number: int) -> Iterable[Any]:
        for gathers, batch in prepared[number]:
            for source, rows, result in gathers:
                torch.index_select(source, 0, rows, out=result)
            yield batch

    yield Run(epoch)


def _in_one_thread(work: Work, share: float) -> Iterator[Run]:
    """The same in one thread, which is faster for small batches and beside busy processes."""
    if work.on_accelerator:
        raise NotApplicableError("the device gathers, and not threads of the host")
    with threads(1):
        yield from _index_select(work, share)


def _make_resident(work: Work) -> list[list[Batch]]:
    """All batches, by epoch. They share one tensor of all features for each leaf."""
    tree, ragged = work.layouts[0].tree, work.collation.ragged
    names = leaf_names(tree)
    flat = [flatten(work.load(path)) for path in work.paths]
    leaves = [[tensors[number] for _, tensors, _ in flat] for number in range(len(names))]
    resident = [
        work.upload(pad_sequence(each, batch_first=True) if name in ragged else torch.stack(each))
        for name, each in zip(names, leaves, strict=True)
    ]
    room = [each.new_empty(work.batch_size * each[0].numel()) for each in resident]
    row_of = {path: number for number, path in enumerate(work.paths)}

    def make(paths: Sequence[str]) -> Batch:
        numbers = [row_of[path] for path in paths]
        rows = work.upload(torch.tensor(numbers, device="cpu"))
        gathers, columns = [], []
        for name, each, source, free in zip(names, leaves, resident, room, strict=True):
            if name in ragged:
                lengths = torch.tensor([len(each[number]) for number in numbers], device="cpu")
                source = source[:, : int(lengths.max())]
            shape = (len(rows), *source.shape[1:])
            column: Any = free[: math.prod(shape)].view(shape)
            gathers.append((source, rows, column))
            if name in ragged:
                lengths = work.upload(lengths)
                steps = torch.arange(shape[1], device=work.device)
                column = Padded(column, lengths, steps < lengths.unsqueeze(1))
            columns.append(column)
        values = [flat[number][2] for number in numbers]
        plain = work.upload(work.collation.by_hand(values)) if values[0] else []
        return gathers, build(tree, columns.__getitem__, plain.__getitem__)

    return [[make(paths) for paths in epoch] for epoch in work.batches]


LIMITS = [
    Contender(
        "preadv of the bytes", "limit", _preadv, cases=("first", "overlap"), makes_batches=False
    ),
    Contender("index_select of resident tensors", "limit", _index_select, cases=("later", "busy")),
    Contender("index_select in one thread", "limit", _in_one_thread, cases=("later", "busy")),
]
