"""The load of killloop.c on ``multiprocessing.Queue``: how many of 20 queues survive 20 kills.

Four processes put and four get messages of up to 12 KiB; one of them at a time is killed at a random
moment, and replaced. A queue has wedged if next to nothing comes out of it for two seconds.
"""

import multiprocessing
import random
import statistics
import time

QUEUES, KILLS, LONGEST, WINDOW = 20, 20, 12_288, 2.0


def put(queue, counter):
    chance = random.Random()
    while True:
        queue.put(b"x" * chance.randrange(LONGEST))


def get(queue, counter):
    while True:
        queue.get()
        counter.value += 1  # one writer per counter


def goes_on(counters):
    before = sum(counter.value for counter in counters)
    end = time.monotonic() + WINDOW
    while time.monotonic() < end:
        time.sleep(0.01)
        if sum(counter.value for counter in counters) > before + 50:  # more than was on its way
            return True
    return False


def start(context, place, queue, counters):
    worker = context.Process(target=get if place >= 4 else put, args=(queue, counters[place]), daemon=True)
    worker.start()
    return worker


def kills_survived(context, chance):
    queue = context.Queue(100)
    counters = [context.RawValue("Q", 0) for _ in range(8)]
    workers = [start(context, place, queue, counters) for place in range(8)]
    assert goes_on(counters), "it does not work even before the kill"
    kills = 0
    while kills < KILLS:
        time.sleep(chance.random() / 50)
        victim = chance.randrange(8)
        workers[victim].kill()
        workers[victim].join()
        workers[victim] = start(context, victim, queue, counters)
        if not goes_on(counters):
            break
        kills += 1
    for worker in workers:
        worker.kill()
        worker.join()
    queue.cancel_join_thread()
    return kills


def main():
    context = multiprocessing.get_context("fork")
    chance = random.Random(1)
    survived = [kills_survived(context, chance) for _ in range(QUEUES)]
    wedged = [kills + 1 for kills in survived if kills < KILLS]
    print(
        f"multiprocessing.Queue: {len(wedged)} of {QUEUES} queues wedged within {KILLS} kills"
        f"{f', by kill {statistics.median(wedged):g} in the median' if wedged else ''}"
    )


if __name__ == "__main__":
    main()
