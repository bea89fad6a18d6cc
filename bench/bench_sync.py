# SPDX-License-Identifier: MIT
"""Measure locks, semaphores, events and barriers against those of multiprocessing.

    python bench/bench_sync.py [--rounds N] [--seconds S] [--only TEXT] [--quick]

"alone": nobody else is there, so nothing is waited for. "two": two processes do the same at once; of
semaphores, each wakes the other in turn.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

from turns import Contender, Row, Step, run

from ipckit import sync

BATCH = 100

Make = Callable[[], Any]
Use = Callable[[Any], Step]


def acquire_and_release(lock: Any) -> Step:
    acquire, release = lock.acquire, lock.release

    def step() -> None:
        for _ in repeat(None, BATCH):
            acquire()
            release()

    return step


def with_statement(lock: Any) -> Step:
    def step() -> None:
        for _ in repeat(None, BATCH):
            with lock:
                pass

    return step


def is_set(event: Any) -> Step:
    def step() -> None:
        for _ in repeat(None, BATCH):
            event.is_set()

    return step


def set_and_clear(event: Any) -> Step:
    def step() -> None:
        for _ in repeat(None, BATCH):
            event.set()
            event.clear()

    return step


def alone(name: str, make: Make, use: Use) -> Contender:
    return Contender(name, lambda: (make(), None), lambda end, _: use(end), None, lambda near, far: None)


def two(name: str, make: Make, use: Use) -> Contender:
    def both_ends() -> tuple[Any, Any]:
        one = make()
        return one, one

    return Contender(
        name, both_ends, lambda end, _: use(end), lambda end, _: use(end), lambda near, far: None
    )


def ping_pong(name: str, semaphore: Callable[[int], Any]) -> Contender:
    def ends() -> tuple[Any, Any]:
        there, back = semaphore(0), semaphore(0)
        return (there, back), (back, there)

    def near(end: Any, _: bytes) -> Step:
        return lambda: (end[0].release(), end[1].acquire())

    def far(end: Any, _: bytes) -> Step:
        return lambda: (end[1].acquire(), end[0].release())

    return Contender(name, ends, near, far, lambda near, far: None)


def rows() -> Iterator[Row]:
    mp = multiprocessing.get_context("fork")
    pairs: list[tuple[str, Make, Make, Use]] = [
        ("Lock acquire, release", sync.Lock, mp.Lock, acquire_and_release),
        ("Lock in with", sync.Lock, mp.Lock, with_statement),
        ("RLock acquire, release", sync.RLock, mp.RLock, acquire_and_release),
        ("Semaphore acquire, release", sync.Semaphore, mp.Semaphore, acquire_and_release),
        ("Event is_set", sync.Event, mp.Event, is_set),
        ("Event set, clear", sync.Event, mp.Event, set_and_clear),
    ]
    for name, ours, theirs, use in pairs:
        contenders = [alone("ipckit", ours, use), alone("multiprocessing", theirs, use)]
        yield Row(f"alone: {name}", 0, contenders, [0], BATCH, 2e-7)
    contenders = [
        two("ipckit", sync.Lock, acquire_and_release),
        two("multiprocessing", mp.Lock, acquire_and_release),
    ]
    yield Row("two: Lock acquire, release", 0, contenders, [0], BATCH, 1e-6)
    yield Row(
        "two: Semaphore round trip",
        0,
        [ping_pong("ipckit", sync.Semaphore), ping_pong("multiprocessing", mp.Semaphore)],
        [0],
        cost=4e-5,
    )
    barriers = [
        two(name, lambda make=make: make(2), lambda barrier: barrier.wait)
        for name, make in (("ipckit", sync.Barrier), ("multiprocessing", mp.Barrier))
    ]
    yield Row("two: Barrier", 0, barriers, [0], cost=2e-4)


if __name__ == "__main__":
    run(__doc__, rows())
