# SPDX-License-Identifier: MIT
"""A supervisor in miniature: three workers, one is killed, then the others are told to stop."""

import os
import select
import signal
import sys
import time

from ipckit.process import Child, Reaper


def work() -> None:
    while True:
        time.sleep(0.1)  # not pause(), which sleeps on after a signal that came just before it


workers: dict[Child, int] = {}
with Reaper() as reaper:
    for number in range(3):
        stop = {signal.SIGTERM: lambda *_, code=number: sys.exit(code)}
        child = reaper.fork(work, keep=[], die_with_parent=True, handlers=stop)
        workers[child] = number

    next(iter(workers)).kill()
    select.select([reaper], [], [])
    for child, status in [*reaper.reap(), *reaper.stop(timeout=10)]:
        print(f"worker {workers[child]} {status}")

left = [child for child in workers if os.path.exists(f"/proc/{child.pid}")]
print(f"{len(left)} are left" if left else "no child is left")
