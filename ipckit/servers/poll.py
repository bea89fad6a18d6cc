# SPDX-License-Identifier: MIT
"""The multiplexing server on poll(2).

poll(2) is given a list of descriptors with each wait, and the kernel looks at every one of them: a wait
costs in proportion to the connections that are open, however few are ready. There is no limit on how
high their numbers are. It is what to take where epoll(7) is missing, and for a few hundred connections.
"""

from typing import ClassVar

from ipckit._unpatched import select
from ipckit.servers.loop import Loop
from ipckit.servers.multiplex import MultiplexServer

__all__ = ["PollServer", "poll_loop"]


def poll_loop() -> Loop:
    """A loop on poll(2): no limit on the numbers of descriptors, each wait looks at all of them."""
    return Loop(select.poll(), 1000)


class PollServer(MultiplexServer):
    """Serve all connections in this process, waiting with poll(2). Args: see MultiplexServer."""

    model: ClassVar[str] = "poll"

    def _new_loop(self) -> Loop:
        return poll_loop()
