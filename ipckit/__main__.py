# SPDX-License-Identifier: MIT
"""``python -m ipckit``: the command line."""

from ipckit.cli import main

main()
