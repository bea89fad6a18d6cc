# SPDX-License-Identifier: MIT
"""Measure ring, channel and queue against every peer that installs, and against C.

    python bench/bench_engine.py [--quick] [--row TEXT] [--pinned | --unpinned] [--csv FILE]
                                 [--picture FILE] [--rounds N] [--seconds S] [--idle S] [--kills N]

The contenders of a row take turns, in fresh processes each time; what is quoted is the fastest of the
rounds, and the percentiles of all round trips of all rounds. Everything is measured twice, the second
time with all processes on one CPU, where only what sleeps while it waits takes part.
"""

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import engine_report as report
import engine_turns as turns
import peers
from engine_report import FLOOR, OURS, PEER, Measured, Result
from engine_targets import HOLDER, IDLE, PRODUCER, print_targets
from peers import Peer
from race import Failed, Turn

MIB = 1 << 20
SIZES = {"64 B": 64, "1 KiB": 1024, "64 KiB": 65536, "1 MiB": MIB}
LOANS = {"64 B": 64, "4 KiB": 4096, "1 MiB": MIB, "64 MiB": 64 * MIB}
PRODUCERS = (1, 2, 4, 8)
LITTLE = 4096  # capacity where a queue is to be nearly empty


class Contender(NamedTuple):
    name: str
    kind: str
    turn: Callable[[int], Turn]  # with so many messages


class Row(NamedTuple):
    name: str
    contenders: list[Contender]
    few: int = 2  # messages for a start


# --- who takes part

Named = dict[str, type[Peer]]

OUR_PAIRS: Named = {"Ring": peers.Ring, "channel": peers.Channel, "Queue": peers.Queue}
OUR_QUEUES: Named = {"Queue": peers.Queue, "Queue put/get": peers.QueuePut, "Ring, locked": peers.RingLocked}
STANDARD: Named = {
    "mp.Pipe": peers.MpPipe,
    "mp.SimpleQueue": peers.MpSimpleQueue,
    "mp.Queue": peers.MpQueue,
    "socketpair": peers.SocketPair,
    "posix_ipc": peers.PosixQueue,
    "sysv_ipc": peers.SystemVQueue,
    "faster-fifo": peers.FasterFifo,
}
BLOCKING: Named = {
    **STANDARD,
    "pyzmq": peers.Zmq,
    "pynng": peers.Nng,
    "iceoryx2, events": peers.IceoryxEvents,
}
POLLING: Named = {
    "mp.Pipe, polling": peers.MpPipePolled,
    "mp.SimpleQueue, polling": peers.MpSimpleQueuePolled,
    "mp.Queue, polling": peers.MpQueuePolled,
    "socketpair, polling": peers.SocketPairPolled,
    "posix_ipc, polling": peers.PosixQueuePolled,
    "sysv_ipc, polling": peers.SystemVQueuePolled,
    "faster-fifo, polling": peers.FasterFifoPolled,
    "pyzmq, polling": peers.ZmqPolled,
    "pynng, polling": peers.NngPolled,
    "iceoryx2, polling": peers.Iceoryx,
}
ONE_WAY: Named = {
    **STANDARD,
    "pyzmq": peers.ZmqPush,
    "pynng": peers.NngPush,
    "iceoryx2, polling": peers.Iceoryx,
    "iceoryx2, events": peers.IceoryxEvents,
}
MANY_SENDERS: Named = {
    name: ONE_WAY[name] for name in ONE_WAY if name not in ("mp.Pipe", "socketpair", "iceoryx2, events")
}

LOANING: Named = {
    "iceoryx2, polling": peers.IceoryxLoaned,
    "iceoryx2, events": peers.IceoryxLoanedEvents,
}


def usable(named: Named, size: int, pinned: bool) -> Named:
    """What is installed, takes messages of that size, and sleeps if there is one CPU."""
    return {
        name: peer
        for name, peer in named.items()
        if peer.needs and size <= peer.largest() and not (pinned and "polling" in name)
    }


