# SPDX-License-Identifier: MIT
"""Measure every model of ``ipckit serve`` against servers in C, of the standard library, and on uvloop.

    python bench/bench_server.py [--quick] [--only TEXT] [--rounds N] [--seconds S] [--csv FILE]
                                 [--picture FILE] [--against FOLDER]
    python bench/bench_server.py --growth [--quick] [--rounds N] [--seconds S] [--csv FILE]

Each round starts every server in turn, loads it with short connections (connect, echo 64 bytes, close)
and with long ones (16 of them, each sending a message when the one before is back), stops it, and
compares the size of its log with what was echoed. Ratios are taken within a round, because the machine
may be faster or slower in the next; the table shows the medians. The load is made by this process,
which takes one processor. With --against each of ours has its turn beside the same one of another commit.
"""

import argparse
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import click
import server_growth as growth
import server_report as report
from engine_report import FLOOR, OURS, PEER, machine
from server_asyncio import has_uvloop
from server_report import Target
from server_turns import MODES, ROOT, Failed, Server, take_turn

from ipckit.cli.servers import serve

PROGRAMS = ROOT / "build" / "bench"
YARDSTICK = "C, fork"
FORKING, THREADING = "socketserver.ForkingTCPServer", "socketserver.ThreadingTCPServer"
TARGETS = [
    Target("ipckit, fork", "connections", 0.5, YARDSTICK),
    Target("ipckit, fork", "echoes", 0.95, YARDSTICK),
    Target("ipckit, prefork", "connections", 2, YARDSTICK),
    *(Target("ipckit, epoll", mode, 1, "uvloop protocol, logged", "uvloop protocol") for mode in MODES),
    *(Target("ipckit, thread", mode, 1, THREADING) for mode in MODES),
    *(
        Target("ipckit, asyncio", mode, 0.95, "asyncio protocol", "asyncio protocol, logged")
        for mode in MODES
    ),
]


# --- who takes part


def options_of_serve() -> "dict[str, click.Parameter]":
    return {str(parameter.name): parameter for parameter in serve.params}


def models() -> list[str]:
    """Those that ``ipckit serve --help`` lists."""
    choice = options_of_serve()["model"].type
    assert isinstance(choice, click.Choice)
    return [*choice.choices]


def ours(model: str, variant: str = "", *options: str) -> Server:
    command = [sys.executable, "-m", "ipckit", "serve", "--model", model, *options, "--host", "127.0.0.1"]
    # The iterative one serves its first client to the end, and the others would wait for that.
    clients = {"clients": 1} if model == "iterative" else {}
    missing = "skipped: uvloop is not installed" * ("--uvloop" in options and not has_uvloop())
    command += ["--port", "0", "--log", "LOG"]
    return Server(f"ipckit, {model}{variant}", OURS, command, trouble=missing, **clients)


def before(server: Server, folder: Path) -> Server:
    """The same server, of the checkout in *folder*, where it was built."""
    options = server.command[server.command.index("serve") :]
    return Server(
        f"before: {server.name}", PEER, [str(folder / ".venv/bin/ipckit"), *options], clients=server.clients
    )


def beside(those: "list[Server]", folder: "Path | None") -> "list[Server]":
    """Each of ours followed by the one of *folder*."""
    if folder is None:
        return those
    pairs = ([server, before(server, folder)] if server.kind == OURS else [server] for server in those)
    return [one for pair in pairs for one in pair]


def targets_against(those: "list[Server]") -> "list[Target]":
    """No model may be slower than it was: fork not at all for connections, and echoes by 3 % at the most."""
    was = {server.name: f"before: {server.name}" for server in those if server.kind == OURS}
    forks = [Target("ipckit, fork", "connections", 1, "before: ipckit, fork")]
    return forks + [Target(ours, "echoes", 0.97, theirs) for ours, theirs in was.items()]


def in_c(model: str) -> Server:
    return Server(f"C, {model}", FLOOR, [str(PROGRAMS / f"{model}_server"), "0", "LOG"])


def peer(name: str, program: str, *arguments: str) -> Server:
    command = [sys.executable, str(ROOT / "bench" / program), *arguments]
    missing = "skipped: uvloop is not installed" * ("uvloop" in arguments and not has_uvloop())
    return Server(name, PEER, command, logs="LOG" in arguments, trouble=missing)


