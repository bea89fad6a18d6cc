# SPDX-License-Identifier: MIT
"""Where /proc has what the kernel tells nowhere else, and one error where it is missing.

Process, thread and namespace of the members of a queue and of the registry, the descriptor of a file that
gets a name when it is whole: these need it. What does not need /proc works in a jail without one.
"""

import errno

from ipckit._unpatched import os

__all__ = ["own_number", "path"]


def own_number() -> int:
    """The number that this process has in /proc, which may be that of another pid namespace.

    Raises: OSError ENOSYS if /proc is not mounted, or does not show this process.
    """
    try:
        return int(os.readlink("/proc/self"))
    except OSError:
        text = "/proc is not mounted, or not for this process, and this can't be done without it"
        raise OSError(errno.ENOSYS, text, "/proc/self") from None


def path(of: str) -> str:
    """Where /proc has *of*, as ``self/stat`` or ``meminfo``. Raises: as own_number()."""
    own_number()
    return f"/proc/{of}"
