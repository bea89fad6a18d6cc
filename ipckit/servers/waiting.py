# SPDX-License-Identifier: MIT
"""Clients of a loop that wait for something else than their own socket, and how long.

==============  ==================================  ===============================================
they wait for   which the loop sees by              then
==============  ==================================  ===============================================
room            POLLOUT on the log's pipe           who has waited longest goes first
acknowledgement POLLIN on the log's ``acked``       all go on whose piece is in the file
the client      a look now and then                 it has the last answer: close without a reset
==============  ==================================  ===============================================
"""

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

from ipckit._native import lib
from ipckit._unpatched import os
from ipckit.servers.connection import Connection
from ipckit.servers.loop import READ, WRITE, Loop

__all__ = ["Waiting"]

_MOST = 64  # in a turn, so that the others have theirs
# Between two looks at who lingers; the second one once nothing has come of some looks.
_MOMENT, _LONGEST_MOMENT = 0.001, 0.064
_LOOK_AGAIN = 0.1

GoOn = Callable[[Any, int], None]


class Waiting:
    """Takes clients that need not be looked at for now, and gives them back.

    Args: loop: of the server. log: a LogWriter, or None. go_on: called with a client and what it waits for
        now, as its ``step()`` said.
    """

    def __init__(self, loop: Loop, log: Any, go_on: GoOn) -> None:
        self._loop = loop
        self._native: Any = log.native if log else None
        self._go_on = go_on
        self._for_room: deque[Connection] = deque()
        self._for_log: list[Connection] = []
        self._lingering: list[Connection] = []
        self._moment = _MOMENT
        self._looks_again = False

    def watch(self) -> None:
        """From now on there may be some."""
        if self._native is not None:
            self._loop.watch(self._native.acked, READ, self._acknowledged)

    def add(self, client: Connection, wanted: int) -> None:
        """A client whose step said IK_STEP_LOG, IK_STEP_ACK or IK_STEP_LINGER.

        Raises: OSError ENOSPC, ENOMEM if the loop can't wait for the log; then the client isn't taken.
        """
        if wanted == lib.IK_STEP_LOG:
            if not self._for_room:
                self._loop.watch(self._native.writer, WRITE, self._room)
            self._for_room.append(client)
        elif wanted == lib.IK_STEP_ACK:
            if not self._looks_again:
                self._looks_again = True
                self._loop.after(_LOOK_AGAIN, self._look_again)
            self._for_log.append(client)
        else:
            if not self._lingering:
                self._loop.after(_MOMENT, self._flush)
            self._moment = _MOMENT
            self._lingering.append(client)

    def end_expired(self) -> None:
        """Give back those that a tick has ended while they waited for the log."""
        for waiting in (self._for_room, self._for_log):
            for client in [client for client in waiting if client.native.expired]:
                waiting.remove(client)
                self._go_on(client, client.step())
        if self._native is not None and not self._for_room:
            self._loop.forget(self._native.writer)

    def _room(self, _: int) -> None:
        for _ in range(min(len(self._for_room), _MOST)):
            client = self._for_room[0]
            wanted = client.step()
            if wanted == lib.IK_STEP_LOG:
                return
            self._for_room.popleft()
            self._go_on(client, wanted)
        if not self._for_room:
            self._loop.forget(self._native.writer)

    def _acknowledged(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._native.acked)
        self._ask_log()

    def _look_again(self) -> None:
        """For the logger that was killed when it was about to tell us."""
        self._looks_again = False
        self._ask_log()

    def _ask_log(self) -> None:
        waiting, self._for_log = self._for_log, []
        for client in waiting:
            self._go_on(client, client.step())

    def _flush(self) -> None:
        lingering, self._lingering = self._lingering, []
        for client in lingering:
            if lib.ik_connection_flushed(client.native):
                self._go_on(client, lib.IK_STEP_ENDED)
            else:
                self._lingering.append(client)
        if self._lingering:
            self._moment = min(2 * self._moment, _LONGEST_MOMENT)
            self._loop.after(self._moment, self._flush)
