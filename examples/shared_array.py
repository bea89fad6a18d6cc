# SPDX-License-Identifier: MIT
"""A numpy array that worker processes fill together, each its own rows: nothing is copied or sent."""

import multiprocessing
import sys

from ipckit.memory import SharedMemory

try:
    import numpy as np
except ImportError:
    print("this example needs numpy: pip install numpy")
    sys.exit()

ROWS, COLUMNS, WORKERS = 400, 250, 4


def fill(memory: SharedMemory, worker: int) -> None:
    table = memory.asarray("float64", (ROWS, COLUMNS))
    for row in range(worker, ROWS, WORKERS):
        table[row] = np.sqrt(np.arange(COLUMNS) * row)


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with SharedMemory(ROWS * COLUMNS * 8) as memory:
        workers = [context.Process(target=fill, args=(memory, number)) for number in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        table = memory.asarray("float64", (ROWS, COLUMNS))
        print(f"{WORKERS} workers, {table.nbytes} bytes, the last of them {table[-1, -1]:.3f}")
