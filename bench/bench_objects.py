# SPDX-License-Identifier: MIT
"""Measure System V and POSIX queues, and shared memory, against the packages that wrap them thinly.

    python bench/bench_objects.py [--rounds N] [--seconds S] [--only TEXT] [--quick]

"calls" are a send and a receive of one message in one process, so nothing but the calls is measured;
"one way" and "round trip" are between two processes. A target of 0.952 x means: at most 1.05 x the
other's time; 0.909: at most 1.1 x.
"""

import functools
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from typing import Any, NamedTuple

import posix_ipc
import sysv_ipc
from turns import Contender, Row, Step, both, run

from ipckit import memory, posix, sysv

SIZES = {"64 B": 64, "4 KiB": 4096}
BATCH = 500
LARGEST = 8192  # what a receive of the other packages makes room for; their own default is 2,048
AT_MOST_1_05 = 1 / 1.05
AT_MOST_1_1 = 1 / 1.1


class Queue(NamedTuple):
    """How to make, use and remove one kind of queue. Round trips take a queue each way, or a type."""

    name: str
    make: Callable[[], tuple[Any, Any]]
    send: Callable[[Any, bytes, int], Step]
    recv: Callable[[Any, int], Step]
    remove: Callable[[Any], object]


# --- the queues: the types 1 and 2 are the two ways of System V's, two queues those of POSIX


def one_queue(make: Callable[[], Any]) -> Callable[[], tuple[Any, Any]]:
    def pair() -> tuple[Any, Any]:
        queue = make()
        return queue, queue

    return pair


OUR_SYSV = Queue(
    "sysv",
    one_queue(sysv.MessageQueue),
    lambda queue, data, way: lambda: queue.send(data, type=way),
    lambda queue, way: lambda: queue.recv(type=way),
    lambda queue: (queue.remove(), queue.close()),
)
TIMED_SYSV = OUR_SYSV._replace(
    name="sysv timed", recv=lambda queue, way: lambda: queue.recv(type=way, timeout=60)
)
THEIR_SYSV = Queue(
    "sysv_ipc",
    one_queue(lambda: sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX, max_message_size=LARGEST)),
    lambda queue, data, way: lambda: queue.send(data, True, way),
    lambda queue, way: lambda: queue.receive(True, way),
    lambda queue: queue.remove(),
)


def our_pair() -> tuple[Any, Any]:
    both_ways = [posix.MessageQueue(f"/ipckit-bench-{way}", create=True, exclusive=True) for way in (1, 2)]
    return both_ways, both_ways


def their_pair() -> tuple[Any, Any]:
    both_ways = [
        posix_ipc.MessageQueue(f"/ipckit-bench-{way}", posix_ipc.O_CREX, max_message_size=LARGEST)
        for way in (1, 2)
    ]
    return both_ways, both_ways


def unlink_all(queues: list[Any]) -> None:
    for queue in queues:
        queue.unlink()
        queue.close()


OUR_POSIX = Queue(
    "posix",
    our_pair,
    lambda queues, data, way: lambda queue=queues[way - 1]: queue.send(data),
    lambda queues, way: lambda queue=queues[way - 1]: queue.recv(),
    unlink_all,
)
TIMED_POSIX = OUR_POSIX._replace(
    name="posix timed", recv=lambda queues, way: lambda queue=queues[way - 1]: queue.recv(timeout=60)
)
THEIR_POSIX = Queue(
    "posix_ipc",
    their_pair,
    lambda queues, data, way: lambda queue=queues[way - 1]: queue.send(data),
    lambda queues, way: lambda queue=queues[way - 1]: queue.receive(),
    unlink_all,
)


# --- what is done with them


def calls(queue: Queue) -> Contender:
    return Contender(
        queue.name,
        queue.make,
        lambda end, data: both(queue.send(end, data, 1), queue.recv(end, 1)),
        None,
        lambda near, far: queue.remove(near),
    )


