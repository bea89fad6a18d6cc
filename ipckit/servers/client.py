# SPDX-License-Identifier: MIT
"""The split client: one process reads the keyboard and writes, one reads the socket and prints.

Neither waits for the other, so what is typed is sent at once and what comes is shown at once. ``q`` or
``Q`` alone on a line, or end of file, closes only the sending half: the rest of the answer still comes.
"""

import contextlib
import errno
import math
import socket
from collections.abc import Iterator

from ipckit import sockets
from ipckit._arguments import fileno_of, integer, seconds
from ipckit._unpatched import select, signal
from ipckit.errors import check
from ipckit.process import Child, fork
from ipckit.vectored import writev_all

__all__ = ["run"]

_QUIT = (b"q", b"Q")
_LONGEST_PIECE = 65536


def run(host: str, port: int, *, stdin: int = 0, stdout: int = 1, timeout: float | None = 10.0) -> None:
    """Connect, send what is read from *stdin*, print what comes to *stdout*, until the server closes.

    Args: stdin, stdout: descriptors. timeout: seconds for connecting.
    Raises: OSError: no connection, TimeoutError (ETIMEDOUT), connection reset; BrokenPipeError if *stdout*
        goes away.
    Fork: forks one child, which ends before run() returns.
    """
    stdin, stdout = fileno_of(stdin, "stdin"), fileno_of(stdout, "stdout")
    with _connected(host, integer(port, "port", 1, 65535), timeout) as connection:
        connection.settimeout(None)
        with fork(
            _send_keyboard,
            connection,
            stdin,
            keep=(stdin, connection),
            handlers={signal.SIGINT: signal.SIG_IGN},
        ) as keyboard:
            try:
                _print_answers(connection, keyboard, stdout)
            finally:
                keyboard.kill()  # it may be in the middle of a read from the keyboard


def _connected(host: str, port: int, timeout: float | None) -> socket.socket:
    limit = seconds(timeout)
    try:
        return socket.create_connection((host, port), None if limit == math.inf else limit)
    except TimeoutError:
        check(-errno.ETIMEDOUT, f"connect to {host}:{port}")
        raise


def _send_keyboard(connection: socket.socket, stdin: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other process says so
        for line in _until_quit(stdin):
            sockets.send_all(connection, line)
    with contextlib.suppress(OSError):  # ENOTCONN, after a reset that was noticed by no send
        connection.shutdown(socket.SHUT_WR)


def _until_quit(stdin: int) -> Iterator[bytes]:
    """The lines of *stdin*, as they come, up to one that is only q or Q; very long ones in pieces."""
    with open(stdin, "rb", closefd=False) as keyboard:
        while line := keyboard.readline(_LONGEST_PIECE):
            if line.strip() in _QUIT:
                return
            yield line


def _print_answers(connection: socket.socket, keyboard: Child, stdout: int) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(keyboard, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if keyboard.fileno() in ready:
            poll.unregister(keyboard)
            with contextlib.suppress(OSError):  # done by the child unless it was killed
                connection.shutdown(socket.SHUT_WR)
        if connection.fileno() in ready:
            answer = sockets.recv(connection, 65536)
            if not answer:
                return
            writev_all(stdout, [answer])
