# SPDX-License-Identifier: MIT
"""One wait for all that a server waits for: descriptors, each with a function, and moments.

The poller is ``select.poll()``, ``select.epoll()`` or one like them: what has ``register``, ``modify``,
``unregister`` and ``poll``, with the events of poll(2). It is not one of ``selectors``, whose ``select()``
makes a list of keys, in Python, of what the kernel gave: a tenth to a fifth more of the processor for each
echo of the epoll server. Nor do they know of urgent data.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from ipckit import _arguments
from ipckit._arguments import Descriptor, fileno_of
from ipckit._unpatched import select, time

__all__ = ["READ", "WRITE", "Handler", "Loop", "delay"]

READ: int = select.POLLIN
WRITE: int = select.POLLOUT

Handler = Callable[[int], object]

_LONGEST = 3600.0  # poll(2) counts in an int of milliseconds


def delay(value: float | None, name: str) -> float:
    """Seconds that can be added to the clock: for ever is 30 years. Raises: as seconds()."""
    return min(_arguments.seconds(value, name), 1e9)


class Loop:
    """Calls the function of each descriptor that is ready, and of each moment that has come.

    Args: poller: see the module; its ``poll()`` counts in seconds. None: select.poll(): no limit on the
        numbers of descriptors, each wait looks at all of them.
    """

    def __init__(self, poller: Any = None) -> None:
        self.poller: Any = select.poll() if poller is None else poller
        self._per_second = 1000 if poller is None else 1  # poll(2) is the one that counts in milliseconds
        self.handlers: dict[int, Handler] = {}
        """the function of each descriptor, called with its events"""
        self._resting: set[int] = set()
        self._moments: list[tuple[float, int, float | None, Callable[[], object]]] = []
        self._order = itertools.count()

    def watch(self, source: Descriptor, events: int, handler: Handler) -> None:
        """Call ``handler(events)`` whenever *source* is ready for one of *events*, fails or hangs up."""
        fd = fileno_of(source, "source")
        if fd in self._resting:
            self.poller.modify(fd, events)
            self._resting.remove(fd)
        else:
            self.poller.register(fd, events)
        self.handlers[fd] = handler

    def watches(self, source: Descriptor) -> bool:
        return fileno_of(source, "source") in self.handlers

    def forget(self, source: Descriptor) -> None:
        """End watch(), before the descriptor is closed."""
        fd = fileno_of(source, "source")
        if self.handlers.pop(fd, None) is not None or fd in self._resting:
            self._resting.discard(fd)
            self.poller.unregister(fd)

    def rest(self, source: Descriptor) -> None:
        """End watch() for a moment: *source* keeps its place, for which there may be no memory then."""
        fd = fileno_of(source, "source")
        if self.handlers.pop(fd, None) is not None:
            self.poller.modify(fd, 0)
            self._resting.add(fd)

    def close(self) -> None:
        """Forget all; close the poller, if it is a descriptor itself."""
        self.handlers.clear()
        self._moments.clear()
        if hasattr(self.poller, "close"):
            self.poller.close()

    def after(self, seconds: float, handler: Callable[[], object]) -> None:
        """Call ``handler()`` once, so many seconds from now."""
        self._push(time.monotonic() + delay(seconds, "seconds"), None, handler)

    def every(self, seconds: float, handler: Callable[[], object]) -> None:
        """Call ``handler()`` again and again, after so many seconds each, which are more than 0."""
        period = min(_arguments.duration(seconds, "seconds"), 1e9)
        self._push(time.monotonic() + period, period, handler)

    def _push(self, when: float, period: float | None, handler: Callable[[], object]) -> None:
        heapq.heappush(self._moments, (when, next(self._order), period, handler))

    def turn(self, until: float | None = None) -> None:
        """Wait until something is ready or a moment has come (or *until* has), and call what is due."""
        handlers = self.handlers
        for fd, events in self.poller.poll(self._patience(until)):
            handler = handlers.get(fd)
            if handler is not None:  # not forgotten by one that came before it
                handler(events)
        if self._moments:
            self._run_moments()

    def wake(self) -> None:
        """Have turn() return after what it does now; a loop that turns by itself wouldn't."""

    def _patience(self, until: float | None) -> float | None:
        first = self._moments[0][0] if self._moments else None
        if until is None or (first is not None and first < until):
            until = first
        if until is None:
            return None
        # Not a hair too early, or the loop would turn until the moment has come.
        seconds = max(0.0, until - time.monotonic()) + 1e-4
        return min(seconds, _LONGEST) * self._per_second

    def _run_moments(self) -> None:
        now = time.monotonic()
        while self._moments and self._moments[0][0] <= now:
            _, _, period, handler = heapq.heappop(self._moments)
            if period is not None:
                self._push(now + period, period, handler)
            handler()
