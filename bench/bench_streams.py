# SPDX-License-Identifier: MIT
"""Measure ipckit.pipe(), duplex() and writev() against the standard library, two real processes each.

    python bench/bench_streams.py [--rounds N] [--seconds S] [--quick]

The contenders of a row take turns, and the ratio is that of their fastest rounds, so that what else
the machine does counts little. The absolute figures mean something on the same machine only.
"""

import argparse
import functools
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ipckit
from ipckit import pipes

SIZES = {"64 B": 64, "1 KiB": 1024, "64 KiB": 65536, "1 MiB": 1 << 20}
BATCH = 500

Step = Callable[[], object]


class Contender(NamedTuple):
    name: str
    make: Callable[[], tuple[object, object]]
    near: Callable[[object, bytes], Step]  # what this process does again and again
    far: Callable[[object, bytes], Step]  # what the other does


class Row(NamedTuple):
    name: str
    size: int
    contenders: list[Contender]
    targets: list[float]  # of the first against each of the others, 0 for none
    each: int = 1  # messages in a step


# --- the contenders


class RawPipe:
    """A plain pipe, or two, with os.read and os.write of a size that both sides know."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target

    def send(self, data: bytes) -> None:
        done = os.write(self.target, data)
        while done < len(data):
            done += os.write(self.target, data[done:])

    def recv(self, size: int) -> bytes:
        data = os.read(self.source, size)
        while len(data) < size:
            data += os.read(self.source, size - len(data))
        return data

    def close(self) -> None:
        for fd in {self.source, self.target} - {-1}:
            os.close(fd)


def raw_pipe() -> tuple[RawPipe, RawPipe]:
    source, target = os.pipe()
    return RawPipe(source, -1), RawPipe(-1, target)


def raw_pair() -> tuple[RawPipe, RawPipe]:
    there, back = os.pipe(), os.pipe()
    return RawPipe(back[0], there[1]), RawPipe(there[0], back[1])


def twice(first: Step, second: Step) -> Step:
    def step() -> None:
        first()
        second()

    return step


def bound(end: object, verb: str, *arguments: object) -> Step:
    return functools.partial(getattr(end, verb), *arguments)


def one_way(name: str, make: Step, send: str, recv: str, *size: int) -> Contender:
    return Contender(
        name, make, lambda end, data: bound(end, recv, *size), lambda end, data: bound(end, send, data)
    )


def round_trip(name: str, make: Step, send: str, recv: str, *size: int) -> Contender:
    return Contender(
        name,
        make,
        lambda end, data: twice(bound(end, send, data), bound(end, recv, *size)),
        lambda end, data: twice(bound(end, recv, *size), bound(end, send, data)),
    )


def receive_batch(end: pipes.Reader, data: bytes) -> Step:
    def step() -> None:
        got = 0
        while got < BATCH:
            got += len(end.recv_many(BATCH - got))

    return step


def gathered(name: str, write: Callable[[int, list[bytes]], object]) -> Contender:
    """100 buffers of *data*'s size into a pipe, by *write*."""

    def near(end: RawPipe, data: bytes) -> Step:
        return bound(end, "recv", 100 * len(data))

    def far(end: RawPipe, data: bytes) -> Step:
        return functools.partial(write, end.target, [data] * 100)

    return Contender(name, raw_pipe, near, far)


def write_each(fd: int, buffers: list[bytes]) -> None:
    for buffer in buffers:
        os.write(fd, buffer)


def rows() -> Iterator[Row]:
    mp_one = one_way("mp.Pipe", lambda: multiprocessing.Pipe(False), "send_bytes", "recv_bytes")
    mp_two = round_trip("mp.Pipe", multiprocessing.Pipe, "send_bytes", "recv_bytes")
    for label, size in SIZES.items():
        ours = one_way("pipe", pipes.pipe, "send", "recv")
        yield Row(
            f"one way {label}", size, [ours, mp_one, one_way("os", raw_pipe, "send", "recv", size)], [1, 0]
        )
    for label, size in SIZES.items():
        ours = round_trip("duplex", pipes.duplex, "send", "recv")
        raw = round_trip("os", raw_pair, "send", "recv", size)
        yield Row(f"round trip {label}", size, [ours, mp_two, raw], [1, 0])
    batch = Contender(
        "pipe, many",
        pipes.pipe,
        receive_batch,
        lambda end, data: lambda many=[data] * BATCH: end.send_many(many),
    )
    singly = Contender(
        "mp.Pipe",
        lambda: multiprocessing.Pipe(False),
        lambda end, data: lambda: [end.recv_bytes() for _ in range(BATCH)],
        lambda end, data: lambda: [end.send_bytes(data) for _ in range(BATCH)],
    )
    yield Row("one way 64 B", 64, [batch, singly], [2], BATCH)
    buffers = [
        gathered("writev", ipckit.writev),
        gathered("join", lambda fd, buffers: os.write(fd, b"".join(buffers))),
        gathered("a write each", write_each),
    ]
    yield Row("100 buffers of 64 B", 64, buffers, [0, 1])


# --- measuring


def steps_for(row: Row, seconds: float) -> int:
    """About how many steps of the row fit into the time."""
    return max(3, int(seconds / (row.each * (4e-6 + row.size / 2e9))))


def measure(contender: Contender, size: int, steps: int) -> float:
    """Seconds for each step, from when both processes are there."""
    near, far = contender.make()
    data = bytes(size)
    told, tell = os.pipe()
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
    os.waitpid(pid, 0)
    for end in (near, far):
        end.close()
    os.close(told)
    os.close(tell)
    return took / steps


def report(row: Row, best: list[float]) -> None:
    ours, others = row.contenders[0], row.contenders[1:]
    print(f"{row.name:20} {ours.name:10} {best[0] / row.each * 1e6:9.2f} us", end="")
    verdicts = []
    for other, took, target in zip(others, best[1:], row.targets, strict=True):
        print(f"   {took / best[0]:5.2f} x {other.name}", end="")
        if target:
            verdicts.append((took / best[0] >= target, f"{target:g} x {other.name}"))
    print("".join(f"   {'REACHED' if good else 'NOT REACHED'} {what}" for good, what in verdicts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (default 7)")
    parser.add_argument("--seconds", type=float, default=0.3, help="about, for a turn (default 0.3)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one short turn each: does it run?")
    options = parser.parse_args()
    rounds, seconds = (1, 0.002) if options.quick else (options.rounds, options.seconds)
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} CPUs; ", end="")
    print(f"time for a message or a step, rates as ratios; the fastest of {rounds} rounds")
    for row in rows():
        if options.only not in row.name:
            continue
        steps = steps_for(row, seconds)
        taken = [[measure(c, row.size, steps) for c in row.contenders] for _ in range(rounds)]
        report(row, [min(times) for times in zip(*taken, strict=True)])


if __name__ == "__main__":
    main()
