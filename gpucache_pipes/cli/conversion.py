"""What a conversion by `dtype=` does to the values of features: `inspect --dtype`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpucache_pipes.files import flatten, leaf_names
from gpucache_pipes.store import GPUFeatureStore

_SAMPLED = 256
"""Files that are looked at, of a large data set."""


def parse_dtype(name: str) -> torch.dtype:
    """The floating dtype that has this name. Raises ValueError for any other name."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype={name} is no floating dtype, such as bfloat16 or float16")
    return dtype


def conversion_errors(
    paths: Sequence[str],
    dtype: torch.dtype,
    weights_only: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Compare the floating tensors of files with what is left of them after a conversion.

    Args:
        paths: feature files that can be loaded; about 256 of them are looked at.
        dtype: what the tensors are converted to.
        weights_only: as in `torch.load`.
        storage_options: see GPUFeatureStore.

    Returns:
        For each leaf, by name: its dtype and the new one, the number of elements, the largest
        relative error of those that stay finite and are not 0, how many become infinite, and how
        many become 0.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with GPUFeatureStore(
        "cpu",
        max_cache_items=1,
        weights_only=weights_only,
        storage_options=storage_options,
        asynchronous=False,
    ) as store:
        for path in paths[:: max(1, len(paths) // _SAMPLED)]:
            tree, tensors, _ = flatten(store.get(path))
            for name, tensor in zip(leaf_names(tree), tensors, strict=True):
                if tensor.is_floating_point() and tensor.dtype != dtype:
                    kind = str(tensor.dtype).removeprefix("torch.")
                    row = found.setdefault((name, kind), _row(name, kind, dtype))
                    _add(row, tensor.double(), tensor.to(dtype).double())
    return list(found.values())


def _row(name: str, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    to = str(dtype).removeprefix("torch.")
    return {"name": name, "from": kind, "to": to, "elements": 0, "relative_error": 0.0,
            "become_infinite": 0, "become_zero": 0}  # fmt: skip


def _add(row: dict[str, Any], before: torch.Tensor, after: torch.Tensor) -> None:
    row["elements"] += before.numel()
    row["become_infinite"] += int((before.isfinite() & after.isinf()).sum())
    row["become_zero"] += int(((before != 0) & (after == 0)).sum())
    compared = after.isfinite() & (after != 0)
    if compared.any():
        error = ((after - before) / before)[compared].abs().max().item()
        row["relative_error"] = max(row["relative_error"], error)


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A report of `conversion_errors` as text."""
    lines = [
        f"  {row['name']}: {row['from']} to {row['to']}: at most {row['relative_error']:.2g} of "
        f"the value; of {row['elements']:,} elements {row['become_infinite']:,} become inf, "
        f"{row['become_zero']:,} become 0"
        for row in rows
    ]
    return "\n".join(["converted by dtype=:", *(lines or ["  no tensor would change"])])
