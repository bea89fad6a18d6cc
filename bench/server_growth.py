# SPDX-License-Identifier: MIT
"""What holding many connections costs a server: bench_server.py --growth.

Two thirds of those held are silent, the others send their next message when the last is back. The
time of an echo is the time that passed by the number of echoes; beside it stands the processor time
that the server had for each. The memory is what the server's pages grow by (PSS), without the kernel's
part of a socket, when it holds silent connections, each of which had one byte echoed.
"""

import csv
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from server_turns import PATIENCE, Failed, Server, no_errors, running

from ipckit.load import Load, run_load

HELD = (10, 100, 1_000, 10_000)
SLOWER = 1.3  # at the most, with the most held
KIBIBYTES = 2.0  # at the most, of a silent connection
FIELDS = ["held", "round", "us_per_echo", "server_cpu_us_per_echo", "p50_us", "p99_us"]


class Held(NamedTuple):
    held: int
    round: int
    us_per_echo: float
    cpu_us_per_echo: float
    p50_us: float
    p99_us: float


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found, "the kernel tells no PSS"
    return int(found[1]) * 1024


def measure(server: Server, held: int, number: int, seconds: float) -> Held:
    active = held - held * 2 // 3
    samples = []
    with running(server) as there:
        options = {"connections": active, "idle": held - active, "duration": seconds}
        with Load(there.address, **options, warm_up=seconds / 2) as load:
            while not load.step(0.02):
                progress = load.progress()
                if progress.phase == "running":
                    samples.append((progress.echoed, cpu_seconds(there.pid)))
            report = no_errors(load.report(), f"{held} held")
    if not report.count:
        raise Failed(f"no echo with {held} held in {seconds:g} s")
    latency = report.latency_us
    return Held(held, number, 1e6 / report.rate, us_each(samples), latency["p50"], latency["p99"])


def us_each(samples: Sequence[tuple[int, float]]) -> float:
    """Microseconds of processor time for an echo, between the first and the last look."""
    if not samples or samples[0][0] == samples[-1][0]:  # this process itself got no processor
        return math.nan
    return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0]) * 1e6


def bytes_of_a_silent_one(server: Server, held: int) -> float:
    with running(server) as there:
        no_errors(run_load(there.address, connections=100, messages=20, duration=None), "warm-up")
        before = resident_bytes(there.pid)
        with Load(there.address, connections=1, idle=held - 1, rate=1, duration=None) as load:
            deadline = time.monotonic() + 3 * PATIENCE
            while load.progress().open < held:
                load.step(0.05)
                no_errors(load.report(), f"{held} silent ones")
                if time.monotonic() > deadline:
                    raise Failed(f"only {load.progress().open} of {held} were opened")
            return (resident_bytes(there.pid) - before) / held


def medians(results: Sequence[Held], held: int, figure: str) -> float:
    return statistics.median(getattr(one, figure) for one in results if one.held == held)


def print_growth(results: Sequence[Held], counts: Sequence[int]) -> None:
    print(f"{'held':>7} {'us per echo':>12} {'x first':>8} {'server CPU us':>14} {'p50 us':>9} {'p99 us':>9}")
    for held in counts:
        each = ratios(results, held, counts[0])
        cells = [medians(results, held, name) for name in Held._fields[2:]]
        print(f"{held:7,} {cells[0]:12.2f} {statistics.median(each):8.2f} {cells[1]:14.2f}", end="")
        print(f" {cells[2]:9,.0f} {cells[3]:9,.0f}")


def ratios(results: Sequence[Held], held: int, first: int) -> list[float]:
    """Of the time of an echo, round by round."""
    few = {one.round: one.us_per_echo for one in results if one.held == first}
    return [one.us_per_echo / few[one.round] for one in results if one.held == held]


def verdict(good: bool) -> str:
    return "REACHED" if good else "NOT REACHED"


def write_csv(results: Sequence[Held], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(results)


def run(server: Server, rounds: int, seconds: float, quick: bool, path: Path | None) -> None:
    """All of it. Raises: Failed."""
    counts = HELD[:2] if quick else HELD
    results = []
    for number in range(1, rounds + 1):
        for held in counts:
            print(f"round {number} of {rounds}: {server.name}, {held:,} held", file=sys.stderr)
            results.append(measure(server, held, number, seconds))
    print_growth(results, counts)
    each = ratios(results, counts[-1], counts[0])
    print(f"{counts[-1]:,} held: target at most {SLOWER} x the time of {counts[0]}, median ", end="")
    print(f"{statistics.median(each):.2f}: {verdict(statistics.median(each) <= SLOWER)}", end="")
    print(f" ({' '.join(f'{ratio:.2f}' for ratio in each)})")
    kibibytes = bytes_of_a_silent_one(server, counts[-1]) / 1024
    print(f"memory of a silent connection: target under {KIBIBYTES:g} KiB, {kibibytes:.2f}: ", end="")
    print(verdict(kibibytes < KIBIBYTES))
    if path:
        write_csv(results, path)
