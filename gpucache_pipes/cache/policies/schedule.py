"""When a pipeline makes its requests."""


class Schedule:
    """The schedule of one pipeline among all that share a store.

    All times and durations are counted in requests of all pipelines.

    Pipelines do not announce how they take turns, but they do so regularly, batch by batch or epoch
    by epoch. A pipeline that is silent for longer than ever before is expected to stay silent for
    as long again, so that its keys are evicted in time.

    Args:
        now: the time at which the pipeline appears.

    Attributes:
        requests: the number of its own requests in this epoch.
        epoch_length: the number of its own requests in the last epoch that was not cut short.
        pause: the time from the end of an epoch to the first request of the next one, or None
            before this has been seen.
    """

    def __init__(self, now: int) -> None:
        self.requests = 0
        self.epoch_length = 0
        self.pause: int | None = None
        # Requests of all pipelines for each of its own, within an epoch.
        self._requests_per_own = 1.0
        self._longest_silence = 0  # within an epoch
        self._epoch_start = self._last_request = now
        self._epoch_end: int | None = None

    def begin_epoch(self, now: int) -> None:
        """The pipeline begins a new pass over its data at time `now`."""
        if 2 * self.requests >= self.epoch_length:
            self.epoch_length = self.requests
        if self.requests:
            self._epoch_end = self._last_request
        self.requests = 0
        self._last_request = now

    def request(self, now: int, count: int) -> None:
        """The pipeline makes `count` requests, the first one at time `now`."""
        if not count:
            return
        if self.requests:
            self._longest_silence = max(self._longest_silence, now - self._last_request)
        else:
            self._epoch_start = now
            if self._epoch_end is not None:
                self.pause = now - self._epoch_end
        self.requests += count
        self._last_request = now + count
        if 8 * self.requests >= self.epoch_length:
            self._requests_per_own = (self._last_request - self._epoch_start) / self.requests

    def duration(self, requests: float) -> float:
        """The time that the pipeline takes for this many requests of its own, without pauses."""
        return requests * self._requests_per_own

    @property
    def has_requested(self) -> bool:
        """Whether the pipeline has ever made a request."""
        return bool(self.requests or self.epoch_length)

    @property
    def epoch_duration(self) -> float:
        """The time that an epoch takes, without pauses."""
        return self.duration(max(self.epoch_length, self.requests))

    def silence(self, now: int) -> int:
        """The time since its last request."""
        return now - self._last_request

    def time_until_next(self, now: int, pause: float, remaining: float, others: float) -> float:
        """The estimated time until its next request: 0 unless it is another pipeline's turn.

        Args:
            now: the current time.
            pause: the duration of its pause between two epochs.
            remaining: the number of requests left in its epoch.
            others: the time that the other pipelines need for the rest of their epochs.
        """
        silence = self.silence(now)
        if remaining > 0:
            return silence if silence > 2 * self._longest_silence else 0
        if self.pause is None:
            return max(silence, others)
        return silence if silence > 2 * pause else max(pause - silence, 0)
