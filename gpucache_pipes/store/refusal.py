"""Why a store does not work any more."""


class Refusal:
    """The reason that all calls of a store are refused for, once there is one.

    Attributes:
        reason: a text once the store is closed or in a forked process, the error that has ended its
            device, or None while it works. Assigned in one step, with or without the store's lock.
    """

    def __init__(self) -> None:
        self.reason: str | BaseException | None = None

    def check(self) -> None:
        """Raise RuntimeError, or what has ended the device, if there is a reason."""
        if isinstance(self.reason, BaseException):
            raise self.reason
        if self.reason is not None:
            raise RuntimeError(self.reason)

    def close(self) -> None:
        """The store is closed."""
        if self.reason is None:
            self.reason = "this GPUFeatureStore is closed"

    def fail(self, error: BaseException) -> None:
        """The device has failed for good: every call raises `error` from now on."""
        if self.reason is None:
            self.reason = error

    def fork(self) -> None:
        """The process is a forked child."""
        self.reason = (
            "this GPUFeatureStore was made before a fork and does not work in the new process; "
            "make it where it is used (DataLoader workers need only paths)"
        )
