# SPDX-License-Identifier: MIT
"""Measure ipckit.pipe(), duplex() and writev() against the standard library, two real processes each.

    python bench/bench_streams.py [--rounds N] [--seconds S] [--quick]

The absolute figures mean something on the same machine only.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator

from turns import Contender, Row, Step, both, bound, run

import ipckit
from ipckit import pipes

SIZES = {"64 B": 64, "1 KiB": 1024, "64 KiB": 65536, "1 MiB": 1 << 20}
BATCH = 500


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


def one_way(name: str, make: Step, send: str, recv: str, *size: int) -> Contender:
    return Contender(
        name, make, lambda end, data: bound(end, recv, *size), lambda end, data: bound(end, send, data)
    )


def round_trip(name: str, make: Step, send: str, recv: str, *size: int) -> Contender:
    return Contender(
        name,
        make,
        lambda end, data: both(bound(end, send, data), bound(end, recv, *size)),
        lambda end, data: both(bound(end, recv, *size), bound(end, send, data)),
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


if __name__ == "__main__":
    run(__doc__, rows())
