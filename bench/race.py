# SPDX-License-Identifier: MIT
"""Processes that start together: what bench_engine.py measures in.

Each turn has fresh processes, forked from one that opens nothing: libraries with threads (pyzmq,
pynng) or with state of the process (iceoryx2) must be opened after the fork.
"""

import gc
import signal
import time
from array import array
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple

from ipckit import process

PATIENCE = 30.0  # seconds for a turn

Work = Callable[[Callable[[], None]], Any]  # opens its end, says that it is ready, and works


class Failed(Exception):
    """A contender raised or hung; the others go on."""


class Turn(NamedTuple):
    """What one contender did in one round."""

    value: float  # nanoseconds for a message
    took: float  # seconds in all
    samples: array  # nanoseconds of single messages, where those are measured


def race(*works: Work, patience: float = PATIENCE) -> Any:
    """Run each in a process of its own, from when all are ready. Returns: what the first returned.

    Each is started when the one before is ready. They stay until the end, so that nothing they sent
    is dropped at their exit.
    """
    racers = []
    heard: dict[Connection, list[Any]] = {}
    deadline = time.monotonic() + patience
    try:
        for work in works:
            line, their_line = Pipe()
            child = process.fork(_run, work, their_line, die_with_parent=True)
            racers.append((child, line))
            their_line.close()
            heard[line] = []
            _hear(heard, line, deadline)
        for line in heard:
            line.send("go")
        return _hear(heard, racers[0][1], deadline)
    finally:
        for child, line in racers:
            child.kill()
            child.wait()
            child.close()
            line.close()


def _run(work: Work, line: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills us
    gc.disable()  # as timeit does

    def ready() -> None:
        line.send((None, None))
        line.recv()

    try:
        answer = (None, work(ready))
    except BaseException as error:
        answer = (f"{type(error).__name__}: {error}", None)
    line.send(answer)
    signal.pause()


def _hear(heard: dict[Connection, list[Any]], wanted: Connection, deadline: float) -> Any:
    """The next answer on *wanted*. An error on any line is the whole turn's."""
    while not heard[wanted]:
        lines = wait(heard, max(0.0, deadline - time.monotonic()))
        if not lines:
            raise Failed("hung")
        for line in lines:
            try:
                error, result = line.recv()
            except (EOFError, OSError):
                raise Failed("a process ended") from None
            if error:
                raise Failed(error)
            heard[line].append(result)
    return heard[wanted].pop(0)
