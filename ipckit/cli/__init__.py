# SPDX-License-Identifier: MIT
"""The command line: ``ipckit serve, client, demo, load`` and ``ipckit ls, rm, gc, doctor``.

Status 0: done; 1: it could not be done, one line on standard error says why; 2: wrong usage.
"""

import errno
import sys

from ipckit._unpatched import os

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process."""
    _open_standard_streams()
    try:
        from ipckit.cli import commands, load, objects, servers  # noqa: F401 - they add themselves
    except ModuleNotFoundError as missing:
        if missing.name not in ("click", "rich"):
            raise
        sys.exit(
            f"the command line needs {missing.name}, which comes with the extra cli: "
            "pip install '.[cli]' in a clone of ipckit"
        )
    commands.group(prog_name="ipckit")


def _open_standard_streams() -> None:
    """Those that this process was started without lead to /dev/null: their numbers are for nothing else."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if not _is_open(fd):
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno != errno.EBADF
    return True
