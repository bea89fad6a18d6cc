# SPDX-License-Identifier: MIT
"""ipckit: inter-process communication for Python on Unix.

The rooms, lowest first; each imports only from those before it:

    errors      Closed, PeerDied, Corrupt; every other error is the OSError that errno means
    wait        timeouts as one deadline per operation; waiting for a descriptor
    vectored    readv, writev and variants that move everything
"""

from ipckit.errors import Closed as Closed
from ipckit.errors import Corrupt as Corrupt
from ipckit.errors import PeerDied as PeerDied
from ipckit.vectored import preadv as preadv
from ipckit.vectored import pwritev as pwritev
from ipckit.vectored import readv as readv
from ipckit.vectored import readv_exact as readv_exact
from ipckit.vectored import writev as writev
from ipckit.vectored import writev_all as writev_all
