# SPDX-License-Identifier: MIT
"""What a contender of bench_engine.py does in one turn: round trips, one way, blocked, killed.

A turn of *count* messages makes its peer, runs the processes and removes it.
"""

import os
import random
import select
import statistics
import struct
import subprocess
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise, repeat
from pathlib import Path

from peers import Call, Peer
from race import PATIENCE, Failed, Turn, Work, race

from ipckit import process

Make = Callable[[], Peer]

PROGRAM = Path(__file__).parent.parent / "build" / "bench" / "engine"
PARTS = 20  # of the round trips of a turn
TIMED = 10_000  # round trips one by one, at most
WARM = 10  # messages of each sender before the clock starts
ASLEEP = 0.5  # ms between two round trips, so that both sides have gone to sleep
now = time.monotonic_ns


@contextmanager
def made(make: Make) -> Iterator[Peer]:
    try:
        peer = make()
    except Exception as error:  # each package has its own
        raise Failed(f"{type(error).__name__}: {error}") from None
    try:
        yield peer
    finally:
        peer.remove()


def in_c(*arguments: object) -> Turn:
    """What build/bench/engine does; its third argument is the number of messages."""
    command = [PROGRAM, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
    except subprocess.SubprocessError as error:
        raise Failed(str(error)) from None
    numbers = array("q", done.stdout)
    return Turn(numbers[0] / int(str(arguments[2])), numbers[0] / 1e9, numbers[1:])


def futex_in_c(count: int) -> Turn:
    return median(in_c("futex", int(ASLEEP * 1e3), count))


def median(turn: Turn) -> Turn:
    return turn._replace(value=sorted(turn.samples)[len(turn.samples) // 2])


# --- round trips


def answer(peer: Peer, count: int) -> Work:
    def work(ready: Call) -> None:
        end, data = peer.use(0), bytes(peer.size)
        send, recv = end.send, end.recv
        ready()
        for _ in repeat(None, count):
            recv()
            send(data)

    return work


def ask(peer: Peer, each: int, timed: int) -> Work:
    """PARTS times so many, of which the median counts, since others may have had the processor."""

    def work(ready: Call) -> Turn:
        end, data = peer.use(1), bytes(peer.size)
        send, recv, stamps = end.send, end.recv, array("q", bytes(8 * (PARTS + timed + 1)))
        ready()
        for _ in repeat(None, WARM):
            send(data)
            recv()
        stamps[0] = now()
        for part in range(1, PARTS + 1):
            for _ in repeat(None, each):
                send(data)
                recv()
            stamps[part] = now()
        for i in range(PARTS + 1, PARTS + 1 + timed):
            send(data)
            recv()
            stamps[i] = now()
        took = [after - before for before, after in pairwise(stamps)]
        total = (stamps[PARTS] - stamps[0]) / 1e9
        return Turn(statistics.median(took[:PARTS]) / each, total, array("q", took[PARTS:]))

    return work


def ask_asleep(peer: Peer, count: int) -> Work:
    def work(ready: Call) -> Turn:
        end, data, samples = peer.use(1), bytes(peer.size), array("q")
        send, recv, began = end.send, end.recv, now()
        ready()
        for _ in repeat(None, WARM + count):
            time.sleep(ASLEEP / 1e3)
            start = now()
            send(data)
            recv()
            samples.append(now() - start)
        return Turn(0, (now() - began) / 1e9, samples[WARM:])

    return work


def trip(make: Make, count: int) -> Turn:
    each, timed = -(-count // PARTS), min(count, TIMED)
    with made(make) as peer:
        return race(ask(peer, each, timed), answer(peer, WARM + PARTS * each + timed))


def trip_asleep(make: Make, count: int) -> Turn:
    with made(make) as peer:
        return median(race(ask_asleep(peer, count), answer(peer, WARM + count)))


# --- one way


def produce(peer: Peer, count: int) -> Work:
    def work(ready: Call) -> None:
        send, data = peer.use(0).send, bytes(peer.size)
        ready()
        for _ in repeat(None, WARM + count):
            send(data)

    return work


def consume(peer: Peer, count: int, producers: int) -> Work:
    def work(ready: Call) -> Turn:
        recv = peer.use(1).recv
        ready()
        for _ in repeat(None, WARM * producers):
            recv()
        start = now()
        for _ in repeat(None, count):
            recv()
        took = now() - start
        return Turn(took / count, took / 1e9, array("q"))

    return work


def produce_many(peer: Peer, batches: int, batch: int) -> Work:
    def work(ready: Call) -> None:
        send_many, messages = peer.use(0).send_many, [bytes(peer.size)] * batch
        ready()
        for _ in repeat(None, 1 + batches):
            send_many(messages)

    return work


def consume_many(peer: Peer, batches: int, batch: int) -> Work:
    def work(ready: Call) -> Turn:
        recv_many, got, count = peer.use(1).recv_many, 0, batches * batch
        ready()
        while got < batch:
            got += len(recv_many(batch - got))
        start, got = now(), 0
        while got < count:
            got += len(recv_many(batch))
        took = now() - start
        return Turn(took / count, took / 1e9, array("q"))

    return work


def one_way(make: Make, producers: int, count: int) -> Turn:
    each = -(-count // producers)
    with made(make) as peer:
        return race(consume(peer, each * producers, producers), *[produce(peer, each)] * producers)


def sent_to_oneself(make: Make, count: int) -> Turn:
    """One process does all, so that nothing is waited for: what the calls take."""

    def work(ready: Call) -> Turn:
        send, recv, data = peer.use(0).send, peer.open(1).recv, bytes(peer.size)
        ready()
        start = now()
        for _ in repeat(None, count):
            send(data)
            recv()
        took = now() - start
        return Turn(took / count, took / 1e9, array("q"))

    with made(make) as peer:
        return race(work)


def in_batches(make: Make, batch: int, count: int) -> Turn:
    batches = -(-count // batch)
    with made(make) as peer:
        return race(consume_many(peer, batches, batch), produce_many(peer, batches, batch))


# --- blocked


def block(peer: Peer, tell: int) -> None:
    recv = peer.use(1).recv
    os.write(tell, b".")
    recv()


@contextmanager
def receiver(make: Make) -> Iterator[int]:
    """The pid of a process that waits for a message."""
    told, tell = os.pipe()
    with made(make) as peer, process.fork(block, peer, tell, die_with_parent=True) as child:
        os.close(tell)
        try:
            if not os.read(told, 1):
                raise Failed("a process ended")
            yield child.pid
        finally:
            os.close(told)
            child.kill()
            child.wait()


def processor_time(pid: int) -> int:
    """Nanoseconds that all its threads have run."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def blocked(makes: Sequence[Make], seconds: float) -> list[float]:
    """Percent of a processor that each uses while it waits for a message; all at the same time."""
    with ExitStack() as stack:
        pids = [stack.enter_context(receiver(make)) for make in makes]
        time.sleep(seconds / 20)  # they go to sleep
        before, start = [*map(processor_time, pids)], now()
        time.sleep(seconds)
        after, took = [*map(processor_time, pids)], now() - start
    return [(b - a) / took * 100 for a, b in zip(before, after, strict=True)]


# --- killed


def stamp_and_send(peer: Peer, pause: float) -> Work:
    """The producer that lives: each message says when it was begun. With a pause nothing is full."""

    def work(ready: Call) -> None:
        send = peer.use(0).send
        ready()
        while True:
            send(struct.pack("q56x", now()))
            if pause:
                time.sleep(pause)

    return work


def send_nothings(peer: Peer, _tell: int) -> None:
    send = peer.use(0).send
    while True:
        send(bytes(64))


def hold_the_lock(peer: Peer, tell: int) -> None:
    peer.reserve()
    os.write(tell, b".")
    time.sleep(PATIENCE)


def until_it_sends(recv: Call, _told: int) -> None:
    """A message of the victim's, and then some: it is anywhere within a send."""
    while any(recv()[:8]):
        pass
    until = now() + random.randrange(1_000_000)
    while now() < until:
        recv()


def until_all_wait(recv: Call, told: int) -> None:
    """It holds the lock, nothing comes, and so the producer that lives waits for the lock."""
    while True:
        try:
            recv(timeout=0.01)
        except TimeoutError:
            if select.select([told], [], [], 0)[0]:
                os.read(told, 1)
                return


def receive_begun_after(recv: Call, time_ns: int) -> None:
    while struct.unpack_from("q", recv())[0] < time_ns:
        pass


def kill_again_and_again(peer: Peer, victim: Call, until: Call, kills: int) -> Work:
    def work(ready: Call) -> Turn:
        recv, samples = peer.use(1).recv, array("q")
        told, tell = os.pipe()
        ready()
        for _ in range(kills):
            with process.fork(victim, peer, tell, die_with_parent=True) as child:
                until(recv, told)
                start = now()
                child.kill()
                receive_begun_after(recv, start if victim is send_nothings else 1)
                samples.append(now() - start)
                child.wait()
            receive_begun_after(recv, now())  # nothing of this victim is left
        return Turn(0, sum(samples) / 1e9, samples)

    return work


def killed_anywhere(make: Make, kills: int) -> Turn:
    """From the kill of a busy producer to the receipt of a message that another began after it."""
    with made(make) as peer:
        work = kill_again_and_again(peer, send_nothings, until_it_sends, kills)
        return median(race(work, stamp_and_send(peer, 0), patience=PATIENCE + kills / 10))


def killed_holder(make: Make, kills: int) -> Turn:
    """From the kill of who holds the lock to the receipt of what waited for it."""
    with made(make) as peer:
        work = kill_again_and_again(peer, hold_the_lock, until_all_wait, kills)
        return median(race(work, stamp_and_send(peer, 0.0005), patience=PATIENCE + kills / 10))
