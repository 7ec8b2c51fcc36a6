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
    """Another rank had an error or is missing, so this rank cannot go on with its batch.

    See Lockstep, and `process_group=` of GPUFeatureStore.

    Attributes:
        texts: by rank, what happened there: the type and text of an exception, or where it is.
    """

    def __init__(self, texts: dict[int, str], verb: str = "failed with", advice: str = "") -> None:
        super().__init__(texts, verb, advice)
        self.texts = texts
        self._verb = verb
        self._advice = advice

    def __str__(self) -> str:
        each = (f"rank {rank} {self._verb} {text}" for rank, text in self.texts.items())
        return "; ".join(each) + self._advice
