# SPDX-License-Identifier: MIT
"""What a pool of processes and its supervisor know of each other: scoreboard, bell, events, back-off."""

import heapq
from collections.abc import Iterator
from typing import Any, NamedTuple

from ipckit._native import ffi, lib
from ipckit._unpatched import os, time
from ipckit.memory import SharedMemory

__all__ = ["Backoff", "Client", "Events", "Scoreboard"]

_FIRST_WAIT, _LONGEST_WAIT = 0.01, 10.0
_MOST_CRASHES = 10
_EVENT = ffi.sizeof("ik_prefork_event")


class Client(NamedTuple):
    """Whom a worker serves."""

    number: int
    peer: str


def _client(native: Any) -> Client:
    return Client(native.number, ffi.string(native.peer).decode())


class Scoreboard:
    """In shared memory, a place for each worker: what it does, and its connection.

    A worker writes its own place, and rings the bell when fewer than *least_idle* are idle.
    """

    def __init__(self, places: int, least_idle: int) -> None:
        self.memory = SharedMemory(lib.ik_prefork_board_size(places))
        self._shared = ffi.from_buffer(self.memory.buf)
        self.native = ffi.cast("ik_prefork_board *", self._shared)
        self.native.n_places, self.native.least_idle = places, least_idle
        self._places = lib.ik_prefork_places(self.native)
        self._states = lib.ik_prefork_states(self.native)
        self._free = list(range(places))  # a heap

    def take(self) -> int:
        """The lowest free place, for a worker that starts."""
        index = heapq.heappop(self._free)
        place = self.place(index)
        place.served = place.connection.number = 0
        self._states[index] = lib.IK_PREFORK_STARTING
        return index

    def free(self, index: int) -> None:
        """The worker of that place has ended."""
        self._states[index] = lib.IK_PREFORK_NOBODY
        heapq.heappush(self._free, index)

    def place(self, index: int) -> Any:
        return self._places + index

    def client(self, index: int) -> Client | None:
        """Whom the worker of that place serves, or served when it died."""
        connection = self._places[index].connection
        return _client(connection) if connection.number else None

    def waits(self, index: int) -> bool:
        """That worker waits for a client (one that only starts does not yet)."""
        return bool(self._states[index] == lib.IK_PREFORK_IDLE)

    def look(self) -> int:
        """Have the bell rung for what comes from now on; how many wait, or will in a moment."""
        return int(lib.ik_prefork_look(self.native))

    def busy(self) -> int:
        return int(lib.ik_prefork_busy(self.native))


class Events:
    """The pipe through which workers tell how connections began and ended."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._reader = open(reader, "rb", buffering=0)  # noqa: SIM115 - until close()

    def fileno(self) -> int:
        return self._reader.fileno()

    def __iter__(self) -> "Iterator[tuple[Client, int]]":
        """Those that are there, each with its end, or IK_END_OPEN if it began."""
        while told := self._reader.read(_EVENT * 256):
            for one in ffi.from_buffer("ik_prefork_event[]", told):
                yield _client(one), one.end

    def close(self) -> None:
        os.close(self.writer)
        self._reader.close()


class Backoff:
    """How long to wait before a worker that died is replaced, and when to give up.

    Not at all, if it lived for a second or a connection has ended in order since the one before it
    died. Else 10 ms, doubled with each such death in a row, at most 10 s; ten of them are the end.
    """

    def __init__(self) -> None:
        self.crashes = 0
        """in a row"""
        self._served = 0
        self._until = 0.0

    def died(self, served: int, born: float) -> None:
        """Workers did, the oldest of them born then; so many connections have ended in order.

        Raises: RuntimeError when there is no sense in another one.
        """
        if self.forgives(served, born):
            return
        self.crashes += 1
        if self.crashes >= _MOST_CRASHES:
            raise RuntimeError(f"workers died at once {self.crashes} times in a row, and nobody was served")

    def forgives(self, served: int, born: float) -> bool:
        """A worker that was born then lives, or did until now: the row ends if that one was of use."""
        of_use = served != self._served or time.monotonic() - born > 1
        self._served = served
        if of_use:
            self.crashes = 0
        return of_use

    def hold(self) -> float:
        """Seconds to wait, from now on."""
        wait: float = min(_FIRST_WAIT * 2 ** (self.crashes - 1), _LONGEST_WAIT)
        self._until = time.monotonic() + wait
        return wait

    def holds(self) -> bool:
        return self.crashes > 0 and time.monotonic() < self._until
