# SPDX-License-Identifier: MIT
"""The urgent byte is answered before the stream, once by SIGURG and once by POLLPRI."""

import fcntl
import os
import select
import signal
import socket

import ipckit
from ipckit import sockets
from ipckit.servers.listening import listen
from ipckit.servers.urgent import VARIANTS, UrgentServer


def serve(listener: socket.socket, variant: str) -> None:
    UrgentServer(listener, variant=variant).serve()


def until_urgent(connection: socket.socket) -> tuple[bytes, int]:
    """Read the echo until the urgent byte is there: the byte, and how much of the echo came before."""
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLPRI)
    echoed = 0
    while True:
        for _, events in poll.poll(10_000):
            if events & select.POLLPRI:  # first, or the next read would go past it
                return sockets.recv_urgent(connection), echoed
            echoed += len(sockets.recv(connection, 4096))


stream = bytes(1 << 20)
for variant in VARIANTS:
    with listen() as listener, ipckit.fork(serve, listener, variant, keep=[listener]) as server:
        with socket.create_connection(listener.getsockname()) as connection:
            with ipckit.SignalQueue([signal.SIGURG]) as signals:
                fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
                sockets.send_all(connection, stream)
                sockets.send_urgent(connection, b"?")
                signals.recv(timeout=10)
                print(f"{variant}: the answer is announced, and nothing of the echo is read")
            answer, echoed = until_urgent(connection)
            print(f"{variant}: it is {answer}, in the first quarter: {echoed < len(stream) / 4}")
            echoed += len(sockets.recv_exact(connection, len(stream) - echoed, timeout=10))
            print(f"{variant}: then the rest of the {echoed} bytes")
        server.terminate()
    print(f"{variant}: {server.status}")
