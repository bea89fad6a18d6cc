# SPDX-License-Identifier: MIT
"""The textbook's multiplexing server: one process, one wait for all of its descriptors.

::

    listen -> loop: wait until some are ready -> the listener: accept, and wait for that client too
                                              -> a client: receive a piece, log it, send it back
                                              -> the keyboard: print the line; quit ends the server

A client that is ready gets one piece served, then the others have their turn: nobody is read until its
end of file while the rest wait. What can't be sent at once is kept, and nothing more is read from that
client until it has taken it. Nothing here waits but the loop. What it waits with is the difference
between the models select, poll and epoll.
"""

import functools
import logging
import socket
from collections.abc import Sequence
from typing import Any

from ipckit._arguments import Descriptor
from ipckit._native import lib
from ipckit._unpatched import time
from ipckit.messagelog import MessageLog
from ipckit.servers.connection import Connection, new_block
from ipckit.servers.keyboard import Keyboard
from ipckit.servers.loop import READ, WRITE
from ipckit.servers.server import Server
from ipckit.servers.waiting import Waiting

__all__ = ["MultiplexServer"]

# In a turn, so that a rush of new clients doesn't keep those that are served waiting.
_ACCEPTS = 16

_log = logging.getLogger("ipckit.servers")


class _Client(Connection):
    """A connection, and what the loop looks for on its behalf."""

    __slots__ = ("fd", "server", "waits_for")

    fd: int
    server: "MultiplexServer"
    waits_for: int
    """as step() said: READ, WRITE, or something else than its socket"""

    def ready(self, _: int) -> None:
        """Its turn: a piece at the most."""
        wanted = self.step()
        if wanted != self.waits_for:
            self.server._wait_for(self, wanted)


class MultiplexServer(Server):
    """Serve all connections in this process, a piece at a time.

    Args: keyboard: a file or descriptor, such as ``sys.stdin``: each line that is typed is printed,
        ``quit`` ends the server, end of file is the end of the keyboard only. One that can't be waited
        for (with epoll a file, or /dev/null) is left out. None: no keyboard.
        The others: see Server.
    """

    def __init__(
        self,
        listeners: "socket.socket | Sequence[socket.socket]",
        log: MessageLog | None = None,
        *,
        keyboard: "Descriptor | None" = None,
        **options: Any,
    ) -> None:
        super().__init__(listeners, log, **options)
        self._keyboard = None if keyboard is None else Keyboard(keyboard, self.loop, self.stop)
        self._block = new_block()  # one for all, because they take turns
        self._clients: set[_Client] = set()
        self._waiting = Waiting(self.loop, log, self._wait_for)

    def _open(self) -> int:
        return len(self._clients)

    def _begin(self) -> None:
        if self._keyboard is not None:
            self._keyboard.watch()
        self._waiting.watch()
        if self._terms.tick is not None:
            self.loop.every(self._terms.tick, self._tick)

    # --- a client's life

    def _arrived(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            if not self._accept(listener):
                break
            if self._is_full():
                self._listen()  # no more
                break

    def _is_full(self) -> bool:
        return len(self._clients) == self._max_connections

    def _accept(self, listener: socket.socket) -> bool:
        client = self._try("accept", lambda: _Client.accept(self._terms, listener, self._block))
        if client is None:
            return False
        client.fd, client.server, client.waits_for = client.fileno(), self, 0
        self._clients.add(client)
        if not self._can_watch(client.fd):
            self._wait_for(client, lib.ik_connection_abort(client.native, lib.IK_END_REFUSED))
            return True
        self._started(client)
        wanted = client.start()
        if wanted == READ:  # most have sent something by now
            wanted = client.step()
        self._wait_for(client, wanted)
        return True

    def _can_watch(self, fd: int) -> bool:
        """Whether a client may have that descriptor."""
        return True

    def _wait_for(self, client: _Client, wanted: int) -> None:
        """Have the loop look for what the client waits for now, or end it."""
        # epoll_ctl(2) fails when the memory or the user's watches are all in use.
        if not self._try("wait for a client", functools.partial(self._watch_for, client, wanted)):
            self._watch_for(client, lib.ik_connection_abort(client.native, lib.IK_END_NO_MEMORY))

    def _watch_for(self, client: _Client, wanted: int) -> bool:
        watched = self.loop.watches(client.fd)
        client.waits_for = wanted
        if wanted in (READ, WRITE):
            if watched:
                self.loop.poller.modify(client.fd, wanted)
            else:
                self.loop.watch(client.fd, wanted, client.ready)
            return True
        if watched:  # or that it hangs up would wake us again and again
            self.loop.forget(client.fd)
        if wanted == lib.IK_STEP_ENDED:
            self._close(client)
        else:
            self._waiting.add(client, wanted)
        return True

    def _close(self, client: _Client) -> None:
        was_full = self._is_full()
        self._clients.remove(client)
        client.close()
        if _log.isEnabledFor(logging.INFO):  # or the names would be made for nothing
            self._ended(client.number, client.peer, client.end)
        if was_full or self._paused:
            self._freed()

    def _tick(self) -> None:
        now = time.monotonic_ns()
        for client in self._clients:
            lib.ik_connection_tick(client.native, now)
        self._waiting.end_expired()

    # --- the end

    def _end(self, deadline: float) -> None:
        for client in self._clients:
            lib.ik_connection_stop(client.native)
        while self._clients and time.monotonic() < deadline:
            # What has come is here: one that would be waited for to send has its last turn at once.
            readers = [client for client in self._clients if client.waits_for == READ]
            for client in readers:
                client.ready(READ)
            self.loop.turn(time.monotonic() if readers else deadline)
        for client in list(self._clients):
            self._cut(client)

    def _cut(self, client: _Client) -> None:
        lib.ik_connection_cut(client.native)
        if client.waits_for == lib.IK_STEP_LINGER:
            lib.ik_connection_flushed(client.native)  # cut, unless it has all of its answer
        self._wait_for(client, lib.IK_STEP_ENDED)