def contenders(
    kind: str, named: Named, turn: Callable[..., Turn], size: int, capacity: int, pinned: bool, *more: int
) -> list[Contender]:
    return [
        Contender(name, kind, functools.partial(turn, functools.partial(peer, size, capacity), *more))
        for name, peer in usable(named, size, pinned).items()
    ]


def in_c(what: str, name: str, size: int, *more: object) -> Contender:
    return Contender(name, FLOOR, lambda count: turns.in_c(what, size, count, *more))


# --- the rows


def capacity_for(size: int) -> int:
    return max(MIB, 4 * size)


def round_trips(pinned: bool) -> Iterator[Row]:
    at = (64, MIB, pinned)
    yield Row(
        "round trip 64 B, busy",
        [
            in_c("trip", "C on the ring", 64, MIB),
            *contenders(OURS, OUR_PAIRS, turns.trip, *at),
            *contenders(PEER, {**POLLING, **BLOCKING}, turns.trip, *at),
        ],
    )
    yield Row(
        "round trip 64 B, asleep",
        [
            Contender("C, futex", FLOOR, turns.futex_in_c),
            *contenders(OURS, OUR_PAIRS, turns.trip_asleep, *at),
            *contenders(PEER, BLOCKING, turns.trip_asleep, *at),
        ],
    )


def singly(pinned: bool) -> Iterator[Row]:
    for label, size in SIZES.items():
        capacity = capacity_for(size)
        at = (size, capacity, pinned, 1)
        large: Named = {"pyzmq, copy=False": peers.ZmqPushNoCopy} if size >= 65536 else {}
        yield Row(
            f"one way {label}",
            [
                in_c("memcpy", "C, memcpy", size),
                in_c("way", "C on the ring", size, capacity),
                *contenders(OURS, {**OUR_PAIRS, "Ring, recv_into": peers.RingInto}, turns.one_way, *at),
                *contenders(PEER, {**ONE_WAY, **large}, turns.one_way, *at),
            ],
        )


