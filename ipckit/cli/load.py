# SPDX-License-Identifier: MIT
"""load: the options, the progress bar, the table."""

import dataclasses
import json
import math
import sys
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ipckit._unpatched import signal
from ipckit.cli.commands import (
    Refused,
    Seconds,
    SocketPath,
    Text,
    examples,
    group,
    one_line,
    server_address,
    shown,
)
from ipckit.errors import Closed
from ipckit.load import LARGEST, MOST_CONNECTIONS, Load, LoadReport

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

if TYPE_CHECKING:
    from rich.progress import Progress

    from ipckit.load import LoadProgress


@group.command(
    epilog=examples(
        "ipckit load 127.0.0.1:7007",
        "ipckit load -c 100 -d 30 -r 5000 127.0.0.1:7007     5,000 due per second",
        "ipckit load -u echo.sock -n 1000 --json             1,000 messages of each connection",
        r"ipckit load localhost:6379 --send 'PING\r\n' --expect '+PONG\r\n'",
    )
)
@click.argument("address", nargs=-1, metavar="[HOST:PORT]")
@click.option("-u", "--unix", type=SocketPath(), metavar="PATH", help="A Unix socket, in place of HOST:PORT.")
@click.option(
    "-c",
    "--connections",
    metavar="N",
    type=click.IntRange(1, MOST_CONNECTIONS),
    default=16,
    show_default=True,
    help="Connections at a time.",
)
@click.option(
    "-n",
    "--messages",
    metavar="N",
    type=click.IntRange(1),
    help="Messages of each connection.  [default: no limit]",
)
@click.option(
    "-s",
    "--size",
    type=click.IntRange(1, LARGEST),
    metavar="BYTES",
    help="Of a message, up to 16 MiB.  [default: 64]",
)
@click.option(
    "--send",
    type=Text(),
    metavar="TEXT",
    help=r"What each message is, in place of a pattern; with backslash escapes: '\r\n', '\x00'.",
)
@click.option(
    "--expect",
    type=Text(),
    metavar="TEXT",
    help="All that comes back to --send, checked byte by byte.  [default: the same]",
)
@click.option(
    "-d",
    "--duration",
    type=Seconds(),
    metavar="SECONDS",
    help="How long to count; the end of --messages comes first if it does.  [default: 5, or as long as "
    "--messages take]",
)
@click.option(
    "-r",
    "--rate",
    type=click.FloatRange(min=0, min_open=True, max=1e9),
    metavar="PER_SECOND",
    help="Messages that are due, whatever the server does; latencies count from when each is due.  "
    "[default: a closed loop]",
)
@click.option("--reconnect", is_flag=True, help="A connection for each message.")
@click.option(
    "--idle",
    metavar="N",
    type=click.IntRange(0, MOST_CONNECTIONS),
    default=0,
    show_default=True,
    help="Further connections, opened and held silently.",
)
@click.option(
    "--warm-up",
    type=Seconds(zero=True),
    default=0.0,
    show_default=True,
    metavar="SECONDS",
    help="Not counted, before the rest.",
)
@click.option(
    "-t",
    "--timeout",
    type=Seconds(),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="For a message, from its sending to the last byte back.",
)
@click.option(
    "--grace",
    type=Seconds(zero=True),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="For what is under way when the duration is over, or at Ctrl-C.",
)
@click.option("--i-own-this-host", is_flag=True, help="Allow an address that is not loopback.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def load(
    address: "tuple[str, ...]",
    unix: str | None,
    duration: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Load an echo server, or another one that gives each request the same answer; check every byte.

    Ctrl-C, or SIGTERM, ends it early: what is under way has the grace, and the report is of what was
    measured. The second one ends it at once, with a report too.

    Exit status: 0 if there were no errors, 1 if there were (they are counted, and do not end the run) or if
    nobody could be reached, 2 for wrong usage, 130 or 143 after a second Ctrl-C or SIGTERM.
    """
    where = server_address(address, unix)
    if duration is None and options["messages"] is None:
        duration = 5.0
    made = _made(where, duration=duration, **options)
    with one_line(shown(where)), made as running:
        told = _listen(running)
        _run(running, duration, told)
        report = running.report()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _show(report)
    for number in _SIGNALS:  # so that none comes between the report and the status
        signal.signal(number, signal.SIG_IGN)
    raise click.exceptions.Exit(128 + told[1] if len(told) > 1 else int(bool(report.errors)))


def _made(where: "tuple[str, int] | str", **options: Any) -> Load:
    try:
        with one_line(shown(where)):
            return Load(where, **options)
    except ValueError as error:
        raise Refused(str(error).replace("i_own_this_host", "--i-own-this-host")) from None


def _listen(running: Load) -> "list[int]":
    """Take the signals that tell it to end, ignored ones too, as those of a shell's background are; which
    have come."""
    told: list[int] = []

    def tell(number: int, _: FrameType | None) -> None:
        told.append(number)
        with suppress(Closed):  # it is over, and only the report is to come
            running.stop()

    for number in _SIGNALS:
        signal.signal(number, tell)
    return told


def _run(running: Load, duration: float | None, told: "list[int]") -> None:
    """Until the end, or until it is told so for the second time."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ipckit.cli.screen import Screen

    with Screen() as screen:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[did]}"))
        bar = Progress(*columns, TimeElapsedColumn(), console=screen.console, auto_refresh=False)
        bar.add_task("opening", total=None if duration == math.inf else duration, did="")
        while not running.step() and len(told) < 2:
            screen.respond()
            line = _update(bar, running.progress())
            screen.draw(bar.get_renderable(), line)


def _update(bar: "Progress", now: "LoadProgress") -> str:
    did = f"{now.open:,} open, {now.count:,} echoes" + (f", {now.errors:,} errors" * bool(now.errors))
    bar.update(bar.task_ids[0], description=now.phase, completed=now.seconds, did=did)
    return f"{now.phase}, {now.seconds:.0f} s: {did}"


def _microseconds(value: float) -> str:
    return f"{value:,.0f} us" if value < 10_000 else f"{value / 1000:,.1f} ms"


def _show(report: LoadReport) -> None:
    from rich.console import Console
    from rich.table import Table

    what = "connections" if report.reconnect else "echoes"
    loop = "closed loop" if report.scheduled_rate is None else f"{report.scheduled_rate:,g} due per second"
    table = Table("", loop, title=f"load on {report.target}", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row(
        "connections", f"{report.connections:,}" + (f" and {report.idle:,} idle" * bool(report.idle))
    )
    table.add_row("bytes of a message", f"{report.size:,}")
    if report.answer_size != report.size:
        table.add_row("bytes of an answer", f"{report.answer_size:,}")
    table.add_row(what, f"{report.count:,} in {report.seconds:.2f} s")
    table.add_row(f"{what}/s", f"{report.rate:,.1f}")
    table.add_row("bytes that came back right", f"{report.bytes:,}")
    for name, value in report.latency_us.items():
        table.add_row(f"latency, {name}", _microseconds(value))
    if report.unsent:
        table.add_row("due, but never sent", f"{report.unsent:,}")
    for name, count in report.errors.items():
        table.add_row(f"errors: {name}", f"{count:,}", style="red")
    Console().print(table)
    for name, first in report.first.items():
        print(f"first {name}: {first}", file=sys.stderr)
