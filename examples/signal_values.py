# SPDX-License-Identifier: MIT
"""Numbers sent by signal: a child queues squares to its parent, which reads them like messages."""

import os
import signal

from ipckit.signals import SignalQueue, sigqueue

SQUARE = signal.SIGRTMIN

with SignalQueue((SQUARE, signal.SIGCHLD)) as queue:
    child = os.fork()
    if child == 0:
        for number in range(5):
            sigqueue(os.getppid(), SQUARE, number * number)
        os._exit(0)

    squares, status = [], None
    while len(squares) < 5 or status is None:  # SIGCHLD, the lower number, may overtake the squares
        info = queue.recv(timeout=10)
        if info.signo == SQUARE:
            squares.append(info.value)
        else:
            status = info.status
    os.waitpid(child, 0)

print(f"the child sent {', '.join(map(str, squares))} and exited with {status}")
