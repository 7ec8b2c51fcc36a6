"""Exceptions of this package."""


class FeatureLoadError(RuntimeError):
    """One file could not be loaded; the store goes on, and the next request tries again.

    Attributes:
        path: the file.
        reason: what is wrong with it.
        __cause__: the exception of the reader or of `load_fn`.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot load {self.path!r}: {self.reason}"


class PolicyError(RuntimeError):
    """The policy of a store has failed. No file is at fault, so `on_error` is not asked.

    Attributes:
        __cause__: the exception of the policy.
    """


class RankError(RuntimeError):
    """Another rank had an error, so this rank cannot go on with its batch: see Lockstep.

    Attributes:
        texts: by rank, the type and text of the exception that was raised there.
    """

    def __init__(self, texts: dict[int, str]) -> None:
        super().__init__(texts)
        self.texts = texts

    def __str__(self) -> str:
        return "; ".join(f"rank {rank} failed with {text}" for rank, text in self.texts.items())
