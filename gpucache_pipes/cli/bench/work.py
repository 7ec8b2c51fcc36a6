"""What all contenders get: the same files, in the same batches, for the same device."""

import io
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from gpucache_pipes.cli.bench.collation import Collation, checksum
from gpucache_pipes.files import AnyFiles, Layout, file_size, leaf_names
from gpucache_pipes.files.remote.urls import is_url
from gpucache_pipes.nodes import PathLister
from gpucache_pipes.units import format_bytes

_MOST_EPOCHS = 11
"""Epochs of a run with everything cached: the first ones are slower than the others."""


def load(
    file: str | io.BytesIO, weights_only: bool = True, mmap: bool = False, name: str = ""
) -> Any:
    """Load a feature with the library that defines the format of the file.

    Args:
        file: a `.safetensors` or `.npy` file, or one that `torch.load` reads; or its bytes.
        weights_only: as in `torch.load`.
        mmap: as in `torch.load`.
        name: of the file, if its bytes are given.

    Raises:
        Exception: what the library raises.
    """
    name = file if isinstance(file, str) else name
    if name.endswith(".safetensors"):
        from safetensors.torch import load as load_bytes
        from safetensors.torch import load_file

        return load_file(file) if isinstance(file, str) else load_bytes(file.getvalue())
    if name.endswith(".npy"):
        import numpy as np

        return torch.from_numpy(np.load(file))
    return torch.load(file, map_location="cpu", weights_only=weights_only, mmap=mmap)


def sample(
    paths: Sequence[str],
    most_files: int,
    most_bytes: int,
    seed: int,
    size_of: Callable[[str], int] = file_size,
) -> list[str]:
    """Draw a random sample of files.

    Args:
        paths: all files.
        most_files: largest number of files.
        most_bytes: largest total size. Two files are drawn even if they are larger.
        seed: of the draw.
        size_of: the size of a file in bytes.

    Returns:
        Some of `paths`, in their order.

    Raises:
        OSError: a file cannot be found.
    """
    drawn = random.Random(seed).sample(range(len(paths)), len(paths))
    chosen: list[int] = []
    total = 0
    for number in drawn:
        total += size_of(paths[number])
        if len(chosen) == most_files or (len(chosen) > 1 and total > most_bytes):
            break
        chosen.append(number)
    return [paths[number] for number in sorted(chosen)]


