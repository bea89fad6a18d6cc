"""A variable that two processes have: shmget, shmat, use, shmdt, IPC_RMID."""

import os

from ipckit.sysv import Semaphore, SharedMemory

counter = SharedMemory(size=8)  # shmget and shmat; a new segment is all zeros
turn = Semaphore()
number = counter.buf.cast("Q")

child = os.fork()  # the child has the segment attached, too
for _ in range(10_000):
    with turn:
        number[0] += 1  # used like any variable
if child == 0:
    os._exit(0)  # which detaches
os.waitpid(child, 0)
print(f"{number[0]} counted by two processes")

print(f"attached {counter.stat().nattch} time")
counter.remove()  # IPC_RMID: goes with the last that is attached
turn.remove()
number.release()
counter.close()  # shmdt
turn.close()
