# SPDX-License-Identifier: MIT
"""What a server does with a client: a small class, the same for every model.

A server makes one object of it for each connection, logs each piece that arrives, hands it to
``received()`` and sends back what that returns::

    class Upper(Service):
        def received(self, piece):
            return piece.upper()

    serve(Upper, listener, model="epoll", log=log)

TCP has no messages: a piece is what has arrived, up to 4,096 bytes (2,880 with a log in record format).
A service that answers lines keeps what is no whole line yet in ``self``.

In the models fork and prefork each connection has a process of its own, so what several clients
share lies in shared memory (``ipckit.SharedMemory`` under an ``ipckit.Lock``); in the others it may lie
anywhere, and under the model thread it needs a lock.
"""

__all__ = ["EchoService", "Service"]


class Service:
    """One client's service; subclass it. The methods must not block in the models with a loop.

    An exception of a method ends that connection, with its traceback in the server's log.
    """

    peer: str = ""
    """who it is: "127.0.0.1:5000", "[::1]:5000", or of a Unix socket "pid 1 uid 0"; set by the server"""
    number: int = 0
    """the number of the connection, from 1, unique within the server"""
    closing: bool = False
    """set it, and the connection is closed after the answer"""

    def started(self) -> bytes:
        """The client has connected: what it is greeted with."""
        return b""

    def received(self, piece: bytes) -> bytes:
        """A piece has arrived, and is in the log: the answer to it, or ``b""`` for none yet."""
        raise NotImplementedError(f"{type(self).__name__} has no received()")

    def finished(self) -> bytes:
        """The client has ended its side, or the server stops: the last answer."""
        return b""


class EchoService(Service):
    """The answer is the piece. The servers do this one in C, without a call of Python."""

    def received(self, piece: bytes) -> bytes:
        return piece