@dataclass
class Work:
    """A sample of files, and the batches to make from them. A context manager.

    Attributes:
        paths: the files that are read.
        batch_size: files in a batch.
        device: where the batches are needed.
        known: number of files in the data set; 0 means that `paths` are all of them.
        epochs: epochs of a run with only a fraction of the data cached.
        seed: of the order of the files, which is new in each epoch.
        weights_only: as in `torch.load`.
        cold_storage: evict the files from the page cache before each epoch.
        storage_options: for URLs: see GPUFeatureStore.
        threads: threads of other loaders that have some.
        on_accelerator: whether `device` is not the CPU.
        layouts: of all features.
        feature_bytes: bytes of all features.
        batches: paths of each batch, by epoch.
        collation: how batches are made.

    Raises:
        ValueError: a file cannot be read, no file has a tensor, or `cold_storage` is not possible
            on this system.
    """

    paths: Sequence[str]
    batch_size: int
    device: torch.device
    known: int = 0
    epochs: int = 5
    seed: int = 0
    weights_only: bool = True
    cold_storage: bool = False
    storage_options: Mapping[str, Any] | None = None
    threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))

    def __post_init__(self) -> None:
        if self.cold_storage and not hasattr(os, "posix_fadvise"):
            raise ValueError(
                "--cold-storage: this system has no posix_fadvise to evict the page cache"
            )
        self.known = self.known or len(self.paths)
        self.on_accelerator = self.device.type != "cpu"
        self._prepared: dict[str, Any] = {}
        self.layouts, values = self._open_all()
        self.feature_bytes = sum(layout.span for layout in self.layouts)
        lister = self.lister()
        self.batches: list[list[list[str]]] = []
        for _ in range(max(self.epochs, _MOST_EPOCHS)):
            lister.reset()
            self.batches.append(list(lister))
        examples = [self.load(path) for path in self.batches[0][0][:8]]
        self.collation = Collation.of(self.layouts, values, examples)
        self._scratch = tempfile.TemporaryDirectory(prefix="gpucache-bench-")

    def _open_all(self) -> tuple[list[Layout], list[tuple[Any, ...]]]:
        files = AnyFiles(weights_only=self.weights_only, storage_options=self.storage_options)
        layouts, values = [], []
        for path in self.paths:
            try:
                feature, _ = files.probe(path)
            except Exception as error:
                raise ValueError(
                    f"{path!r} cannot be read: {error}; `inspect` lists all such files"
                ) from error
            feature.close()
            layouts.append(feature.layout)
            values.append(feature.values)
        if not any(layout.span for layout in layouts):
            raise ValueError("there are no tensors in these files")
        return layouts, values

    def budget(self, share: float) -> int:
        """Bytes of a budget for `share` of the features; at least twice the largest feature."""
        largest = max(layout.span for layout in self.layouts)
        return max(int(share * self.feature_bytes), 2 * largest)

    def lister(self, paths: Sequence[str] | None = None) -> PathLister:
        """A new lister that yields `batches`, epoch by epoch; or the same of other paths."""
        return PathLister(
            self.paths if paths is None else paths,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            num_shards=1,
            shard_index=0,
        )

    def load(self, path: str) -> Any:
        """Load one feature, as most training scripts do."""
        if not is_url(path):
            return load(path, self.weights_only)
        from gpucache_pipes.cli.bench.objects import fetch_by_obstore

        fetch = self.prepared("a client", lambda: fetch_by_obstore(self.storage_options or {}))
        return load(io.BytesIO(fetch(path)), self.weights_only, name=path)

    def load_batch(self, paths: Sequence[str]) -> Any:
        """Load and collate a batch in host memory, which is pinned if there is an accelerator."""
        batch = self.collation.by_hand([self.load(path) for path in paths])
        return (
            tree_map_only(torch.Tensor, torch.Tensor.pin_memory, batch)
            if self.on_accelerator
            else batch
        )

    def upload(self, batch: Any) -> Any:
        """Move a batch or a feature to the device, without waiting for the copy."""
        if not self.on_accelerator:
            return batch
        move = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        return tree_map_only(torch.Tensor, move, batch)

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.on_accelerator:
            torch.accelerator.synchronize(self.device)

    def expected(self, epoch: int) -> list[int]:
        """The checksum of each batch of an epoch, loaded by `load_batch`. Computed once."""
        sums: list[int] = self.prepared(
            f"checksums of epoch {epoch}",
            lambda: [checksum(self.load_batch(batch)) for batch in self.batches[epoch]],
        )
        return sums

    def prepared(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, which is called once and not timed.

        For example, the data in another format.

        Args:
            name: identifies the result.
            make: called if there is no result of this name.
        """
        if name not in self._prepared:
            self._prepared[name] = make()
        return self._prepared[name]

    def directory(self, name: str) -> Path:
        """A new empty directory, which `close` removes. `name` must be new."""
        path = Path(self._scratch.name, name)
        path.mkdir()
        return path

    def evict_page_cache(self) -> None:
        """With `cold_storage`, let the next read of each file be from the disk."""
        if not self.cold_storage:
            return
        for path in self.paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what `prepared` and `directory` made."""
        self._prepared.clear()
        self._scratch.cleanup()

    def as_json(self) -> dict[str, Any]:
        """A description for reports."""
        first = self.layouts[0]
        leaves = zip(leaf_names(first.tree), first.leaves, strict=True)
        return {
            "files": len(self.paths),
            "known_files": self.known,
            "feature_bytes": self.feature_bytes,
            "batch_size": self.batch_size,
            "batches": len(self.batches[0]),
            "epochs": self.epochs,
            "seed": self.seed,
            "device": str(self.device),
            "collation": self.collation.mode,
            "reason": self.collation.reason,
            "cold_storage": self.cold_storage,
            "example": {
                name: f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
                for name, leaf in leaves
            },
        }

    def __str__(self) -> str:
        part = "" if self.known == len(self.paths) else f" of {self.known}"
        example = ", ".join(f"{k}: {v}" for k, v in self.as_json()["example"].items())
        return (
            f"{len(self.paths)}{part} files, {format_bytes(self.feature_bytes)} of tensors "
            f"({example}), batches of {self.batch_size}, on {self.device}"
        )
