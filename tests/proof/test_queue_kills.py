"""Queues under random SIGKILL, judged by what each process wrote down; and idle.

By default a slice of each proof; the whole with IPCKIT_PROOF=1 (``make proof``).
"""

import os
import random
import signal
import time
import zlib
from collections import Counter
from contextlib import ExitStack, suppress
from queue import Empty

import pytest
from conftest import Forked, eventually
from procfs import asleep, wakeups

from ipckit.queues import Ended, Queue

WHOLE = os.environ.get("IPCKIT_PROOF") == "1"
KILLS = 2000 if WHOLE else 120

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1500 if WHOLE else 600)]

SIZES = [0, 1, 40, 500, 1500, 3000, 10_000]  # to beyond the ring


# --- what a process writes down, before and after; a file of its own, one write a line -------------


def produce(ready, queue, path, ident):
    """B before put(), A after it."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    chance, number = random.Random(ident), 0
    while True:
        payload = chance.randbytes(chance.choice(SIZES))
        message = b"%d %d %d " % (ident, number, zlib.crc32(payload)) + payload
        os.write(file, b"B %d.%d\n" % (ident, number))
        queue.put(message)
        os.write(file, b"A %d.%d\n" % (ident, number))
        if number == 0:
            ready()
        number += 1


def name_of(message):
    ident, number, check, payload = bytes(message).split(b" ", 3)
    return b"%d.%d" % (int(ident), int(number)) if zlib.crc32(payload) == int(check) else b"torn"


def get_all(queue, file):
    """G before get(), R after it."""
    while True:
        os.write(file, b"G\n")
        message = queue.get()
        os.write(file, b"R %s\n" % name_of(message))


def commit_all(queue, file):
    """P before commit(), R after it; what peek() can't have, get() can."""
    while True:
        try:
            name = name_of(queue.peek())
        except OSError:
            os.write(file, b"G\n")
            name = name_of(queue.get())
        else:
            os.write(file, b"P %s\n" % name)
            queue.commit()
        os.write(file, b"R %s\n" % name)


def consume(ready, queue, path, how):
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with suppress(OSError, Ended):  # takes part, and takes nothing
        queue.peek(timeout=0)
        queue.keep()
    ready()
    try:
        how(queue, file)
    except Ended:
        os.write(file, b"E\n")
        queue.close()


# --- what they wrote, judged -----------------------------------------------------------------------


def judge(folder):
    """Of the producers: begun, acknowledged. Of the consumers: received, perhaps received at the end."""
    begun, acknowledged, received, unsure, perhaps = set(), set(), Counter(), 0, set()
    for path in folder.iterdir():
        lines = [line.split() for line in path.read_bytes().splitlines()]
        begun |= {words[1] for words in lines if words[0] == b"B"}
        acknowledged |= {words[1] for words in lines if words[0] == b"A"}
        mine = [words[1] for words in lines if words[0] == b"R"]
        received.update(mine)
        unsure += bool(lines) and lines[-1] == [b"G"]
        perhaps |= {lines[-1][1]} if lines and lines[-1][0] == b"P" else set()
        latest = {}
        for name in mine:
            producer, number = map(int, name.split(b"."))
            assert latest.get(producer, -1) < number, f"{path}: {name} came after {latest[producer]}"
            latest[producer] = number
    return begun, acknowledged, received, unsure, perhaps


def test_killed_at_random_nothing_is_lost_torn_doubled_or_stuck(tmp_path):
    chance, kills = random.Random(7), 0
    with Queue(capacity=4096, codec="bytes") as queue, ExitStack() as stack:

        def start(slot, number):
            path = tmp_path / f"{slot}.{number}"
            if slot < 4:
                return Forked(produce, queue, path, number)
            return Forked(consume, queue, path, commit_all if slot % 2 else get_all)

        workers = [start(slot, slot) for slot in range(8)]
        stack.callback(lambda: [one.close() for one in workers])
        for one in workers:
            one.wait_ready()
        while kills < KILLS:
            slot = chance.randrange(8)
            before = queue.stats().received
            workers[slot].close()  # by SIGKILL
            kills += 1
            workers[slot] = start(slot, kills + 8)
            workers[slot].wait_ready()
            eventually(lambda before=before: queue.stats().received != before)
            time.sleep(chance.random() / 200)
        for one in workers[:4]:
            one.kill()
            one.wait()
        assert [one.wait() for one in workers[4:]] == [0] * 4
        stats = queue.stats()
    begun, acknowledged, received, unsure, perhaps = judge(tmp_path)
    lost = acknowledged - set(received) - perhaps
    doubled = [name for name, count in received.items() if count > 1]
    invented = set(received) - begun
    print(
        f"\n{kills} kills, {len(begun)} begun, {len(acknowledged)} acknowledged, {len(received)} received; lost "
        f"{len(lost)} of {unsure} consumers killed about a get(), doubled {len(doubled)}, torn "
        f"{received[b'torn']}, invented {len(invented)}, left {stats.messages}, recoveries {stats.recoveries}"
    )
    assert len(lost) <= unsure, "what get() had returned when its process was killed, at most one each"
    assert not doubled
    assert not invented
    assert stats.messages == 0
    assert stats.deaths == kills + 4
    assert kills >= KILLS
    assert len(received) > kills


# --- idle ------------------------------------------------------------------------------------------


def test_a_blocked_consumer_of_eight_producers_sleeps(forked):
    """It wakes up after slices of 25, 50 and then 100 ms only. What that costs is in bench/bench_engine.py."""
    seconds = 10 if WHOLE else 1
    with Queue() as queue:

        def producer(ready):
            queue.put(1)
            ready()
            signal.pause()

        def consumer(ready):
            for _ in range(8):
                queue.get()
            with pytest.raises(EOFError):  # nobody puts, so it is the kill that ends it
                queue.get()
            queue.close()

        producers = [forked(producer) for _ in range(8)]
        for one in producers:
            one.wait_ready()
        process = forked(consumer)
        eventually(lambda: queue.stats().waiting == 1 and asleep(process.pid, within="futex"))
        start, before = time.monotonic(), wakeups(process.pid)
        time.sleep(seconds)
        woken, took = wakeups(process.pid) - before, time.monotonic() - start
        print(f"\n{woken} wake-ups in {took:.1f} s")
        assert woken <= 10 + took / 0.1
        assert queue.stats().waiting == 1
        for one in producers:
            one.kill()
        assert process.wait() == 0
        with pytest.raises(Empty):
            queue.get_nowait()
