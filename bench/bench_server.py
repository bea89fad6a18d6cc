# SPDX-License-Identifier: MIT
"""ipckit's fork server beside the textbook one in C and the standard library's, as ratios in one run.

Each round starts every server in turn, loads it with short connections (connect, echo 64 bytes,
close) and with long ones (16 of them, each sending a message when the one before is back), stops
it, and compares the size of its log with what was echoed. Ratios are taken within a round, because
the machine may be faster or slower in the next; the table shows the medians.
"""

import argparse
import contextlib
import os
import platform
import re
import select
import signal
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ipckit.load import LoadReport, run_load

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "build" / "bench"
PATIENCE = 20.0  # seconds for a server to start, and to stop
MODES = ("connections", "echoes")
TARGETS = {"connections": 0.5, "echoes": 0.95}
OURS, YARDSTICK = "ipckit, fork", "C, fork"


class Failed(Exception):
    """A server did not start or did not stop, or the load came back with errors."""


@dataclass
class Server:
    name: str
    command: list[str]
    logs: bool = True
    rates: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    trouble: str = ""

    def command_with(self, log: Path) -> list[str]:
        return [argument.replace("LOG", str(log)) for argument in self.command]


def servers() -> list[Server]:
    ours = [sys.executable, "-m", "ipckit", "serve", "--model", "fork", "--host", "127.0.0.1"]
    return [
        Server(OURS, [*ours, "--port", "0", "--log", "LOG"]),
        Server(YARDSTICK, [str(PROGRAMS / "fork_server"), "0", "LOG"]),
        Server("socketserver.ForkingTCPServer", [sys.executable, __file__, "socketserver"], logs=False),
    ]


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while message := self.request.recv(4096):
            self.request.sendall(message)


class StandardServer(socketserver.ForkingTCPServer):
    # With the default of 5, 16 clients at once overflow the queue, and each overflow is a second
    # lost to TCP's retransmission: that would be measured instead of the server.
    request_queue_size = 128


def serve_with_the_standard_library() -> None:
    with StandardServer(("127.0.0.1", 0), Echo) as server:
        print(f"listening on 127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


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
def running(server: Server, folder: Path, log: Path) -> Iterator[int]:
    """The port of *server*, in a session of its own so that all its processes can be ended."""
    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            server.command_with(log), cwd=ROOT, stdout=file, stderr=file, start_new_session=True, text=True
        )
    pidfd = os.pidfd_open(process.pid)
    try:
        yield port_of(pidfd, output)
        process.terminate()
        if not ended(pidfd, PATIENCE):
            raise Failed(f"still ran {PATIENCE:.0f} s after SIGTERM")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(pidfd)


def load(mode: str, port: int, seconds: float) -> LoadReport:
    report = run_load(("127.0.0.1", port), duration=seconds, reconnect=mode == "connections")
    if report.errors:
        raise Failed(f"{mode}: {report.errors}, {report.first}")
    return report


def measure(server: Server, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        log = Path(name, "echomsg.txt")
        with running(server, Path(name), log) as port:
            warm_up = load("connections", port, min(0.2, seconds))
            results = [load(mode, port, seconds) for mode in MODES]
        echoed = sum(result.bytes for result in [warm_up, *results])
        if server.logs and log.stat().st_size != echoed:
            raise Failed(f"{echoed} bytes were echoed, {log.stat().st_size} are in the log")
    for mode, result in zip(MODES, results, strict=True):
        server.rates[mode].append(result.rate)


def play(field_of: list[Server], rounds: int, seconds: float) -> None:
    for number in range(1, rounds + 1):
        for server in field_of:
            if server.trouble:
                continue
            print(f"round {number} of {rounds}: {server.name}", file=sys.stderr)
            try:
                measure(server, seconds)
            except Failed as failure:
                server.trouble = str(failure)


def ratios(server: Server, yardstick: Server, mode: str) -> list[float]:
    # Rounds after a failure are missing on one side.
    pairs = zip(server.rates[mode], yardstick.rates[mode])  # noqa: B905
    return [ours / theirs for ours, theirs in pairs if theirs]


def print_table(field_of: list[Server], yardstick: Server) -> None:
    print(f"{'server':<30} {'connections/s':>13} {'x C':>6} {'echoes/s':>9} {'x C':>6}  log")
    for server in field_of:
        cells = []
        for mode, width in zip(MODES, (13, 9), strict=True):
            against = ratios(server, yardstick, mode)
            rates = server.rates[mode]
            cells.append(f"{statistics.median(rates):{width},.0f}" if rates else f"{'-':>{width}}")
            cells.append(f"{statistics.median(against):6.2f}" if against else f"{'-':>6}")
        log = server.trouble or ("complete" if server.logs else "none")
        print(f"{server.name:<30} {' '.join(cells)}  {log}")


def print_targets(ours: Server, yardstick: Server) -> None:
    for mode, target in TARGETS.items():
        each = ratios(ours, yardstick, mode)
        if not each:
            print(f"{mode}/s: target {target} x C: NOT MEASURED")
            continue
        verdict = "REACHED" if statistics.median(each) >= target else "NOT REACHED"
        rounds = " ".join(f"{ratio:.2f}" for ratio in each)
        print(f"{mode}/s: target {target} x C, median {statistics.median(each):.2f}: {verdict} ({rounds})")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure ipckit's fork server against C and socketserver.")
    parser.add_argument("--rounds", type=int, default=5, help="how often each server runs (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load in each mode and round (2)")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    chosen = parser.parse_args()
    if chosen.rounds < 1 or not chosen.seconds >= 0.05:
        parser.error("--rounds must be at least 1 and --seconds at least 0.05")
    if chosen.quick:
        chosen.rounds, chosen.seconds = 1, 0.2
    return chosen


def main() -> None:
    if sys.argv[1:] == ["socketserver"]:
        serve_with_the_standard_library()
    chosen = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped
    subprocess.run(["make", "-s", "cbench"], cwd=ROOT, check=True)
    field_of = servers()
    ours, yardstick = field_of[0], field_of[1]
    print(
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
    try:
        play(field_of, chosen.rounds, chosen.seconds)
    except KeyboardInterrupt:
        print("interrupted; this is what was measured", file=sys.stderr)
    print_table(field_of, yardstick)
    print_targets(ours, yardstick)


if __name__ == "__main__":
    main()
