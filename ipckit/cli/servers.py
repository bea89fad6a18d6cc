# SPDX-License-Identifier: MIT
"""serve, client, demo: the options; what they do stands in the rooms."""

import logging
import signal
from collections.abc import Callable

import click

from ipckit.cli.commands import group, one_line
from ipckit.messagelog import MessageLog
from ipckit.servers import ServerStats, listen
from ipckit.servers import client as split_client
from ipckit.servers.fork import ForkServer
from ipckit.signals import blocked, sigaction

_SECONDS = click.FloatRange(min=0, min_open=True)
_PORT = click.IntRange(0, 65535)


def _log_option(text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--log",
        "path",
        type=click.Path(dir_okay=False),
        default="echomsg.txt",
        show_default=True,
        help=text,
    )


@group.command()
@click.option(
    "--model",
    type=click.Choice(["fork"]),
    default="fork",
    show_default=True,
    help="How clients are served: a process per connection.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=_PORT,
    default=7007,
    show_default=True,
    help="The port to listen on; 0 takes a free one and prints it.",
)
@_log_option("The file that the logger child appends to.")
@click.option(
    "--format",
    type=click.Choice(["raw", "record"]),
    default="raw",
    show_default=True,
    help="raw: the bytes as they came; record: a JSON line each.",
)
@click.option(
    "--durability",
    type=click.Choice(["none", "written", "synced"]),
    default="none",
    show_default=True,
    help="What an echo waits for: the log's pipe, the file, the disk.",
)
@click.option(
    "--max-children",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Connections served at a time; further ones wait.",
)
@click.option(
    "--idle-timeout",
    type=_SECONDS,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Close a client that sends nothing, or reads nothing, for so long.",
)
@click.option(
    "--stop-timeout",
    type=_SECONDS,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="At the stop, kill what has not ended after so long.",
)
def serve(
    model: str,
    host: str,
    port: int,
    path: str,
    format: str,
    durability: str,
    max_children: int,
    idle_timeout: float,
    stop_timeout: float,
) -> None:
    """Run the message-logging echo server.

    It answers each client with what the client sent, and writes it to the log first. Ctrl-C or SIGTERM
    ends it: no new clients, what has come is echoed and logged, then it exits with status 0.
    """
    assert model == "fork"
    logging.basicConfig(format="ipckit: %(message)s")
    # From here on a signal to stop is kept until the server takes it: none comes too early.
    with (
        blocked([signal.SIGTERM, signal.SIGINT]),
        one_line(f"{host}:{port}"),
        listen(host, port) as listener,
    ):
        with one_line(path):
            log = MessageLog(path, format=format, durability=durability)
        server = ForkServer(listener, log, max_children=max_children, idle_timeout=idle_timeout)
        address, number = listener.getsockname()[:2]
        click.echo(f"listening on {address}:{number}\nlogging to {path}")
        server.serve(stop_timeout=stop_timeout)
        stats = server.stats()
        with one_line(path):
            log.close(timeout=stop_timeout)
        for stop in (signal.SIGTERM, signal.SIGINT):  # asked twice: we end anyway, and with status 0
            sigaction(stop, signal.SIG_IGN)
    _show(stats)


def _show(stats: ServerStats) -> None:
    from rich.console import Console  # at the end only: what a server has loaded makes its forks dearer
    from rich.table import Table

    ends = ", ".join(f"{count} {how}" for how, count in sorted(stats.ends.items()))
    table = Table("", "count", title="served", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("connections", f"{stats.connections:,}" + (f" ({ends})" if ends else ""))
    table.add_row("echoes", f"{stats.echoes:,}")
    table.add_row("bytes", f"{stats.bytes:,}")
    if stats.log:
        table.add_row("log messages", f"{stats.log.messages:,}")
        table.add_row("logger restarts", f"{stats.log.restarts:,}")
    Console(stderr=True).print(table)


@group.command()
@click.argument("host")
@click.argument("port", type=click.IntRange(1, 65535))
def client(host: str, port: int) -> None:
    """Talk to an echo server at HOST PORT: one process sends what you type, one prints what comes.

    A line that is only q or Q, or the end of the input, ends the sending; the rest of the answer still
    comes. Works with a file or a pipe on standard input too.
    """
    try:
        with one_line(f"{host}:{port}"):
            split_client.run(host, port)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(128 + 2) from None


@group.command()
@click.option(
    "--clients", type=click.IntRange(1, 64), default=8, show_default=True, help="Clients at a time."
)
@click.option("--messages", type=click.IntRange(1), default=2000, show_default=True, help="Messages of each.")
@_log_option("The log; what is in it already stays.")
def demo(clients: int, messages: int, path: str) -> None:
    """Start the echo server on loopback, drive it with real clients, verify its log, stop it."""
    from ipckit.cli import demo as demonstration

    with one_line(path):
        raise click.exceptions.Exit(demonstration.run(clients, messages, path))
