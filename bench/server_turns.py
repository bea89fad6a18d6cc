# SPDX-License-Identifier: MIT
"""One turn of a server in bench_server.py: start it, load it, stop it, look at its log."""

import contextlib
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ipckit.load import LoadReport, run_load

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds for a server to start, and to stop
MODES = ("connections", "echoes")
CONNECTIONS = 16  # at a time


class Failed(Exception):
    """A server did not start or did not stop, or the load came back with errors."""


@dataclass
class Server:
    name: str
    kind: str
    command: list[str]
    logs: bool = True
    clients: int = CONNECTIONS
    """long connections at a time"""
    trouble: str = ""
    done: "dict[tuple[str, int], LoadReport]" = field(default_factory=dict)
    """by mode and round"""

    def rates(self, mode: str) -> "dict[int, float]":
        """By round."""
        return {number: report.rate for (what, number), report in self.done.items() if what == mode}


class Running(NamedTuple):
    pid: int
    port: int
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port


def ended(pidfd: int, timeout: float) -> bool:
    """Whether the process ends in time. It is not reaped, so its session's number stays taken."""
    return bool(select.select([pidfd], [], [], timeout)[0])


def port_of(pidfd: int, output: Path) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if told := re.search(r"listening on 127\.0\.0\.1:(\d+).*\n", output.read_text()):
            return int(told[1])
        if ended(pidfd, 0.005):
            raise Failed(f"did not start: {(output.read_text().strip() or 'no output').splitlines()[-1]}")
    raise Failed(f"did not say where it listens within {PATIENCE:.0f} s")


@contextlib.contextmanager
def running(server: Server) -> Iterator[Running]:
    """The server, in a session of its own so that all its processes can be ended."""
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder, "echomsg.txt"), Path(folder, "output")
        command = [str(log) if argument == "LOG" else argument for argument in server.command]
        with output.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        pidfd = os.pidfd_open(process.pid)
        try:
            yield Running(process.pid, port_of(pidfd, output), log)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(pidfd)


def stop(server: Running) -> None:
    """So that its log is whole."""
    pidfd = os.pidfd_open(server.pid)
    os.kill(server.pid, signal.SIGTERM)
    in_time = ended(pidfd, PATIENCE)
    os.close(pidfd)
    if not in_time:
        raise Failed(f"still ran {PATIENCE:.0f} s after SIGTERM")


def no_errors(report: LoadReport, what: str) -> LoadReport:
    for kind, count in report.errors.items():
        raise Failed(f"{what}: {count} times {kind}: {report.first[kind]}")
    return report


def load(server: Server, address: tuple[str, int], mode: str, seconds: float) -> LoadReport:
    clients = CONNECTIONS if mode == "connections" else server.clients
    report = run_load(address, connections=clients, duration=seconds, reconnect=mode == "connections")
    return no_errors(report, mode)


def take_turn(server: Server, number: int, seconds: float) -> None:
    with running(server) as there:
        warm_up = load(server, there.address, "connections", min(0.2, seconds))
        reports = [load(server, there.address, mode, seconds) for mode in MODES]
        stop(there)
        echoed = warm_up.bytes + sum(report.bytes for report in reports)
        if server.logs and there.log.stat().st_size != echoed:
            raise Failed(f"{echoed} bytes were echoed, {there.log.stat().st_size} are in the log")
    for mode, report in zip(MODES, reports, strict=True):
        server.done[mode, number] = report
