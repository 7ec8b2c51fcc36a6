"""When a pipeline makes its requests."""


class Clock:
    """The time of all pipelines that share a store, counted in their requests.

    Attributes:
        now: the number of requests so far.
        longest: the time that the longest epoch of a pipeline has taken.
    """

    now = longest = 0


class Schedule:
    """The schedule of one pipeline among all that share a store.

    Pipelines do not announce how they take turns, but they do so regularly, batch by batch or epoch
    by epoch. A pause that has not been seen yet is expected to last for the longest epoch of a
    pipeline, or for as long again as it has lasted.

    Args:
        clock: the time. A schedule begins when it is made.

    Attributes:
        requests: the number of its own requests in this epoch.
        busy: the time that the longer one of the last epoch and this one has taken.
        pause: the time between the end of the last epoch and this one; None in the first epoch.
        period: the time from the first request of the last epoch to that of this one; in the first
            epoch, the time that it has taken so far.
    """

    def __init__(self, clock: Clock) -> None:
        self.requests = self.busy = self.period = 0
        self.pause: int | None = None
        self._clock = clock
        self._begin = self._end = clock.now
        self._last_length = 0
        # Requests of all pipelines for each of its own, within an epoch.
        self._pace = 1.0

    def begin_epoch(self) -> None:
        """The pipeline begins a new pass over its data."""
        self._last_length = self.requests or self._last_length
        self.requests = 0

    def request(self, count: int) -> None:
        """The pipeline makes `count` requests; the clock has not counted them yet."""
        now = self._clock.now
        if not self.requests:
            if self._last_length:
                self.pause, self.period = now - self._end, now - self._begin
                self.busy = self._end - self._begin
            self._begin = now
        self.requests += count
        self._end = now + count
        elapsed = self._end - self._begin
        self.busy = max(self.busy, elapsed)
        if self.pause is None:
            self.period = elapsed
        if 8 * self.requests >= self._last_length:
            self._pace = elapsed / (self.requests or 1)

    @property
    def silence(self) -> int:
        """The time since its last request."""
        return self._clock.now - self._end

    def time_until(self, ahead: int, left: int) -> float:
        """The estimated time until it makes a request.

        Args:
            ahead: how many of its own requests come before that.
            left: how many of these belong to this epoch.
        """
        if ahead < left:
            return ahead * self._pace
        pause, silence = self.pause, self.silence if not left else 0
        if pause is None:
            pause = self._clock.longest if silence < self._clock.longest else 2 * silence
        return ahead * self._pace + max(pause - silence, 0)
