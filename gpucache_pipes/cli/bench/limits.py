"""Lower bounds of the time: reading the bytes of the files, and gathering resident tensors."""

import math
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from gpucache_pipes.batches import Padded
from gpucache_pipes.cli.bench.contender import Contender, NotApplicableError, Run
from gpucache_pipes.cli.bench.work import Work
from gpucache_pipes.files import build, file_size, flatten, leaf_names


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

    The results reuse the memory of the previous batch, which a loader must not do.
    """
    if work.collation.mode == "list":
        raise NotApplicableError("the features cannot be stacked")
    tree = work.layouts[0].tree
    names = leaf_names(tree)
    resident, values = work.prepared("resident tensors", lambda: _make_resident(work))
    row_of = {path: number for number, path in enumerate(work.paths)}

    room: dict[str, torch.Tensor] = {}

    def take(name: str, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        shape = (len(rows), *tensor.shape[1:])
        count = math.prod(shape)
        if name not in room or len(room[name]) < count:
            room[name] = tensor.new_empty(count)
        return torch.index_select(tensor, 0, rows, out=room[name][:count].view(shape))

    def select(name: str, column: Any, rows: torch.Tensor) -> Any:
        if name not in work.collation.ragged:
            return take(name, column, rows)
        tensor, lengths = column
        chosen = lengths[rows.cpu()]
        longest = int(chosen.max())
        picked = take(name, tensor[:, :longest], rows)
        chosen = chosen.to(work.device)
        mask = torch.arange(longest, device=work.device) < chosen.unsqueeze(1)
        return Padded(picked, chosen, mask)

    def epoch(number: int) -> Iterable[Any]:
        for batch in work.batches[number]:
            numbers = list(map(row_of.__getitem__, batch))
            table = torch.tensor(numbers, device="cpu", pin_memory=work.on_accelerator)
            rows = work.upload(table)
            columns = [
                select(name, column, rows) for name, column in zip(names, resident, strict=True)
            ]
            plain = work.collation.by_hand([values[n] for n in numbers]) if values[0] else []
            yield build(tree, columns.__getitem__, plain.__getitem__)

    yield Run(epoch)


def _make_resident(work: Work) -> tuple[list[Any], list[list[Any]]]:
    """One tensor of all features for each leaf, on the device, and the plain values by feature.

    For a ragged leaf, the padded tensor and its lengths.
    """
    flat = [flatten(work.load(path)) for path in work.paths]
    names = leaf_names(work.layouts[0].tree)
    resident: list[Any] = []
    for number, name in enumerate(names):
        leaves = [tensors[number] for _, tensors, _ in flat]
        if name in work.collation.ragged:
            padded = torch.nn.utils.rnn.pad_sequence(leaves, batch_first=True)
            lengths = torch.tensor([len(leaf) for leaf in leaves], device="cpu")
            resident.append((work.upload(padded), lengths))
        else:
            resident.append(work.upload(torch.stack(leaves)))
    return resident, [values for _, _, values in flat]


LIMITS = [
    Contender(
        "preadv of the bytes", "limit", _preadv, cases=("first", "overlap"), makes_batches=False
    ),
    Contender("index_select of resident tensors", "limit", _index_select, cases=("later",)),
]
