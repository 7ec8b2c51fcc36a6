"""Collates features that are not alike: of different trees or dtypes, one by one."""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch

from gpucache_pipes.batches.ragged import fill, jagged_tensor
from gpucache_pipes.batches.ragged_options import Padded, RaggedOptions, cut_at
from gpucache_pipes.batches.transfer import collate_on_host
from gpucache_pipes.device.host_copies import Numbers


def collate_unlike(features: Sequence[Any], options: RaggedOptions) -> Any:
    """What `default_collate` makes of features of different trees or dtypes, ragged leaves joined.

    A file, or a feature that on_error gives, may have a leaf in another dtype or its keys in
    another order. The types of the batch are nevertheless those that the options say. Dtypes are
    promoted, as torch.stack promotes them. Takes several operations for each feature.

    Raises:
        RuntimeError: where shapes differ that the options do not allow to.
        Exception: what `default_collate` raises where trees differ otherwise.
    """
    if options.modes == "error":
        return collate_on_host(list(features))
    cuts = options.fractions(len(features))
    return _collate_samples(list(features), "", options, cuts)


def _collate_samples(
    samples: Sequence[Any], name: str, options: RaggedOptions, cuts: Numbers | None
) -> Any:
    first = samples[0]
    kind = type(first)
    if isinstance(first, torch.Tensor):
        return _join_tensors(samples, name or "the feature", options, cuts)
    if isinstance(first, dict):
        return kind(
            (
                key,
                _collate_samples(
                    [part[key] for part in samples], f"{name}[{key!r}]", options, cuts
                ),
            )
            for key in first
        )
    if isinstance(first, (list, tuple)):
        columns = enumerate(zip(*samples, strict=True))
        parts = [_collate_samples(column, f"{name}[{at}]", options, cuts) for at, column in columns]
        return kind(*parts) if hasattr(kind, "_fields") else parts
    return collate_on_host(samples)


def _join_tensors(
    parts: Sequence[torch.Tensor], name: str, options: RaggedOptions, cuts: Numbers | None
) -> Any:
    first = parts[0]
    differs = any(part.shape != first.shape for part in parts)
    mode = options.mode_of(name, differs, first.dim())
    if mode is None or mode == "error":
        return collate_on_host(list(parts))
    if any(not part.dim() or part.shape[1:] != first.shape[1:] for part in parts):
        shapes = ", ".join(str(list(part.shape)) for part in parts[:10])
        raise RuntimeError(f"cannot {mode} {name}: shapes {shapes}")
    most = options.max_length
    if most is not None:
        where = [0.0] * len(parts) if cuts is None else cuts.tolist()
        begins = [cut_at(len(part), most, cut) for part, cut in zip(parts, where, strict=True)]
        parts = [part[at : at + most] for part, at in zip(parts, begins, strict=True)]
    if mode == "list":
        return list(parts)
    dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    lengths = [len(part) for part in parts]
    if mode == "jagged":
        values = torch.cat([part.to(dtype) for part in parts])
        ends = torch.tensor([0, *accumulate(lengths)], device=first.device)
        return jagged_tensor(values, ends, lengths)
    longest = -(-max(lengths) // options.pad_to_multiple) * options.pad_to_multiple
    shape = (len(parts), longest, *first.shape[1:])
    values = torch.empty(shape, dtype=dtype, device=first.device)
    fill(values, options.padding_value)
    for row, part in zip(values, parts, strict=True):
        row[: len(part)] = part
    table = torch.tensor(lengths, device=first.device)
    mask = torch.arange(longest, device=first.device) < table.unsqueeze(1)
    return Padded(values, table, mask)
