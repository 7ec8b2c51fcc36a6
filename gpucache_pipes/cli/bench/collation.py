"""The collation that all contenders share, and the checksum that compares their batches."""

import ctypes
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from gpucache_pipes.batches import Padded, collate_on_host
from gpucache_pipes.files import Layout, leaf_names


@dataclass(frozen=True)
class Collation:
    """How the features of a batch become one batch; the same for all contenders.

    Attributes:
        mode: "stack": tensors [B, *shape]. "pad": as "stack", but the leaves in `ragged` are
            padded. "list": a list of features, since they cannot be stacked.
        ragged: names of the leaves that are padded.
        reason: why the features cannot be stacked; empty if they can.
    """

    mode: str
    ragged: frozenset[str] = frozenset()
    reason: str = ""

    @classmethod
    def of(
        cls,
        layouts: Sequence[Layout],
        values: Sequence[tuple[Any, ...]],
        examples: Sequence[Any],
    ) -> "Collation":
        """Choose the collation for a data set.

        Args:
            layouts: of all features.
            values: plain values of all features.
            examples: some of the features, which are collated to see whether it works.
        """
        first = layouts[0]
        names = leaf_names(first.tree)
        ragged = set()
        for other in set(layouts):
            if other.tree != first.tree:
                return cls("list", reason="they differ in more than the shapes of tensors")
            for name, mine, its in zip(names, first.leaves, other.leaves, strict=True):
                if mine.dtype != its.dtype or mine.shape[1:] != its.shape[1:]:
                    return cls("list", reason=f"{name} differs in more than its first dimension")
                if mine.shape != its.shape:
                    ragged.add(name)
        chosen = cls("pad" if ragged else "stack", frozenset(ragged))
        for column in zip(*values, strict=True):
            kinds = sorted({type(value).__qualname__ for value in column})
            if len(kinds) > 1:
                return cls("list", reason=f"plain values are {' and '.join(kinds)}")
        try:
            chosen.by_hand(examples)
        except (TypeError, RuntimeError) as error:
            return cls("list", reason=str(error))
        return chosen

    def by_hand(self, features: Sequence[Any]) -> Any:
        """Collate with torch alone, as training scripts do: torch.stack or pad_sequence by leaf."""
        return list(features) if self.mode == "list" else self._column(features, "")

    def _column(self, values: Sequence[Any], name: str) -> Any:
        first = values[0]
        if isinstance(first, torch.Tensor):
            if (name or "the feature") in self.ragged:
                return pad(values)
            return torch.stack(list(values))
        if isinstance(first, dict):
            return {k: self._column([v[k] for v in values], f"{name}[{k!r}]") for k in first}
        if isinstance(first, (list, tuple)):
            columns = [
                self._column([v[number] for v in values], f"{name}[{number!r}]")
                for number in range(len(first))
            ]
            if hasattr(first, "_fields"):
                return type(first)(*columns)
            return columns if isinstance(first, list) else tuple(columns)
        return collate_on_host(list(values))

    def for_nodes(self) -> dict[str, Any]:
        """The same collation as keyword arguments of `GPUCollator`."""
        if self.mode == "list":
            return {"collate_fn": list}
        return {"ragged": dict.fromkeys(self.ragged, "pad")} if self.ragged else {}


def pad(sequences: Sequence[torch.Tensor]) -> Padded:
    """Pad sequences of different lengths with zeros to one `Padded` [B, longest, *].

    >>> pad([torch.ones(2), torch.ones(1)]).values.tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    values = pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=values.device)
    return Padded(values, lengths, torch.arange(values.shape[1], device=values.device)
                  < lengths.unsqueeze(1))  # fmt: skip


def checksum(batch: Any, start: int = 0) -> int:
    """A CRC-32 of a batch: its keys, shapes, dtypes and every byte, in order.

    Lists and tuples of equal items have the same checksum, since some loaders turn one into the
    other.

    Args:
        batch: a pytree of tensors, on any device, and plain values.
        start: checksum to continue.

    >>> checksum([torch.tensor(1)]) == checksum((torch.tensor(1),)) != checksum([torch.tensor(2)])
    True
    """
    if isinstance(batch, torch.Tensor):
        dense = batch.detach().cpu().contiguous()
        crc = zlib.crc32(f"{dense.dtype} {tuple(dense.shape)}".encode(), start)
        count = dense.numel() * dense.dtype.itemsize
        if count:
            crc = zlib.crc32((ctypes.c_ubyte * count).from_address(dense.data_ptr()), crc)
        return crc
    if isinstance(batch, Mapping):
        start = zlib.crc32(f"{{{len(batch)}".encode(), start)
        for key, value in batch.items():
            start = checksum(value, zlib.crc32(repr(key).encode(), start))
        return start
    if isinstance(batch, (list, tuple)):
        start = zlib.crc32(f"[{len(batch)}".encode(), start)
        for value in batch:
            start = checksum(value, start)
        return start
    return zlib.crc32(repr(batch).encode(), start)
