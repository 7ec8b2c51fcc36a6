"""How leaves whose first dimension may differ are joined, and what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from gpucache_pipes.device.host_copies import Numbers
from gpucache_pipes.units import positive_int

MODES = ("error", "pad", "jagged", "list")
"""How a leaf of all features is joined; see GPUCollator."""

CROPS = ("start", "center", "random")
"""Which part of a sequence is taken that is longer than max_length; see GPUCollator."""


class Padded(NamedTuple):
    """Sequences of different lengths as one tensor.

    Attributes:
        values: [B, T, *rest]. T is the largest length, rounded up to pad_to_multiple. After its
            end, each sequence is filled with the padding value.
        lengths: int64 [B].
        mask: bool [B, T], True where `values` holds an element of a sequence, False where it
            holds padding.
    """

    values: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor

    def to(self, *args: Any, **kwargs: Any) -> "Padded":
        """Each tensor, `Tensor.to(...)`; a dtype is for the values alone."""
        values = self.values.to(*args, **kwargs)
        moved = (part.to(values.device) for part in (self.lengths, self.mask))
        return Padded(values, *moved)


@dataclass(frozen=True)
class RaggedOptions:
    """How to join leaves whose first dimension may differ from feature to feature.

    The type of a collated batch follows from these options alone, never from the shapes in this
    batch or in earlier ones: a run that is interrupted and resumed gives the same types as one
    that is not.

    Args:
        modes: one of MODES for all leaves, or a dict of them by the names of leaves. One mode
            other than "error" joins every leaf of at least one dimension that way, in every
            batch, even where all lengths are equal; tensors without dimensions are stacked. With
            a dict, leaves that it does not name are stacked, or are an error where shapes differ.
        padding_value: fills what lies after the end of a padded sequence.
        pad_to_multiple: the length of a padded batch is rounded up to a multiple of this.
        max_length: of sequences that are longer, so much is taken; None takes all.
        crop: which part of these: one of CROPS.
        cuts: see `fractions`, where that was called already.

    Raises:
        ValueError: an unknown mode or crop, pad_to_multiple or max_length < 1, or a crop without a
            max_length.

    >>> RaggedOptions("pad").mode_of("['frames']", differs=False)
    'pad'
    >>> RaggedOptions("pad").mode_of("['label']", differs=False, dimensions=0)
    >>> RaggedOptions({"frames": "jagged"}).mode_of("['frames']", differs=False)
    'jagged'
    >>> RaggedOptions({"frames": "jagged"}).mode_of("['mask']", differs=True)
    'error'
    """

    modes: str | Mapping[str, str] = "error"
    padding_value: float = 0.0
    pad_to_multiple: int = 1
    max_length: int | None = None
    crop: str = "start"
    cuts: Numbers | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        positive_int("pad_to_multiple", self.pad_to_multiple)
        if self.max_length is not None:
            positive_int("max_length", self.max_length)
        if self.crop not in CROPS:
            raise ValueError(f"crop={self.crop!r} must be one of {', '.join(CROPS)}")
        if self.crop != "start" and self.max_length is None:
            raise ValueError(f"crop={self.crop!r} needs a max_length=, how much to take")
        if not isinstance(self.modes, (str, Mapping)):
            raise ValueError(
                f"ragged={self.modes!r} must be a mode ({', '.join(MODES)}), or a dict of modes by "
                "the names of leaves"
            )
        for mode in self._all_modes():
            if mode not in MODES:
                raise ValueError(f"ragged={mode!r} is not known; there are: {', '.join(MODES)}")

    def fractions(self, count: int) -> Numbers | None:
        """Where in what is left over each of `count` features is cut, from 0 to 1; None at 0.

        Those of crop="random" are drawn from torch's random numbers of the CPU.
        """
        if self.cuts is not None or self.crop == "start":
            return self.cuts
        if self.crop == "center":
            return np.full(count, 0.5)
        return torch.rand(count, dtype=torch.float64, device="cpu").numpy()

    @classmethod
    def of(cls, ragged: "RaggedOptions | str | Mapping[str, str]") -> "RaggedOptions":
        """These options, or those of a mode."""
        return ragged if isinstance(ragged, RaggedOptions) else cls(ragged)

    def drawn(self, count: int) -> "RaggedOptions":
        """These, with one draw of where features are cut, for several parts of samples."""
        return replace(self, cuts=self.fractions(count))

    def of_part(self, name: Any, parts: Sequence[Any]) -> "RaggedOptions":
        """Those for one part of samples of several files.

        A dict names all of a part by its name, and a leaf as in a feature or, of this part alone,
        with the name of the part in front.

        >>> options = RaggedOptions({"video": "pad", "['audio']['frames']": "list"})
        >>> options.of_part("video", ["video", "audio"]).modes
        'pad'
        >>> options.of_part("audio", ["video", "audio"]).mode_of("['frames']", differs=False)
        'list'
        """
        if isinstance(self.modes, str):
            return self
        front = f"[{name!r}]"
        for whole in (name, front):
            if whole in self.modes:
                return replace(self, modes=self.modes[whole])
        others = tuple(f"[{other!r}]" for other in parts if other != name)
        modes = {
            key.removeprefix(front): mode
            for key, mode in self.modes.items()
            if isinstance(key, str) and key not in parts and not key.startswith(others)
        }
        return replace(self, modes=modes)

    def hint(self, names: Sequence[str]) -> str:
        """What to add to an error of features that have these leaves, if a mode names no leaf."""
        if isinstance(self.modes, str):
            return ""
        keys = [key_of(name) for name in names]
        unknown = [name for name in self.modes if name not in keys and name not in names]
        if not unknown:
            return ""
        return f"; ragged= names {unknown[0]!r}, but the leaves are {', '.join(map(repr, keys))}"

    def _all_modes(self) -> list[str]:
        return [self.modes] if isinstance(self.modes, str) else list(self.modes.values())

    @property
    def copies(self) -> bool:
        """Whether no result is a view of the memory that it was made from."""
        return "list" not in self._all_modes()

    def mode_of(self, name: str, differs: bool, dimensions: int = 1) -> str | None:
        """How to join one leaf of all features of a batch; None to stack it.

        Args:
            name: the leaf's, as `leaf_names` gives it: "['frames']".
            differs: whether its shape is not the same in all features.
            dimensions: of the leaf in the first feature. Only 0 makes a difference.
        """
        if not isinstance(self.modes, str):
            # A leaf of a plain dict may be named by its key.
            mode = self.modes.get(name) or self.modes.get(key_of(name))
            return mode if mode is not None else "error" if differs else None
        if self.modes == "error" or not dimensions:
            return self.modes if differs else None
        return self.modes


def key_of(name: str) -> str:
    """The key that a leaf has, if its feature is a dict of leaves; else its name."""
    return name[2:-2] if name.startswith("['") and name.count("[") == 1 else name


def cut_at(length: int, most: int, fraction: float) -> int:
    """Where to begin, to take `most` of a longer sequence.

    >>> [cut_at(10, 4, fraction) for fraction in (0, 0.5, 0.999)], cut_at(3, 4, 0.5)
    ([0, 3, 6], 0)
    """
    return int(fraction * (length - most + 1)) if length > most else 0
