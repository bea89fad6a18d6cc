# SPDX-License-Identifier: MIT
"""The command line: ``ipckit serve, client, demo, load`` and ``ipckit ls, rm, gc, doctor``.

Status 0: done; 1: it could not be done, one line on standard error says why; 2: wrong usage.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process."""
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
