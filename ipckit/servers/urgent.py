# SPDX-License-Identifier: MIT
"""The textbook's server for urgent data: the urgent byte is answered before the stream.

It echoes what comes, and gives an urgent byte back as an urgent byte, ahead of all the echo that it still
holds: a client that has sent much hears at once. Told of an urgent byte, it reads up to the mark and echoes
nothing meanwhile. The two variants are told in different ways:

``sigurg``: F_SETOWN and SIGURG. The signal comes with the announcement, which may be before the byte; it
comes once for several, and does not say which connection it is about.
``pollpri``: the exceptional condition of poll(2), which stands as long as the byte is there and not read.

TCP has one urgent byte at a time. If a second is announced before the first was read, the first is ordinary
data of the stream, and echoed there. So it is with the answers: who sends several urgent bytes waits for the
answer to each. ``python -m ipckit.servers.urgent [--variant V] [--port N]`` runs it. See tcp(7).
"""

import argparse
import fcntl
import functools
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

from ipckit import sockets
from ipckit._arguments import duration
from ipckit._native import lib
from ipckit._unpatched import os, select, signal, time
from ipckit.servers.listening import endpoint, listen
from ipckit.servers.loop import READ, WRITE
from ipckit.servers.server import Server
from ipckit.signals import blocked

__all__ = ["VARIANTS", "UrgentServer"]

VARIANTS = ("sigurg", "pollpri")

_PIECE = 65536
_MOST = 1 << 21  # echo held for a client; beyond that no more is read, and no urgent byte found
# An urgent byte can't overtake what the kernel has, so that is little: echo is handed over only while less
# than this is unsent. The urgent byte is not held back so: its announcement goes even to a full receiver.
_UNSENT = 16384


class _Client:
    """One connection, and what it is owed."""

    def __init__(self, sock: socket.socket, variant: str, counters: Any) -> None:
        self.sock = sock
        self.urgent = b""
        self.echo = bytearray()
        self.ended = False
        self.told = True  # of an urgent byte; at first it may have come before anybody could be told
        self.moved = time.monotonic()
        self._counters = counters
        self._exceptional: int = select.POLLPRI if variant == "pollpri" else 0
        sock.setblocking(False)
        if variant == "sigurg":
            fcntl.fcntl(sock, fcntl.F_SETOWN, os.getpid())
        # In the stream, first after the mark. Taken out of line and ahead of it, an urgent byte would be
        # read once more in the stream if the next one is announced before the reads have passed its place.
        sockets.set_oobinline(sock, True)
        self._hand_over(_UNSENT)

    def _hand_over(self, unsent: int) -> None:
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent)

    def wanted(self) -> int:
        """The events to wait for."""
        reading = READ | self._exceptional if not self.ended and len(self.echo) < _MOST else 0
        return reading | (WRITE if self.urgent or self.echo else 0)

    def attend(self, events: int) -> bool:
        """A piece of the stream or the urgent byte, then the answers; False when all is done."""
        self.told = (self.told or bool(events & select.POLLPRI)) and bool(events & READ)
        if events & ~WRITE:
            self._receive()
        with suppress(TimeoutError):  # no room for all of it
            self._answer()
        return not self.ended or bool(self.urgent or self.echo)

    def _receive(self) -> None:
        # A read ends at the mark, but one that begins there goes on. There was something to read before we
        # ask for the mark; so if it isn't here, the next byte is an ordinary one, whatever comes meanwhile.
        is_urgent = sockets.at_mark(self.sock)
        with suppress(BlockingIOError):
            piece = sockets.recv(self.sock, 1 if is_urgent else _PIECE, sockets.MSG_DONTWAIT)
            self.ended = not piece
            self.moved = time.monotonic()
            if is_urgent:
                self.urgent, self.told = piece, False
            else:
                self.echo += piece

    def _answer(self) -> None:
        if self.urgent:
            self._hand_over(4 * _UNSENT)
            sockets.send_urgent(self.sock, self.urgent, timeout=0)
            self._hand_over(_UNSENT)
            self.urgent = b""
            self._count(1)
        if self.echo and not self.told:
            sent = sockets.send(self.sock, self.echo[:_UNSENT], timeout=0)
            del self.echo[:sent]
            self._count(sent)

    def _count(self, sent: int) -> None:
        self.moved = time.monotonic()
        self._counters.echoes += 1
        self._counters.bytes += sent


