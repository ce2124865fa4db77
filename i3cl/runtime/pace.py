"""How long things take, in words, and how long they will still take."""

from __future__ import annotations

import time
from collections.abc import Callable


def duration(seconds: float) -> str:
    """'42 s', '3 min 05 s', '2 h 07 min': for progress lines."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Every:
    """Says yes at most once in so many seconds: when to show progress."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last = time.monotonic()

    def __call__(self) -> bool:
        """Whether the seconds have passed since this was made or last said yes."""
        if time.monotonic() - self._last < self.seconds:
            return False
        self._last = time.monotonic()
        return True


class Sparing:
    """Repeats work, such as writing a growing file, only so often that it takes at most a share of the time."""

    def __init__(self, share: float, seconds: float = 0.0) -> None:
        """share: 0-1; seconds: that pass at least between two times."""
        self.share, self.seconds = share, seconds
        self._next = time.monotonic()

    def __call__(self, work: Callable[[], object], *, always: bool = False) -> bool:
        """Do the work if it is time to, or `always`; says whether it was done."""
        started = time.monotonic()
        if started < self._next and not always:
            return False
        work()
        took = time.monotonic() - started
        self._next = started + max(self.seconds, took / self.share)
        return True


class Pace:
    """Forecasts the end of counted work from the speed since it was made.

    pace, due = Pace(len(files)), Every(10)
    for file in files:
        ...
        pace.done += 1
        if due():
            logger.info("%d of %d, %s", pace.done, pace.total, pace.left())
    """

    def __init__(self, total: float, done: float = 0) -> None:
        """`done` of `total` was done before and does not count for the speed."""
        self.total, self.done = total, done
        self._before = done
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start of the count."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Done per second since the start of the count; 0 before the first."""
        return (self.done - self._before) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Forecast; None while nothing has been done since the start of the count."""
        return (self.total - self.done) / self.rate if self.done > self._before else None

    def left(self) -> str:
        """'3 min 05 s left', or nothing while there is no forecast."""
        seconds = self.seconds_left
        return "" if seconds is None else f"{duration(seconds)} left"
