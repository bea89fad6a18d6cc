# SPDX-License-Identifier: MIT
"""The textbook's iterative server: one client at a time. The baseline: it shows why the others exist.

::

    listen -> loop: accept -> serve that client until its end -> close -> the next one

All others wait in the backlog, behind a client that says nothing too: until its ``idle_timeout``, where the
server of the textbook waits for ever. Signals, deadlines and the logger are seen to while it serves.
"""

import socket
from typing import Any, ClassVar

from ipckit.servers.multiplex import MultiplexServer

__all__ = ["IterativeServer"]


class IterativeServer(MultiplexServer):
    """Serve one connection at a time, in this process.

    Args: as MultiplexServer's, but that ``max_connections`` is 1.
    """

    model: ClassVar[str] = "iterative"
    most: ClassVar[int] = 1

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_connections = 1

    def _arrived(self, listener: socket.socket) -> None:
        self._accept(listener)
        self._listen()  # no more: there is a client
        while self._open() and not self._stopping:
            self.loop.turn()
