"""A lock whose holder is killed half-way: the next one is told, and repairs what the lock guards.

python examples/robust_lock.py
"""

import os
import signal

from ipckit import SharedMemory, sync


def transfer(accounts: memoryview, amount: int) -> None:
    accounts[1] += amount
    os.kill(os.getpid(), signal.SIGKILL)  # the worst moment
    accounts[0] -= amount


def main() -> None:
    lock, memory = sync.Lock(), SharedMemory(16)
    accounts = memory.buf.cast("q")
    accounts[0], accounts[1] = 70, 30

    if os.fork() == 0:
        with lock:
            transfer(accounts, 20)
    os.wait()

    with lock:
        if lock.recovered:
            print(f"the worker was killed between the two accounts: {accounts[0]} + {accounts[1]}")
            accounts[1] = 100 - accounts[0]
    print(f"repaired: {accounts[0]} + {accounts[1]}")


if __name__ == "__main__":
    main()
