# SPDX-License-Identifier: MIT
"""The split client: one process reads the keyboard and writes, one reads the socket and prints.

Neither waits for the other, so what is typed is sent at once and what comes is shown at once. ``q`` or
``Q`` alone on a line, or end of file, closes only the sending half: the rest of the answer still comes.

The client does not know what the server answers, but each line that was sent should have an answer. So a
server that closes when fewer lines, and fewer bytes, have come back than were sent has cut the client off.
"""

import contextlib
import errno
import math
import mmap
import socket
from collections.abc import Iterator

from ipckit import sockets
from ipckit._arguments import fileno_of, integer, seconds
from ipckit._unpatched import os, select, signal
from ipckit.errors import check
from ipckit.process import Child, fork
from ipckit.vectored import writev_all

__all__ = ["run"]

_QUIT = (b"q", b"Q")
_LONGEST_PIECE = 65536


class _Amount:
    """How many bytes and lines, counted where another process sees it. The last line may lack its end."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def add(self, piece: bytes) -> None:
        self._memory[0] += len(piece)
        self._memory[1] += piece.count(b"\n")
        self._memory[2] = not piece.endswith(b"\n")

    @property
    def size(self) -> int:
        return self._memory[0]

    @property
    def lines(self) -> int:
        return self._memory[1] + self._memory[2]


def run(
    host: "str | os.PathLike[str]",
    port: int | None = None,
    *,
    stdin: int = 0,
    stdout: int = 1,
    timeout: float | None = 10.0,
) -> None:
    """Connect, send what is read from *stdin*, print what comes to *stdout*, until the server closes.

    Args: host: without *port* the path of a Unix socket. stdin, stdout: descriptors. timeout: seconds for
            connecting.
    Raises: OSError: no connection, TimeoutError (ETIMEDOUT), connection reset, ConnectionAbortedError
        (ECONNABORTED) if the server closes before it has answered; BrokenPipeError if *stdout* goes away.
    Fork: forks one child, which ends before run() returns, and with this process.
    """
    stdin, stdout = fileno_of(stdin, "stdin"), fileno_of(stdout, "stdout")
    sent, answered = _Amount(), _Amount()
    with _connected(host, port, timeout) as connection:
        connection.settimeout(None)
        with fork(
            _send_keyboard,
            connection,
            stdin,
            sent,
            keep=(stdin, connection),
            die_with_parent=True,
            handlers={signal.SIGINT: signal.SIG_IGN},
        ) as keyboard:
            try:
                _print_answers(connection, keyboard, stdout, answered)
            finally:
                keyboard.kill()  # it may be in the middle of a read from the keyboard
    if answered.lines < sent.lines and answered.size < sent.size:
        told = f"closed by the server when {answered.lines} of {sent.lines} lines had come back"
        raise ConnectionAbortedError(errno.ECONNABORTED, told)


def _connected(host: "str | os.PathLike[str]", port: int | None, timeout: float | None) -> socket.socket:
    limit = seconds(timeout)
    allowed = None if limit == math.inf else limit
    try:
        if port is None:
            return _connected_to_file(os.fspath(host), allowed)
        return socket.create_connection((os.fspath(host), integer(port, "port", 1, 65535)), allowed)
    except TimeoutError:
        check(-errno.ETIMEDOUT, f"connect to {host}" + (f":{port}" if port else ""))
        raise


def _connected_to_file(path: str, timeout: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _send_keyboard(connection: socket.socket, stdin: int, sent: _Amount) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other process says so
        for line in _until_quit(stdin):
            sent.add(line)
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


def _print_answers(connection: socket.socket, keyboard: Child, stdout: int, answered: _Amount) -> None:
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
            answered.add(answer)
            writev_all(stdout, [answer])