def batched(pinned: bool) -> Iterator[Row]:
    for label, size in SIZES.items():
        capacity = capacity_for(size)
        at = (size, capacity, pinned, min(500, capacity // size))
        yield Row(
            f"in batches {label}",
            [
                *contenders(OURS, OUR_PAIRS, turns.in_batches, *at),
                *contenders(PEER, {"faster-fifo": peers.FasterFifo}, turns.in_batches, *at),
            ],
        )


def produced(pinned: bool) -> Iterator[Row]:
    for producers in PRODUCERS:
        at = (64, MIB, pinned, producers)
        yield Row(
            f"64 B from {producers} producer{'s' * (producers > 1)}",
            [
                *contenders(OURS, OUR_QUEUES, turns.one_way, *at),
                *contenders(PEER, MANY_SENDERS, turns.one_way, *at),
            ],
        )


def loaned(pinned: bool) -> Iterator[Row]:
    """Three messages fit at any size, so that only the size makes the difference."""
    ours: Named = {"Ring": peers.RingLoaned}
    for label, size in LOANS.items():
        at = (size, 4 * size, pinned)
        yield Row(
            f"in place {label}",
            [
                *contenders(OURS, ours, turns.one_way, *at, 1),
                *contenders(PEER, LOANING, turns.one_way, *at, 1),
            ],
        )
        yield Row(
            f"in place {label}, the calls alone",
            [
                *contenders(OURS, ours, turns.sent_to_oneself, *at),
                *contenders(PEER, {"iceoryx2": peers.IceoryxLoaned}, turns.sent_to_oneself, *at),
            ],
        )


def rows(pinned: bool) -> Iterator[Row]:
    for some in (round_trips, singly, batched, produced, loaned):
        yield from (row for row in some(pinned) if row.contenders)


# --- measuring them


def messages_for(contender: Contender, few: int, seconds: float) -> int:
    """How many messages take about so many seconds; 0 seconds: a few."""
    count = few
    while seconds:
        turn = contender.turn(count)
        if turn.took > seconds / 4 or count > 1e8:
            return max(few, int(count * seconds / turn.took))
        count = int(count * min(50, 1.2 * seconds / turn.took))
    return count


def compete(row: Row, rounds: int, seconds: float) -> list[Measured]:
    """The contenders take turns. Who fails is out, and named."""
    done: dict[Contender, list[Turn]] = {contender: [] for contender in row.contenders}
    counts: dict[Contender, int] = {}
    for _ in range(rounds):
        for contender in list(done):
            try:
                if contender not in counts:
                    counts[contender] = messages_for(contender, row.few, seconds)
                done[contender].append(contender.turn(counts[contender]))
            except Failed as error:
                print(f"skipped: {contender.name}, {row.name}: {error}")
                del done[contender]
    return [
        Measured(name, kind, min(turn.value for turn in its), sorted(chain(*(turn.samples for turn in its))))
        for (name, kind, _), its in done.items()
    ]


def idle(seconds: float, pinned: bool) -> list[Measured]:
    """All at the same time, for they do nothing."""
    named = usable({**OUR_PAIRS, **BLOCKING}, 64, pinned)
    makes = [functools.partial(peer, 64, MIB) for peer in named.values()]
    kinds = [OURS if name in OUR_PAIRS else PEER for name in named]
    shares = turns.blocked(makes, seconds)
    return [Measured(*one) for one in zip(named, kinds, shares, strict=True)]


def kills(count: int, pinned: bool) -> Iterator[Row]:
    at = (64, LITTLE, pinned)
    yield Row(PRODUCER, contenders(OURS, OUR_QUEUES, turns.killed_anywhere, *at), count)
    holder: Named = {"Ring, locked": peers.RingLocked}
    yield Row(HOLDER, contenders(OURS, holder, turns.killed_holder, *at), count)


def results(options: argparse.Namespace, pinned: bool) -> Iterator[Result]:
    cpus = len(os.sched_getaffinity(0))
    for row in rows(pinned):
        if options.row in row.name:
            yield Result(cpus, row.name, "us", compete(row, options.rounds, options.seconds))
    if options.row in IDLE:
        try:
            yield Result(cpus, IDLE, "% CPU", idle(options.idle, pinned))
        except Failed as error:
            print(f"skipped: {IDLE}: {error}")
    for row in kills(options.kills, pinned):
        if row.contenders and options.row in row.name:
            yield Result(cpus, row.name, "us", compete(row, 1, 0))


# --- the command line


def chosen() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", default="", help="rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one short turn each: does it run?")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--pinned", action="store_true", help="only with all processes on one CPU")
    where.add_argument("--unpinned", action="store_true", help="only on all CPUs")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default 5)")
    parser.add_argument("--seconds", type=float, default=0.2, help="about, for a turn (default 0.2)")
    parser.add_argument("--idle", type=float, default=10, help="seconds of being blocked (default 10)")
    parser.add_argument("--kills", type=int, default=500, help="of a process (default 500)")
    parser.add_argument("--csv", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="draw them (.png, .svg, .pdf); needs matplotlib")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.idle, options.kills = 1, 0, 0.1, 3
    return options


def print_head(options: argparse.Namespace) -> None:
    print(f"{report.machine()}; the fastest of {options.rounds} rounds of {options.seconds:g} s")
    print(", ".join(peers.versions()))
    print("* ipckit   - C   ratio: times the best of ipckit")
    for name, why in peers.MISSING.items():
        print(f"skipped: {name}: {why}")


def main() -> None:
    options = chosen()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or files of peers would be left
    every, done = os.sched_getaffinity(0), []
    passes = [True] if options.pinned else [False] if options.unpinned else [False, True]
    try:
        print_head(options)
        for pinned in passes:
            os.sched_setaffinity(0, {min(every)} if pinned else every)
            for result in results(options, pinned):
                done.append(result)
                report.print_table(result)
    except KeyboardInterrupt:
        print("\ninterrupted; this is what was measured", file=sys.stderr)
    print_targets(done)
    if options.csv:
        report.write_csv(done, options.csv)
    if options.picture:
        report.draw(done, options.picture)


if __name__ == "__main__":
    main()
