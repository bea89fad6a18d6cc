# SPDX-License-Identifier: MIT
"""The multiplexing server on poll(2).

poll(2) is given a list of descriptors with each wait, and the kernel looks at every one of them: a wait
costs in proportion to the connections that are open, however few are ready. There is no limit on how
high their numbers are. It is what to take where epoll(7) is missing, and for a few hundred connections.
"""

from typing import ClassVar

from ipckit.servers.multiplex import MultiplexServer

__all__ = ["PollServer"]


class PollServer(MultiplexServer):
    """Serve all connections in this process, waiting with poll(2). Args: see MultiplexServer."""

    model: ClassVar[str] = "poll"
