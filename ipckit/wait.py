# SPDX-License-Identifier: MIT
"""Deadlines, and waiting for a descriptor: how every ``timeout=`` of ipckit is kept.

A timeout (seconds, ``None`` for ever, ``0`` not at all) becomes one absolute deadline when an
operation starts: by ``deadline()``, which is in C, where the compiled verbs have it too. All that the
operation does counts against it, so it bounds the whole and not each step. The clock is CLOCK_MONOTONIC:
setting the wall clock changes nothing.
"""

import errno
import math
from typing import TYPE_CHECKING

from ipckit._arguments import deadline, fileno_of
from ipckit._native import lib
from ipckit._unpatched import os, select, time
from ipckit.errors import check

__all__ = ["FOREVER", "NOW", "deadline", "polled", "ready", "remaining", "until_ready"]

if TYPE_CHECKING:
    import asyncio

FOREVER: int = lib.IK_FOREVER
NOW: int = lib.IK_NOW
READ: int = select.POLLIN
WRITE: int = select.POLLOUT

_LONGEST_POLL = 86400.0  # seconds; poll(2) takes an int of milliseconds


def remaining(deadline_ns: int) -> float | None:
    """Seconds left until the deadline (None: for ever), never below 0."""
    if deadline_ns == FOREVER:
        return None
    if deadline_ns == NOW:
        return 0.0
    return max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)


def until_ready(fd: int, events: int, deadline_ns: int, what: object = None) -> int:
    """Block until poll(2) reports one of *events*, an error or a hang-up on *fd*.

    Returns: the events that poll reported.
    Raises: TimeoutError (ETIMEDOUT) at the deadline; OSError EBADF for a closed descriptor.
    Signals: their Python handlers run, then the wait goes on against the same deadline.
    """
    number = fileno_of(fd)
    while True:
        rc: int = lib.ik_wait_fd(number, events, deadline_ns)
        if rc != -errno.EINTR:
            return check(rc, what)


def polled(poller: "select.poll", deadline_ns: int) -> "list[tuple[int, int]]":
    """What is ready of all that *poller* holds; block until something is, or the deadline has come."""
    while True:
        left = remaining(deadline_ns)
        ready = poller.poll(None if left is None else math.ceil(min(left, _LONGEST_POLL) * 1000))
        if ready or left == 0:
            return ready


def _set(event: "asyncio.Future[None]") -> None:
    if not event.done():
        event.set_result(None)


async def ready(fd: int, events: int, deadline_ns: int, what: object = None) -> None:
    """As until_ready(), for asyncio: only the calling task waits.

    The wait is on a duplicate, so that several tasks may wait for one descriptor at a time and a
    descriptor closed by another task can't be mistaken for its successor of the same number.
    """
    import asyncio  # here, because it is large and most programs never come here

    loop = asyncio.get_running_loop()
    event: asyncio.Future[None] = loop.create_future()
    own = os.dup(fileno_of(fd))
    add, remove = (
        (loop.add_writer, loop.remove_writer) if events & WRITE else (loop.add_reader, loop.remove_reader)
    )
    try:
        add(own, _set, event)
        try:
            await asyncio.wait_for(event, remaining(deadline_ns))
        except asyncio.TimeoutError:
            check(-errno.ETIMEDOUT, what)
        finally:
            remove(own)
    finally:
        os.close(own)
