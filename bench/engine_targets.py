# SPDX-License-Identifier: MIT
"""The targets of the engine, and what part of each is reached: of the rows of bench_engine.py."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from engine_report import OURS, PEER, Measured, Result

BUSY = "round trip 64 B, busy"
ASLEEP = "round trip 64 B, asleep"
PRODUCER = "producer killed, to next delivery"
HOLDER = "lock's holder killed, to next delivery"
IDLE = "idle CPU, blocked receiver"

Part = Callable[[Sequence[Result], Result, Measured], float | None]


class Target(NamedTuple):
    row: str
    whose: Sequence[str]
    text: str
    part: Part  # what part of it is reached, None if that can't be said


def against(name: str, factor: float) -> Part:
    """At most *factor* times the time of another contender of the row."""

    def part(_all: Sequence[Result], result: Result, own: Measured) -> float | None:
        other = result.named(name)
        return other and factor * other.value / own.value

    return part


def against_best(factor: float) -> Part:
    """*factor* times as fast as the fastest peer."""

    def part(_all: Sequence[Result], result: Result, own: Measured) -> float | None:
        best = result.best(PEER)
        return best and best.value / own.value / factor

    return part


def at_most(limit: float, share: float | None = None) -> Part:
    """At most *limit*, of the value or of a percentile."""

    def part(_all: Sequence[Result], _result: Result, own: Measured) -> float:
        return limit / max(own.value if share is None else own.at(share), 1e-9)

    return part


def flat(done: Sequence[Result], result: Result, own: Measured) -> float | None:
    """At most 1.5 times the time of 64 bytes."""
    first = result.row.replace("64 MiB", "64 B")
    small = [one.named(own.name) for one in done if (one.cpus, one.row) == (result.cpus, first)]
    return 1.5 * small[0].value / own.value if small and small[0] else None


PAIRS = ("Ring", "channel")
ALL = (*PAIRS, "Queue")
SIZES = ("64 B", "4 KiB", "1 MiB", "64 MiB")
CALLS = ", the calls alone"
TARGETS = [
    Target(BUSY, PAIRS, "1.6 x the C loop", against("C on the ring", 1.6)),
    Target(BUSY, PAIRS, "20 x the best peer", against_best(20)),
    Target(ASLEEP, ALL, "1.15 x the C futex", against("C, futex", 1.15)),
    Target("one way 64 B", PAIRS, "8 M/s", at_most(125)),
    Target("one way 64 B", PAIRS, "5 x the best peer", against_best(5)),
    Target("one way 64 B", ["Queue"], "4 M/s", at_most(250)),
    Target("in batches 64 B", ALL, "15 x faster-fifo's batches", against("faster-fifo", 1 / 15)),
    Target("one way 1 MiB", (*PAIRS, "Ring, recv_into"), "0.8 x memcpy", against("C, memcpy", 1 / 0.8)),
    Target("one way 1 MiB", PAIRS, "4 x the best peer", against_best(4)),
    *(Target(f"in place {size}", ["Ring"], "2 us", at_most(2000)) for size in SIZES),
    *(Target(f"in place 64 MiB{calls}", ["Ring"], "1.5 x the time of 64 B", flat) for calls in ("", CALLS)),
    Target(IDLE, ALL, "0.1 % CPU", at_most(0.1)),
    Target(HOLDER, ["Ring, locked"], "p99 of 5 ms", at_most(5e6, 0.99)),
    Target(HOLDER, ["Ring, locked"], "worst of 250 ms", at_most(250e6, 1.0)),
    Target(PRODUCER, ["Queue", "Ring, locked"], "worst of 250 ms", at_most(250e6, 1.0)),
]  # fmt: skip
ON_ONE_CPU = "0.8 x the best peer"


def judged(done: Sequence[Result]) -> Iterator[tuple[str, str, str, float | None]]:
    """Row, who, target, and what part of it is reached.

    On one CPU there is another target for each row with peers, for the best of ours.
    """
    for result in done:
        for target in TARGETS:
            if target.row == result.row and (result.cpus > 1 or target.row in (IDLE, PRODUCER, HOLDER)):
                for own in filter(None, map(result.named, target.whose)):
                    yield result.title, own.name, target.text, target.part(done, result, own)
        ours = result.best(OURS)
        if result.cpus == 1 and result.row != IDLE and ours and result.best(PEER):
            yield result.title, ours.name, ON_ONE_CPU, against_best(0.8)(done, result, ours)


def verdict(part: float | None) -> str:
    if part is None:
        return "not measured"
    return "reached" if part >= 1 else f"not reached: {part:.2f} of the target"


def print_targets(done: Sequence[Result]) -> None:
    print()
    for title, who, text, part in judged(done):
        print(f"target: {title}: {who}: {text}: {verdict(part)}")
