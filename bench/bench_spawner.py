# SPDX-License-Identifier: MIT
"""Measure what a child costs, from the request to its end, against the memory that its parent has.

    python bench/bench_spawner.py [--sizes MIB,MIB,...] [--rounds N]

Each size is a process of its own with so much memory, all of it touched. In each round it makes a child by
each way in turn; the child of the spawner serves a connection that has ended, the others exit at once.
The table has the medians.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from ipckit._native import ffi, lib
from ipckit._spawner import CONNECTION, Spawner
from ipckit.memory import SharedMemory

SIZES = [25, 180, 1024, 4096]


def by_os_fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def by_posix_spawn() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def by_spawner() -> Callable[[], None]:
    spawner, counters = Spawner(), SharedMemory(ffi.sizeof("ik_server_counters"))
    job = ffi.new("ik_connection_job *")
    job.connection.end, job.connection.echoes = lib.IK_END_OPEN, 1

    def make() -> None:
        client, served = socket.socketpair()
        client.close()
        with served, spawner.start(CONNECTION, job, (served.fileno(), counters.fileno())):
            pass

    return make


WAYS = {"os.fork": lambda: by_os_fork, "posix_spawn": lambda: by_posix_spawn, "spawner": by_spawner}


def measure(mib: int, rounds: int) -> None:
    """In a process of its own: the median of each way, in microseconds."""
    memory = bytearray(b"x") * (mib << 20)
    ways = {name: make() for name, make in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    print(*(statistics.median(times[name][1:]) * 1e6 for name in WAYS))
    del memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="MiB, separated by commas")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options.rounds)
        return
    table = Table("memory of the parent", *(f"{name}, us" for name in WAYS), title="a child, made and reaped")
    for size in options.sizes.split(","):
        command = [sys.executable, __file__, "--measure", size, "--rounds", str(options.rounds)]
        figures = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        table.add_row(f"{size} MiB", *(f"{float(figure):,.0f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
