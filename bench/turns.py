# SPDX-License-Identifier: MIT
"""Contenders that take turns, each in two real processes: what the benches of single rooms share.

The ratio of a row is that of the fastest rounds, so that what else the machine does counts little.
"""

import argparse
import functools
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Step = Callable[[], object]


def close_both(near: Any, far: Any) -> None:
    near.close()
    far.close()


class Contender(NamedTuple):
    name: str
    make: Callable[[], tuple[Any, Any]]
    near: Callable[[Any, bytes], Step]  # what this process does again and again
    far: Callable[[Any, bytes], Step] | None  # what the other does, if there is another
    done: Callable[[Any, Any], object] = close_both


class Row(NamedTuple):
    name: str
    size: int
    contenders: list[Contender]
    targets: list[float]  # of the first against each of the others, 0 for none
    each: int = 1  # messages in a step
    cost: float = 4e-6  # seconds for a message of no size, about


def bound(end: Any, verb: str, *arguments: object) -> Step:
    return functools.partial(getattr(end, verb), *arguments)


def both(first: Step, second: Step) -> Step:
    def step() -> None:
        first()
        second()

    return step


def steps_for(row: Row, seconds: float) -> int:
    """About how many steps of the row fit into the time."""
    return max(3, int(seconds / (row.each * (row.cost + row.size / 2e9))))


def measure(contender: Contender, size: int, steps: int) -> float:
    """Seconds for each step, from when both processes are there."""
    near, far = contender.make()
    data = bytes(size)
    told, tell = os.pipe()
    pid = 0
    if contender.far:
        pid = os.fork()
        if pid == 0:
            step = contender.far(far, data)
            os.write(tell, b".")
            for _ in range(steps):
                step()
            os._exit(0)
        os.read(told, 1)
    step = contender.near(near, data)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    took = time.perf_counter() - start
    if pid:
        os.waitpid(pid, 0)
    contender.done(near, far)
    os.close(told)
    os.close(tell)
    return took / steps


def report(row: Row, best: list[float]) -> None:
    ours, others = row.contenders[0], row.contenders[1:]
    print(f"{row.name:28} {ours.name:14} {best[0] / row.each * 1e6:9.2f} us", end="")
    verdicts = []
    for other, took, target in zip(others, best[1:], row.targets, strict=True):
        print(f"   {took / best[0]:5.2f} x {other.name}", end="")
        if target:
            verdicts.append((took / best[0] >= target, f"{target:.3g} x {other.name}"))
    print("".join(f"   {'REACHED' if good else 'NOT REACHED'} {what}" for good, what in verdicts), flush=True)


def run(doc: str, rows: Iterator[Row]) -> None:
    """The command line of such a bench."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (default 7)")
    parser.add_argument("--seconds", type=float, default=0.3, help="about, for a turn (default 0.3)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one short turn each: does it run?")
    options = parser.parse_args()
    rounds, seconds = (1, 0.002) if options.quick else (options.rounds, options.seconds)
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} CPUs; ", end="")
    print(f"time for a message or a step, rates as ratios; the fastest of {rounds} rounds")
    for row in rows:
        if options.only not in row.name:
            continue
        steps = steps_for(row, seconds)
        taken = [[measure(c, row.size, steps) for c in row.contenders] for _ in range(rounds)]
        report(row, [min(times) for times in zip(*taken, strict=True)])
