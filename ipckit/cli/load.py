# SPDX-License-Identifier: MIT
"""load: the options, the progress bar, the table."""

import dataclasses
import json
import math
import sys
from typing import Any

import click

from ipckit.cli.commands import Seconds, SocketPath, group, one_line
from ipckit.load import LARGEST, MOST_CONNECTIONS, Load, LoadReport


@group.command()
@click.argument("host", required=False)
@click.argument("port", type=click.IntRange(1, 65535), required=False)
@click.option("--unix", type=SocketPath(), metavar="PATH", help="A Unix socket, in place of HOST PORT.")
@click.option(
    "--connections",
    metavar="N",
    type=click.IntRange(1, MOST_CONNECTIONS),
    default=16,
    show_default=True,
    help="Connections at a time.",
)
@click.option(
    "--messages",
    metavar="N",
    type=click.IntRange(1),
    help="Messages of each connection.  [default: no limit]",
)
@click.option(
    "--size",
    type=click.IntRange(1, LARGEST),
    default=64,
    show_default=True,
    metavar="BYTES",
    help="Of a message, up to 16 MiB.",
)
@click.option(
    "--duration",
    type=Seconds(),
    metavar="SECONDS",
    help="How long to count; the end of --messages comes first if it does.  [default: 5, or as long as "
    "--messages take]",
)
@click.option(
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
    "--timeout",
    type=Seconds(),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="For a message, from its sending to the last byte back.",
)
@click.option("--i-own-this-host", is_flag=True, help="Allow an address that is not loopback.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def load(
    host: str | None,
    port: int | None,
    unix: str | None,
    duration: float | None,
    i_own_this_host: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Load an echo server, check every byte that comes back.

    Exit status 1 if there were errors; none of them ends the run. Ctrl-C ends it with what was measured
    so far.
    """
    address = _address(host, port, unix)
    if duration is None and options["messages"] is None:
        duration = 5.0
    try:
        with one_line(unix or f"{host}:{port}"):
            running = Load(address, duration=duration, i_own_this_host=i_own_this_host, **options)
    except ValueError as error:
        raise click.UsageError(str(error).replace("i_own_this_host", "--i-own-this-host")) from None
    with running:
        _run(running, duration, options["messages"])
        report = running.report()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        _show(report)
    raise click.exceptions.Exit(1 if report.errors else 0)


def _address(host: str | None, port: int | None, unix: str | None) -> "tuple[str, int] | str":
    if unix is not None and host is None:
        return unix
    if unix is None and host is not None and port is not None:
        return host, port
    raise click.UsageError("name HOST and PORT, or --unix PATH")


def _run(running: Load, duration: float | None, messages: int | None) -> None:
    """Until the end; the first Ctrl-C lets what is under way come to its end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[did]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None if duration == math.inf else duration, did="")
        while not _step(running):
            now = running.progress()
            did = f"{now.open:,} open, {now.count:,} echoes" + (f", {now.errors:,} errors" * bool(now.errors))
            bar.update(task, description=now.phase, completed=now.seconds, did=did)


def _step(running: Load) -> bool:
    try:
        return running.step()
    except KeyboardInterrupt:
        if running.progress().phase == "ending":
            raise
        running.stop()
        return False


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
    table.add_row(what, f"{report.count:,} in {report.seconds:.2f} s")
    table.add_row(f"{what}/s", f"{report.rate:,.1f}")
    table.add_row("bytes echoed, verified", f"{report.bytes:,}")
    for name, value in report.latency_us.items():
        table.add_row(f"latency, {name}", _microseconds(value))
    if report.unsent:
        table.add_row("due, but never sent", f"{report.unsent:,}")
    for name, count in report.errors.items():
        table.add_row(f"errors: {name}", f"{count:,}", style="red")
    Console().print(table)
    for name, first in report.first.items():
        print(f"first {name}: {first}", file=sys.stderr)
