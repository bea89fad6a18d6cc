# SPDX-License-Identifier: MIT
"""Workers that take the most urgent job first, from a queue that any program can send to."""

import os

from ipckit.posix import MessageQueue

STOP = b""
NAME = f"/ipckit-example-{os.getpid()}"

with MessageQueue(NAME, create=True, exclusive=True) as jobs:
    with MessageQueue(f"{NAME}-done", create=True, exclusive=True) as done:
        jobs.send_many([b"sweep", b"dust"])
        jobs.send(b"put out the fire", priority=9)
        jobs.send_many([b"answer the phone", b"open the door"], priority=5)

        worker = os.fork()
        if worker == 0:
            for job in jobs:
                done.send(job)
                if job == STOP:
                    os._exit(0)

        finished = [done.recv(timeout=60) for _ in range(5)]
        jobs.send(STOP)
        os.waitpid(worker, 0)
        done.unlink()
    jobs.unlink()

print(", ".join(job.decode() for job in finished))
