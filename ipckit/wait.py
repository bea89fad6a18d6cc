# SPDX-License-Identifier: MIT
"""Deadlines, and waiting for a descriptor: how every ``timeout=`` of ipckit is kept.

A timeout (seconds, ``None`` for ever, ``0`` not at all) becomes one absolute deadline when an
operation starts. All that the operation does counts against it, so it bounds the whole and not
each step. The clock is CLOCK_MONOTONIC: setting the wall clock changes nothing.
"""

import errno
from typing import TYPE_CHECKING

from ipckit._native import lib
from ipckit.errors import check
from ipckit.unpatched import os, select, time

__all__ = ["FOREVER", "NOW", "deadline", "ready", "remaining", "until_ready"]

if TYPE_CHECKING:
    import asyncio

FOREVER: int = lib.IK_FOREVER
NOW: int = lib.IK_NOW
READ: int = select.POLLIN
WRITE: int = select.POLLOUT

# Beyond this a timeout is "for ever"; it keeps the sum below 2**63.
_LONGEST = 100 * 365 * 86400.0


def deadline(timeout: float | None) -> int:
    """The absolute deadline in nanoseconds for *timeout* seconds from now.

    Raises: ValueError for a negative or not-a-number timeout.
    """
    if timeout is None:
        return FOREVER
    if timeout == 0:
        return NOW
    if not timeout > 0:
        raise ValueError(f"timeout must be None or a number of seconds >= 0, not {timeout!r}")
    if timeout > _LONGEST:
        return FOREVER
    return time.monotonic_ns() + int(timeout * 1e9)


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
    while True:
        rc: int = lib.ik_wait_fd(fd, events, deadline_ns)
        if rc != -errno.EINTR:
            return check(rc, what)


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
    own = os.dup(fd)
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
