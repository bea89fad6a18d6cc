# SPDX-License-Identifier: MIT
"""Where /proc has what the kernel tells nowhere else, and one error where it is missing.

Process, thread and namespace of the members of a queue and of the registry, the descriptor of a file that
gets a name when it is whole: these need it. What does not need /proc works in a jail without one.
"""

import contextlib
import errno

from ipckit._unpatched import os

__all__ = ["other_user_of", "own_number", "path"]


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


def other_user_of(fd: int) -> int | None:
    """The number of another process that has the same file open; None if /proc does not show one to us."""
    with contextlib.suppress(OSError):
        name, own, info = os.readlink(path(f"self/fd/{fd}")), own_number(), os.fstat(fd)
        for number in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if number != own and _has_open(number, name, info):
                return number
    return None


def _has_open(number: int, name: str, info: os.stat_result) -> bool:
    folder = f"/proc/{number}/fd"
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for fd in os.listdir(folder):
            # The name first: to stat what others have open could wait for their disks.
            if os.readlink(f"{folder}/{fd}") == name:
                return os.path.samestat(os.stat(f"{folder}/{fd}"), info)
    return False
