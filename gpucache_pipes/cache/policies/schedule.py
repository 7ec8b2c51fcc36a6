"""When a pipeline makes its requests."""


class Schedule:
    """The rhythm of one pipeline among all that share a store, in requests of all of them.

    Nobody announces how pipelines take turns, but they do so regularly, whether batch by batch or
    epoch by epoch. One that is silent for longer than it ever was is taken to stay silent for as
    long again; so what it left behind goes in time.
    """

    def __init__(self, now: int) -> None:
        self.requests = 0
        # In the last epoch that was not cut short.
        self.length = 0
        # All requests for each of its own, while it is at work.
        self._stretch = 1.0
        # From the end of an epoch to the first request of the next; the longest silence within.
        self.pause: int | None = None
        self._longest = 0
        self._begun = self._last = now
        self._ended: int | None = None

    def begin_epoch(self, now: int) -> None:
        """It begins a new pass over its data, when `now` requests have been made by all."""
        if 2 * self.requests >= self.length:
            self.length = self.requests
        if self.requests:
            self._ended = self._last
        self.requests = 0
        self._last = now

    def request(self, now: int, count: int) -> None:
        """It makes so many requests."""
        if not count:
            return
        if self.requests:
            self._longest = max(self._longest, now - self._last)
        else:
            self._begun = now
            if self._ended is not None:
                self.pause = now - self._ended
        self.requests += count
        self._last = now + count
        if 8 * self.requests >= self.length:
            self._stretch = (self._last - self._begun) / self.requests

    def lasts(self, requests: float) -> float:
        """How long it takes to so many requests of its own, pauses left out."""
        return requests * self._stretch

    @property
    def begun(self) -> bool:
        """Whether it has ever requested anything."""
        return bool(self.requests or self.length)

    @property
    def epoch(self) -> float:
        """How long an epoch takes, pauses left out."""
        return self.lasts(max(self.length, self.requests))

    def silence(self, now: int) -> int:
        """What others have requested since its last request."""
        return now - self._last

    def resumes(self, now: int, pause: float, rest: float, others: float) -> float:
        """When it makes its next request, which is at once unless it is another's turn.

        It has `rest` requests left in its epoch, and makes a `pause` between epochs; others need
        `others` for theirs.
        """
        silence = self.silence(now)
        if rest > 0:
            return silence if silence > 2 * self._longest else 0
        if self.pause is None:
            return max(silence, others)
        return silence if silence > 2 * pause else max(pause - silence, 0)