def one_way(queue: Queue) -> Contender:
    return Contender(
        queue.name,
        queue.make,
        lambda end, data: queue.recv(end, 1),
        lambda end, data: queue.send(end, data, 1),
        lambda near, far: queue.remove(near),
    )


def round_trip(queue: Queue) -> Contender:
    return Contender(
        queue.name,
        queue.make,
        lambda end, data: both(queue.send(end, data, 1), queue.recv(end, 2)),
        lambda end, data: both(queue.recv(end, 1), queue.send(end, data, 2)),
        lambda near, far: queue.remove(near),
    )


def in_batches(queue: Queue, one_of: Callable[[Any], Any]) -> Contender:
    def receive(end: Any, data: bytes) -> Step:
        recv_many = one_of(end).recv_many

        def step() -> None:
            got = 0
            while got < BATCH:
                got += len(recv_many(BATCH - got))

        return step

    return Contender(
        f"{queue.name}, many",
        queue.make,
        receive,
        lambda end, data: functools.partial(one_of(end).send_many, [data] * BATCH),
        lambda near, far: queue.remove(near),
    )


def again_and_again(step: Step) -> Step:
    def steps() -> None:
        for _ in range(BATCH):
            step()

    return steps


def one_by_one(queue: Queue) -> Contender:
    return Contender(
        queue.name,
        queue.make,
        lambda end, data: again_and_again(queue.recv(end, 1)),
        lambda end, data: again_and_again(queue.send(end, data, 1)),
        lambda near, far: queue.remove(near),
    )


def segment(name: str, make_fill_drop: Callable[[bytes], object]) -> Contender:
    return Contender(
        name,
        lambda: (None, None),
        lambda end, data: functools.partial(make_fill_drop, data),
        None,
        lambda near, far: None,
    )


def anonymous(data: bytes) -> None:
    with memory.SharedMemory(len(data)) as shared:
        shared.buf[:] = data


def named(data: bytes) -> None:
    with memory.SharedMemory(len(data), name="ipckit-bench", create=True) as shared:
        shared.buf[:] = data
        shared.unlink()


def system_v(data: bytes) -> None:
    with sysv.SharedMemory(size=len(data)) as shared:
        shared.remove()
        shared.buf[:] = data


def standard_library(data: bytes) -> None:
    shared = shared_memory.SharedMemory(create=True, size=len(data))
    shared.buf[:] = data
    shared.close()
    shared.unlink()


def rows() -> Iterator[Row]:
    kinds = [
        ("System V", OUR_SYSV, THEIR_SYSV, TIMED_SYSV, lambda end: end),
        ("POSIX", OUR_POSIX, THEIR_POSIX, TIMED_POSIX, lambda end: end[0]),
    ]
    for kind, ours, theirs, timed, one_of in kinds:
        for what, contender in (("calls", calls), ("one way", one_way), ("round trip", round_trip)):
            for label, size in SIZES.items():
                contenders = [contender(ours), contender(theirs)]
                yield Row(f"{kind} {what} {label}", size, contenders, [AT_MOST_1_05])
        for label, size in SIZES.items():
            contenders = [in_batches(ours, one_of), one_by_one(theirs)]
            yield Row(f"{kind} in batches {label}", size, contenders, [1.3], BATCH)
        for what, contender in (("calls", calls), ("one way", one_way), ("round trip", round_trip)):
            yield Row(f"{kind} timed {what} 64 B", 64, [contender(timed), contender(ours)], [AT_MOST_1_1])
    segments = [segment("memfd", anonymous), segment("multiprocessing", standard_library)]
    yield Row("segment of 1 MiB", 1 << 20, segments, [1])
    yield Row("named segment of 1 MiB", 1 << 20, [segment("memory", named), segments[1]], [1])
    yield Row("System V segment of 1 MiB", 1 << 20, [segment("sysv", system_v), segments[1]], [1])


if __name__ == "__main__":
    run(__doc__, rows())
