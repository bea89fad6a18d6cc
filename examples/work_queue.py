# SPDX-License-Identifier: MIT
"""Work that survives its workers: one is killed in the middle of a task, which another one then does."""

import os
import pickle
import signal
from contextlib import suppress
from multiprocessing import Event, Process
from multiprocessing.synchronize import Event as AnEvent

from ipckit.queues import Queue


def work(tasks: Queue, results: Queue, killed: AnEvent) -> None:
    with suppress(EOFError):
        while True:
            task = pickle.loads(tasks.peek())  # it stays in the queue until the commit
            if task == 3 and not killed.is_set():
                killed.set()
                os.kill(os.getpid(), signal.SIGKILL)
            results.put((task, task**2))
            tasks.commit()


if __name__ == "__main__":
    # A producer of results too, or they would end when the only worker that has begun is killed.
    with Queue() as tasks, Queue(role="producer") as results:
        killed = Event()
        workers = [Process(target=work, args=(tasks, results, killed)) for _ in range(3)]
        for worker in workers:
            worker.start()
        tasks.put_many(range(6))
        tasks.shutdown()  # nothing more comes: EOFError after the rest
        print(sorted(results.get() for _ in range(6)))
        for worker in workers:
            worker.join()
        print(f"{tasks.stats().deaths} worker died; {tasks.qsize()} tasks are left")
