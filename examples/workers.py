# SPDX-License-Identifier: MIT
"""A supervisor in miniature: three workers, one is killed, then the others are told to stop."""

import os
import select
import signal
import sys

from ipckit.process import Child, Reaper


def work() -> None:
    while True:
        signal.pause()


workers: dict[Child, int] = {}
with Reaper() as reaper:
    for number in range(3):
        stop = {signal.SIGTERM: lambda *_, code=number: sys.exit(code)}
        child = reaper.fork(work, keep=[], die_with_parent=True, handlers=stop)
        workers[child] = number

    next(iter(workers)).kill()
    while workers:
        select.select([reaper], [], [])
        for child, status in reaper.reap():
            print(f"worker {workers.pop(child)} {status}")
            if status.signaled:
                reaper.send_signal(signal.SIGTERM)

print("no child is left" if not os.path.exists(f"/proc/{child.pid}") else "a zombie is left")