class UrgentServer(Server):
    """Serve all connections in this process, waiting with poll(2), which knows of urgent data.

    Args: variant: see the module. max_connections: 256 if not given. The others: see Server; there is no
        log, and no service but the echo.
    Raises: ValueError for another variant, and with ``sigurg`` from ``serve()`` if another thread than
        the main one calls it.
    """

    model: ClassVar[str] = "urgent"
    most: ClassVar[int] = 256

    def __init__(
        self,
        listeners: "socket.socket | Sequence[socket.socket]",
        *,
        variant: str = "sigurg",
        max_connections: int | None = None,
        idle_timeout: float | None = 60.0,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
        super().__init__(listeners, max_connections=max_connections, idle_timeout=idle_timeout)
        self._variant = variant
        self._idle = duration(idle_timeout, "idle_timeout")
        self._clients: set[_Client] = set()
        self._former: Any = None  # of SIGURG

    def _open(self) -> int:
        return len(self._clients)

    def _begin(self) -> None:
        if self._variant == "sigurg":
            self._former = signal.signal(signal.SIGURG, self._announced) or signal.SIG_DFL
        if self._terms.tick is not None:
            self.loop.every(self._terms.tick, self._tick)

    def _announced(self, *_: object) -> None:
        """SIGURG, for one client or several. Nothing wakes the loop: what is announced will be readable."""
        for client in self._clients:
            client.told = True

    # --- a client's life

    def _arrived(self, listener: socket.socket) -> None:
        client = self._try("accept", lambda: _Client(listener.accept()[0], self._variant, self._counters))
        if client is None:
            return
        self._counters.accepted += 1
        self._clients.add(client)
        self.loop.watch(client.sock, client.wanted(), functools.partial(self._attend, client))
        self._listen()

    def _attend(self, client: _Client, events: int) -> None:
        try:
            end = None if client.attend(events) else lib.IK_END_DONE
        except OSError:  # that costs only itself
            end = lib.IK_END_RESET
        if end is None:
            self.loop.poller.modify(client.sock, client.wanted())
        else:
            self._close(client, end)

    def _close(self, client: _Client, end: int) -> None:
        self._counters.ends[end] += 1
        self._clients.remove(client)
        self.loop.forget(client.sock)
        client.sock.close()
        self._freed()

    def _tick(self) -> None:
        latest = time.monotonic() - self._idle
        for client in [client for client in self._clients if client.moved <= latest]:
            self._close(client, lib.IK_END_IDLE)

    # --- the end

    def _end(self, deadline: float) -> None:
        for client in self._clients:
            with suppress(OSError):  # reset already
                client.sock.shutdown(socket.SHUT_RD)  # what has come is still read, then the end
        while self._clients and time.monotonic() < deadline:
            self.loop.turn(deadline)
        for client in list(self._clients):
            self._close(client, lib.IK_END_CUT)
        if self._former is not None:
            signal.signal(signal.SIGURG, self._former)


def main() -> None:
    """Serve as the command line says, until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m ipckit.servers.urgent")
    parser.add_argument("--variant", choices=VARIANTS, default="sigurg")
    parser.add_argument("--port", type=int, default=7007, help="0 takes a free one and prints it")
    options = parser.parse_args()
    with blocked([signal.SIGTERM, signal.SIGINT]), listen(port=options.port) as listener:
        print(f"listening on {endpoint(listener)}", flush=True)
        UrgentServer(listener, variant=options.variant).serve()


if __name__ == "__main__":
    main()