def servers() -> list[Server]:
    return [
        *(ours(model) for model in models() if model != "asyncio"),
        ours("asyncio", "", "--no-uvloop"),
        ours("asyncio", " on uvloop", "--uvloop"),
        in_c("fork"),
        in_c("epoll"),
        peer(FORKING, "server_socketserver.py", "ForkingTCPServer"),
        peer(THREADING, "server_socketserver.py", "ThreadingTCPServer"),
        peer("asyncio protocol", "server_asyncio.py", "asyncio"),
        peer("asyncio protocol, logged", "server_asyncio.py", "asyncio", "LOG"),
        peer("uvloop protocol", "server_asyncio.py", "uvloop"),
        peer("uvloop protocol, logged", "server_asyncio.py", "uvloop", "LOG"),
    ]


# --- the rounds


def play(taking_part: list[Server], rounds: int, seconds: float) -> None:
    for number in range(1, rounds + 1):
        for server in taking_part:
            if server.trouble:
                continue
            print(f"round {number} of {rounds}: {server.name}", file=sys.stderr)
            try:
                take_turn(server, number, seconds)
            except Failed as failure:
                server.trouble = str(failure)


def compare(chosen: argparse.Namespace) -> None:
    everybody = beside(servers(), chosen.against)
    named = {server.name: server for server in everybody}
    taking_part = [server for server in everybody if chosen.only in server.name or server.name == YARDSTICK]
    try:
        play(taking_part, chosen.rounds, chosen.seconds)
    except KeyboardInterrupt:
        print("interrupted; this is what was measured", file=sys.stderr)
    report.print_table(taking_part, named[YARDSTICK])
    report.print_targets(TARGETS, named)
    if chosen.against:
        report.print_targets(targets_against(everybody), named)
    if chosen.csv:
        report.write_csv(taking_part, named[YARDSTICK], chosen.csv)
    if chosen.picture:
        report.draw(taking_part, chosen.picture)


def grow(chosen: argparse.Namespace) -> None:
    wanted = [server for server in servers() if (chosen.only or "ipckit, epoll") in server.name]
    if not wanted:
        sys.exit(f"there is no server {chosen.only or 'ipckit, epoll'!r}; ours are {', '.join(models())}")
    for server in wanted:
        if server.kind == OURS:
            server.command += hold_them_all()
        try:
            growth.run(server, chosen.rounds, chosen.seconds, chosen.quick, chosen.csv)
        except Failed as failure:
            sys.exit(f"{server.name}: {failure}")


def hold_them_all() -> list[str]:
    """Options for as many connections as are held, however silent."""
    most = ["--max-connections", str(2 * growth.HELD[-1])] if "max_connections" in options_of_serve() else []
    return ["--idle-timeout", "600", *most]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each server runs (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load in each mode and round (2)")
    parser.add_argument("--only", default="", help="servers whose name contains this, and the C, fork one")
    parser.add_argument(
        "--growth", action="store_true", help="measure epoll (or --only) with 10 to 10,000 connections held"
    )
    parser.add_argument(
        "--against", type=Path, help="a checkout of another commit, built: compare with its servers"
    )
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--csv", type=Path, help="write all figures to this file")
    parser.add_argument("--picture", type=Path, help="draw them (.png, .svg, .pdf); needs matplotlib")
    chosen = parser.parse_args()
    if chosen.rounds < 1 or not chosen.seconds >= 0.05:
        parser.error("--rounds must be at least 1 and --seconds at least 0.05")
    if chosen.growth and chosen.picture:
        parser.error("--growth has no --picture")
    if chosen.quick:
        chosen.rounds, chosen.seconds = 1, 0.5 if chosen.growth else 0.2
    return chosen


def main() -> None:
    chosen = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped
    # The servers, which are our children, have as many descriptors.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    subprocess.run(["make", "-s", "cbench"], cwd=ROOT, check=True)
    print(f"{machine()}; the load takes one of the {os.cpu_count()}")
    (grow if chosen.growth else compare)(chosen)


if __name__ == "__main__":
    main()
