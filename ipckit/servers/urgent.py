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
import logging
import math
import socket
from contextlib import suppress

from ipckit import sockets
from ipckit._arguments import INT_MAX, duration, integer
from ipckit._unpatched import os, select, signal, time
from ipckit.servers.listening import endpoint, listen
from ipckit.servers.loop import delay
from ipckit.signals import SignalQueue, blocked

__all__ = ["VARIANTS", "UrgentServer"]

VARIANTS = ("sigurg", "pollpri")

_PIECE = 65536
_MOST = 1 << 21  # echo held for a client; beyond that no more is read, and no urgent byte found
# An urgent byte can't overtake what the kernel has, so that is little: echo is handed over only while less
# than this is unsent. The urgent byte is not held back so: its announcement goes even to a full receiver.
_UNSENT = 16384
_PAUSE = 1.0
_LONGEST_POLL = 3600.0  # poll(2) takes an int of milliseconds

_log = logging.getLogger(__name__)


class _Client:
    """One connection, and what it is owed."""

    def __init__(self, sock: socket.socket, variant: str) -> None:
        self.sock = sock
        self.urgent = b""
        self.echo = bytearray()
        self.ended = False
        self.told = True  # of an urgent byte; at first it may have come before anybody could be told
        self.moved = time.monotonic()
        self._exceptional = select.POLLPRI if variant == "pollpri" else 0
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
        reading = select.POLLIN | self._exceptional if not self.ended and len(self.echo) < _MOST else 0
        return reading | (select.POLLOUT if self.urgent or self.echo else 0)

    def attend(self, events: int) -> bool:
        """A piece of the stream or the urgent byte, then the answers; False when all is done."""
        self.told = (self.told or bool(events & select.POLLPRI)) and bool(events & select.POLLIN)
        if events & ~select.POLLOUT:
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
            self.moved = time.monotonic()
        if self.echo and not self.told:
            del self.echo[: sockets.send(self.sock, self.echo[:_UNSENT], timeout=0)]
            self.moved = time.monotonic()


class UrgentServer:
    """Serve *listener*'s connections, all in one process.

    Args: listener: a listening TCP socket; made non-blocking, closed at the stop. variant: see the module.
        max_connections: at that many at a time the next ones wait in the backlog.
        idle_timeout: seconds after which a client that sends and takes nothing is closed; None: never.
    Raises: ValueError for another variant or a number out of range.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        variant: str = "sigurg",
        max_connections: int = 256,
        idle_timeout: float | None = 60.0,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
        self._listener = listener
        self._variant = variant
        self._max_connections = integer(max_connections, "max_connections", 1, INT_MAX)
        self._idle = duration(idle_timeout, "idle_timeout")
        self._clients: set[_Client] = set()
        self._paused_until = 0.0
        self._stop_at = math.inf

    def serve(self, *, stop_timeout: float | None = 5.0) -> None:
        """Serve until SIGTERM or SIGINT; then accept no more, answer what has come, return.

        Who has not taken the answers after *stop_timeout* seconds is cut off. Call it in the main thread,
        before others start: both signals and SIGURG are blocked meanwhile and taken by a descriptor.
        """
        patience = delay(stop_timeout, "stop_timeout")
        self._listener.setblocking(False)
        with SignalQueue([signal.SIGTERM, signal.SIGINT, signal.SIGURG]) as signals, self._listener:
            try:
                while self._stop_at == math.inf or (self._clients and time.monotonic() < self._stop_at):
                    self._turn(signals, patience)
            finally:
                while self._clients:
                    self._clients.pop().sock.close()

    def _turn(self, signals: SignalQueue, stop_timeout: float) -> None:
        ready = self._wait(signals)
        if signals.fileno() in ready:
            self._signalled({info.signo for info in signals.recv_many(timeout=0)}, stop_timeout)
        if self._listener.fileno() in ready:
            self._accept()
        for client in list(self._clients):
            if not self._goes_on(client, ready.get(client.sock.fileno(), 0)):
                self._clients.remove(client)
                client.sock.close()
                self._paused_until = 0.0  # now there is one of what was short

    def _wait(self, signals: SignalQueue) -> dict[int, int]:
        """The descriptors that are ready, each with its events."""
        now = time.monotonic()
        moments = [self._stop_at, *(client.moved + self._idle for client in self._clients)]
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        for client in self._clients:
            poll.register(client.sock, client.wanted())
        if now < self._paused_until:
            moments.append(self._paused_until)
        elif self._stop_at == math.inf and len(self._clients) < self._max_connections:
            poll.register(self._listener, select.POLLIN)
        return dict(poll.poll(1000 * min(max(0.0, min(moments) - now), _LONGEST_POLL)))

    def _signalled(self, signals: set[int], stop_timeout: float) -> None:
        for client in self._clients:
            if signal.SIGURG in signals:  # for one of them, or several
                client.told = True
            if signals - {signal.SIGURG}:
                with suppress(OSError):  # reset already
                    client.sock.shutdown(socket.SHUT_RD)  # what has come is still read, then the end
        if signals - {signal.SIGURG}:
            self._stop_at = min(self._stop_at, time.monotonic() + stop_timeout)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # the client has gone again
            return
        except OSError as error:  # of that connection, or out of descriptors or memory: others may do, later
            _log.warning("accept: %s; new connections wait", error)
            self._paused_until = time.monotonic() + _PAUSE
            return
        connection.setblocking(False)
        self._clients.add(_Client(connection, self._variant))

    def _goes_on(self, client: _Client, events: int) -> bool:
        """See to *client* if there is anything to do; False when it is to be closed."""
        try:
            going = client.attend(events) if events or client.told else True
        except OSError:  # reset: that costs only itself
            return False
        return going and time.monotonic() < client.moved + self._idle


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
