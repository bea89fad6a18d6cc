# SPDX-License-Identifier: MIT
"""poll_loop() for now; the poll server is being written."""

import select

from ipckit.servers.loop import Loop


def poll_loop() -> Loop:
    """A loop on poll(2): no limit on the numbers of descriptors, each wait looks at all of them."""
    return Loop(select.poll(), 1000)
