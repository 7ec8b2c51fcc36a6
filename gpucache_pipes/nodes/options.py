"""Options of the nodes, which check themselves when they are made.

Nodes make theirs from the arguments of their constructors. Adapters, which make new nodes for each
epoch, make them once, so that wrong options are an error at once and not in the middle of a run,
and hand them on: `GPUPrefetcher(source, store, **vars(options))`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.store import GPUFeatureStore
from gpucache_pipes.units import positive_int

OnError = str | Callable[[str, Exception], Any]
"""The type of `on_error=`; see GPUPrefetcher."""


@dataclass(frozen=True)
class PrefetchOptions:
    """The options of a GPUPrefetcher, which describes them.

    Raises:
        ValueError: depth < 1; a join_fn without a path_fn; an unknown on_error; max_failures
            below 0, or together with on_error="raise".

    >>> PrefetchOptions(on_error="skip").tolerant
    True
    >>> PrefetchOptions(max_failures=3)
    Traceback (most recent call last):
    ValueError: max_failures is for on_error="skip" or a callable
    """

    depth: int | None = None
    path_fn: Callable[[Any], Any] | None = None
    join_fn: Callable[[Any, Any], Any] | None = None
    on_error: OnError = "raise"
    max_failures: int | None = None

    def __post_init__(self) -> None:
        if self.join_fn is not None and self.path_fn is None:
            raise ValueError(
                "join_fn needs a path_fn: elements that are paths have nothing to join"
            )
        if self.depth is not None:
            object.__setattr__(self, "depth", positive_int("depth", self.depth))
        if not callable(self.on_error) and self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error={self.on_error!r} must be "raise", "skip" or callable')
        if self.max_failures is not None:
            positive_int("max_failures", self.max_failures, least=0)
            if not self.tolerant:
                raise ValueError('max_failures is for on_error="skip" or a callable')

    @property
    def tolerant(self) -> bool:
        """Whether a file that cannot be loaded may be left out or replaced."""
        return self.on_error != "raise"


@dataclass(frozen=True)
class CollateOptions:
    """The options of a GPUCollator, which describes them.

    Raises:
        ValueError: batch_size < 1; drop_last without a batch_size; a collate_fn together with
            ragged; a transform that cannot be called; what RaggedOptions refuses.
    """

    collate_fn: Callable[[list[Any]], Any] | None = None
    batch_size: int | None = None
    drop_last: bool = False
    ragged: str | Mapping[str, str] = "error"
    padding_value: float = 0.0
    pad_to_multiple: int = 1
    max_length: int | None = None
    crop: str = "start"
    transform: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.transform is not None and not callable(self.transform):
            raise ValueError(f"transform={self.transform!r} must be callable")
        if self.collate_fn is not None and self.ragged != "error":
            raise ValueError(
                "ragged= is for the default collation: with a collate_fn, join sequences there"
            )
        if self.max_length is not None and self.ragged == "error":
            raise ValueError('max_length= is for ragged= sequences: set ragged, to "pad" for one')
        self.ragged_options()
        if self.batch_size is not None:
            positive_int("batch_size", self.batch_size)
        elif self.drop_last:
            raise ValueError("drop_last=True needs a batch_size")

    def ragged_options(self) -> RaggedOptions:
        """Those of them that say how to join sequences of different lengths."""
        return RaggedOptions(
            self.ragged, self.padding_value, self.pad_to_multiple, self.max_length, self.crop
        )


def require_store(store: object) -> None:
    """Raise TypeError for anything but a GPUFeatureStore."""
    if not isinstance(store, GPUFeatureStore):
        raise TypeError(f"store must be a GPUFeatureStore, not {type(store).__name__}")


def require_consistent(
    pattern: Any, batch_size: Any, drop_last: Any, shuffle: Any, seed: Any, sampler: Any,
    bucket_by: Any, if_files_changed: Any,
) -> None:  # fmt: skip
    """Raise ValueError for arguments of a PathLister that are wrong or contradict each other."""
    if batch_size is not None:
        positive_int("batch_size", batch_size)
    elif drop_last:
        raise ValueError("drop_last=True needs a batch_size")
    if not isinstance(shuffle, bool):
        raise ValueError(f"shuffle={shuffle!r} must be True or False")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} must be a whole number")
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={pattern!r} must be a str, such as '*.pt'")
    if shuffle and sampler is not None:
        raise ValueError("shuffle=True and a sampler both set the order; give one of them")
    if isinstance(sampler, Iterator):
        raise ValueError("the sampler is an iterator, which can be read only once")
    if bucket_by is not None and batch_size is None:
        raise ValueError("bucket_by makes batches of files of similar size: give a batch_size")
    if bucket_by is not None and sampler is not None:
        raise ValueError("bucket_by and a sampler both set the order; give one of them")
    if if_files_changed not in ("raise", "continue"):
        raise ValueError(f'if_files_changed={if_files_changed!r} must be "raise" or "continue"')


def no_list(source: object) -> ValueError:
    """The error of a stream that is given what only a list can have."""
    return ValueError(
        "an order and labels are for a known list of files: give a directory, a glob or a "
        f"sequence of paths, or shuffle inside the {type(source).__name__}"
    )


def require_batches(batch_size: int | None) -> None:
    """Raise ValueError if samples of several files do not come in batches."""
    if batch_size is None:
        raise ValueError("samples of several files come in batches: give a batch_size")
